"""The table of step costs is that of the committed benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from memadvise.optim.registry import list_methods
from memadvise.optim.step_costs import CODEC_COSTS, MEASURED_AS, METHOD_COSTS, step_cost
from memadvise.plan.schema import Setting

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu_step_time.txt"


def measured() -> dict[str, float]:
    """Label -> CPU ratio."""
    rows = [re.split(r"\s{2,}", line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    return {row[0]: float(row[3]) for row in rows if row[0].startswith("memadvise ") and len(row) > 6}


@pytest.mark.parametrize("method", list_methods())
def test_every_method_costs_what_was_measured(method: str) -> None:
    assert METHOD_COSTS[method] == pytest.approx(measured()[MEASURED_AS[method]], rel=0.1)  # the table's own spread


@pytest.mark.parametrize("codec", CODEC_COSTS)
def test_codecs_cost_what_they_add_to_adamw(codec: str) -> None:
    both = Setting("adamw", {"first_moment": codec, "second_moment": codec})
    assert step_cost(both) == pytest.approx(measured()[f"memadvise adamw {codec}"], rel=0.1)
