"""Ten planted regressions are found and named; twenty harmless edits raise nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memadvise.baseline import Observation
from memadvise.check import Status

sys.path.insert(0, str(Path(__file__).parent))
from planted import HARMLESS, REGRESSIONS, Field, Planted

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Field:
    return Field(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def plain(field: Field) -> Observation:
    return field.observe(())


@pytest.fixture(autouse=True)
def _own_modules() -> Iterator[None]:
    """Every version of the example is imported anew, and its helper module does not stay behind."""
    yield
    sys.modules.pop("example_support", None)


def test_there_are_ten_and_twenty() -> None:
    assert (len(REGRESSIONS), len(HARMLESS)) == (10, 20)


@pytest.mark.parametrize("case", REGRESSIONS, ids=lambda case: case.name.replace(" ", "-"))
def test_a_regression_is_found_and_its_cause_named(case: Planted, field: Field, plain: Observation) -> None:
    result = field.planted(case, plain)
    assert result.status is Status.regression
    assert (result.causes[0].category, result.causes[0].module) == (case.category, case.module)
    assert result.headline.startswith("+")
    assert result.causes[0].module in result.headline
    assert sum(move.delta_bytes for move in result.moves) >= (result.delta_bytes or 0) > 0


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_edit_raises_nothing(name: str, field: Field, plain: Observation) -> None:
    result = field.verdict(plain, HARMLESS[name])
    assert (result.status, result.delta_bytes) == (Status.same, 0)
    assert result.moves == ()


def test_the_line_that_made_what_is_new_is_named(field: Field, plain: Observation) -> None:
    case = next(case for case in REGRESSIONS if case.name == "a mask materialised")
    cause = field.planted(case, plain).causes[0]
    lines = (field.folder / field.example).read_text(encoding="utf-8").splitlines()
    assert cause.where is not None
    file, _, number = cause.where.rpartition(":")
    assert Path(file).name == field.example
    assert "softmax" in lines[int(number) - 1]
