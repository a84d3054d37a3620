"""Scores become harm: what averages out over the steps counts less than what stays."""

from __future__ import annotations

import pytest

from memadvise.advise.candidates import Group, candidate_settings
from memadvise.advise.harm import HarmTable, Source
from memadvise.advise.profile import Profile, ProfileValue
from memadvise.ledger import Parameter
from memadvise.plan.schema import Setting

UP = Parameter("w", (256, 64), "float32", 4 * 256 * 64, True, "mlp_up", "w", "Linear", (1,), (0,))
GROUP = Group("mlp_up", UP.shape, (UP,), ("w",), candidate_settings(UP))
INT4, INT8 = ({"first_moment": codec, "second_moment": codec} for codec in ("int4", "int8"))


def harm(setting: Setting) -> float:
    kinds = ("adamw, m int4, v int4", "adamw, m int4", "adamw, m int8, v int8", "factored", "mean(fan_in)")
    table = HarmTable(None, Profile("p", tuple(ProfileValue("mlp_up", 0.0, kind, 1.0, 0.1) for kind in kinds)))
    found = table.of(GROUP, setting)
    assert found.source is Source.PROFILE
    return found.value / UP.numel


def test_rounding_at_random_counts_less_than_what_a_mean_loses() -> None:
    assert harm(Setting("adafactor", {"momentum": 0.9})) == pytest.approx(1.0)
    assert harm(Setting("adamw", INT8)) == pytest.approx(1.0)
    assert harm(Setting("adamw", INT4)) == pytest.approx(0.2)


def test_in_a_combination_it_is_the_rounded_part_that_counts_less() -> None:
    both = Setting("slimadam", {"axes": [1], "first_moment": "int4"})
    assert harm(both) == pytest.approx(1.0 + 0.2)
