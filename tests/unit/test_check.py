"""Verdicts of the check: what is a finding, what it is blamed on, and which exit code follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from baseline_entries import MIB, MODULES, edited, make_entry, observation

from memadvise.check import Result, Status, compare, exit_code, parse_tolerance
from memadvise.errors import TargetError, TargetRaised, UsageError

BASE = make_entry()


def verdict(
    by_module: Any = None, places: Any = None, *, base: Any = BASE, limits: Any = None, **changes: Any
) -> Result:
    return compare(observation(make_entry(by_module, **changes), places), base, **(limits or {}))


def grown(size: int, base: int = 2 * MIB) -> Any:
    """The modules with so many bytes more of a temporary."""
    return edited("(loss)", "temporaries", {"_log_softmax float32": base + size})


def test_equal_bytes_are_the_same() -> None:
    result = verdict()
    assert (result.status, result.delta_bytes, result.moves, result.causes) == (Status.same, 0, (), ())
    assert result.headline == "50.00 MiB"


@pytest.mark.parametrize(
    ("tolerance", "growth", "status"),
    [
        ("0", 1, Status.regression),
        ("0", -1, Status.improved),
        ("1MiB", MIB, Status.same),
        ("1MiB", -MIB, Status.same),
        ("1MiB", MIB + 1, Status.regression),
        ("1%", MIB // 2, Status.same),
        ("1%", MIB // 2 + 1, Status.regression),
        ("1%,1MiB", MIB, Status.same),
        ("1%,1MiB", MIB + 1, Status.regression),
    ],
)
def test_the_tolerance_is_exact(tolerance: str, growth: int, status: Status) -> None:
    assert verdict(grown(growth), limits={"tolerance": parse_tolerance(tolerance)}).status is status


def test_an_entrys_own_tolerance_holds_unless_the_user_says_otherwise() -> None:
    lenient = replace(BASE, tolerance="2MiB")
    assert verdict(grown(MIB), base=lenient).status is Status.same
    assert verdict(grown(MIB), base=lenient, limits={"tolerance": parse_tolerance("0")}).status is Status.regression
    with pytest.raises(UsageError, match="'much' is no tolerance"):
        verdict(grown(MIB), base=replace(BASE, tolerance="much"))


def test_measurements_tolerate_one_percent_or_sixteen_mebibytes() -> None:
    measured = make_entry(source="measure")
    assert verdict(grown(16 * MIB), base=measured, source="measure").status is Status.same
    assert verdict(grown(16 * MIB + 1), base=measured, source="measure").status is Status.regression
    large = {**MODULES, "tokens": {"weights": {"float32": 2000 * MIB}}}
    base = make_entry(large, source="measure")
    wider = make_entry({**large, "(loss)": {"temporaries": {"x": 27 * MIB}}}, source="measure")
    assert compare(observation(wider), base).status is Status.regression
    compiled = {**wider.information, "compiled": "yes"}  # kernels that were tuned by trying
    assert compare(observation(replace(wider, information=compiled)), base).status is Status.same


@pytest.mark.parametrize("text", ["", "x", "-1", "1%%", "5 %", "1 MiB , 2%", "nan", "1e3%", "0,0", "1%,"])
def test_tolerances_are_read_strictly(text: str) -> None:
    if text in ("5 %", "1 MiB , 2%", "0,0"):
        parse_tolerance(text)
    else:
        with pytest.raises(UsageError, match="no tolerance"):
            parse_tolerance(text)


# ---------------------------------------------------------------- causes


def test_the_cause_is_a_pattern_a_new_tensor_and_its_line() -> None:
    by_module = dict(MODULES)
    places = {}
    for i in range(4):
        by_module = edited(f"h.{i}.mlp", "activations", {"gelu float32": 3 * MIB, "addmm float32": 3 * MIB,
                                                         "_to_copy float32": 4 * MIB}, by_module)  # fmt: skip
        places[f"h.{i}.mlp", "activations", "_to_copy float32"] = "model.py:88"
    result = verdict(by_module, places)
    assert result.headline == (
        "+16.00 MiB (+32.0 %): activations of `h.*.mlp` (new: `_to_copy` saved in fp32, model.py:88)"
    )
    assert [(m.category, m.pattern, m.num_modules, m.delta_bytes) for m in result.moves] == [
        ("activations", "h.*.mlp", 4, 16 * MIB)
    ]


def test_one_block_of_many_is_named_by_its_number() -> None:
    result = verdict(edited("h.2.mlp", "activations", {"gelu float32": 9 * MIB}))
    assert result.causes[0].module == "h.2.mlp"
    assert "`gelu` saved in fp32: 3.00 MiB -> 9.00 MiB" in result.headline


def test_a_dtype_that_became_wider() -> None:
    half = {**MODULES, "tokens": {"weights": {"bfloat16": 2 * MIB}, "optimizer_state": {"float32": 8 * MIB}}}
    result = verdict(base=make_entry(half), by_module=MODULES)
    assert result.headline == "+2.00 MiB (+4.2 %): weights of `tokens` (bf16 became fp32)"


def test_weights_explain_what_follows_from_them() -> None:
    by_module = edited("tokens", "weights", {"float32": 5 * MIB})
    by_module = edited("tokens", "optimizer_state", {"float32": 10 * MIB}, by_module)
    by_module = {**by_module, "(loss)": {"temporaries": {"_log_softmax float32": 10 * MIB}}}
    result = verdict(by_module)
    assert (result.causes[0].category, result.causes[0].module) == ("weights", "tokens")
    # A bias somewhere does not explain a mask of hundreds of MiB.
    by_module = edited(
        "tokens", "weights", {"float32": 4 * MIB + 512}, {**MODULES, "mask": {"buffers": {"-": 90 * MIB}}}
    )
    assert verdict(by_module).causes[0].category == "buffers"


def test_growth_everywhere_is_the_whole_model() -> None:
    by_module = {module: {"activations": {"x float32": 10 * MIB}} for module in ("a", "b.0", "c.d.e")}
    result = verdict(
        {module: {"activations": {"x float32": 20 * MIB}} for module in by_module}, base=make_entry(by_module)
    )
    assert "activations of the whole model" in result.headline


def test_another_batch_is_the_first_thing_said() -> None:
    by_module = edited("h.0.mlp", "activations", {"gelu float32": 90 * MIB})
    result = verdict(by_module, batch=("int64[16, 64]",))
    assert "the batch went from int64[8, 64] to int64[16, 64]" in result.headline
    assert result.changed["batch"] == ("int64[8, 64]", "int64[16, 64]")


def test_a_peak_in_another_phase_is_compared_with_that_phase() -> None:
    step = {"tokens": {"weights": {"float32": 4 * MIB}}, "(optimizer)": {"temporaries": {"sqrt float32": 60 * MIB}}}
    backward = {"tokens": {"weights": 4 * MIB}, "h.0": {"activations": 30 * MIB}, "h.1": {"activations": 20 * MIB}}
    base = make_entry(step, peak_phase="step", by_phase={"backward": 54 * MIB, "step": 64 * MIB},
                      other_phases={"backward": backward})  # fmt: skip
    now = {
        "tokens": {"weights": {"float32": 4 * MIB}},
        "h.0": {"activations": {"gelu float32": 30 * MIB}},
        "h.1": {"activations": {"gelu float32": 40 * MIB}},
    }
    result = verdict(now, base=base, peak_phase="backward")
    assert result.delta_bytes == 10 * MIB
    assert (result.causes[0].category, result.causes[0].module) == ("activations", "h.1")
    assert [move.pattern for move in result.moves] == ["h.1"]  # what is alive in the other phase did not move


def test_renamed_and_renumbered_modules_did_not_move() -> None:
    renamed = {name.replace("mlp", "ffn"): makers for name, makers in MODULES.items()}
    result = verdict(renamed)
    assert (result.status, result.moves, result.renamed) == (Status.same, (), (("h.*.mlp", "h.*.ffn"),))
    inserted = {"seq.0": {"weights": {"-": 10}}, "seq.1": {"weights": {"-": 20}}}
    base = make_entry({"seq.0": {"weights": {"-": 20}}})
    result = compare(observation(make_entry(inserted)), base)
    assert [(move.pattern, move.delta_bytes) for move in result.moves] == [("seq.0", 10)]
    assert result.renamed == ()


def test_hidden_moves_without_growth_are_no_finding() -> None:
    swapped = edited("h.0.mlp", "activations", {"gelu float32": 2 * MIB, "addmm float32": 4 * MIB})
    assert verdict(swapped).status is Status.same


# ---------------------------------------------------------------- other verdicts


def test_another_environment_is_not_comparable() -> None:
    elsewhere = {**BASE.environment, "torch": "2.14.0", "estimator": "2"}
    result = verdict(grown(MIB), environment=elsewhere)
    assert result.status is Status.not_comparable
    assert result.headline == (
        "not comparable: estimator is 2, in the baseline 1; torch is 2.14.0, in the baseline 2.13.0"
    )
    assert result.causes == ()


def test_another_hash_dtype_or_optimizer_is_compared_and_told() -> None:
    result = verdict(grown(MIB), information={**BASE.information, "dtype": "bfloat16", "target_sha256": "1" * 64})
    assert result.status is Status.regression
    assert set(result.changed) == {"dtype", "target_sha256"}


def test_budgets_hold_with_and_without_a_baseline() -> None:
    limits = {"budget_bytes": 49 * MIB}
    for base in (BASE, None):
        result = verdict(base=base, limits=limits)
        assert (result.status, result.over_budget_bytes) == (Status.over_budget, MIB)
        assert result.headline == (
            "1.00 MiB over the budget of 49.00 MiB: activations of `h.*.mlp` (largest: 24.00 MiB)"
        )
    assert verdict(grown(MIB), limits=limits).status is Status.regression
    elsewhere = verdict(environment={**BASE.environment, "torch": "3"}, limits=limits)
    assert (elsewhere.status, set(elsewhere.differing)) == (Status.over_budget, {"torch"})
    assert verdict(limits={"budget_bytes": 50 * MIB}).status is Status.same  # a budget may be used up


def test_no_entry_is_missing_unless_that_is_all_right() -> None:
    assert verdict(base=None).status is Status.missing
    assert verdict(base=None, limits={"without_baseline": Status.new}).status is Status.new


def test_strict_makes_a_stale_baseline_a_finding() -> None:
    assert verdict(grown(-MIB), limits={"strict": True}).status is Status.stale
    assert "the baseline is stale" in verdict(grown(-MIB)).headline


def test_updating_leaves_only_the_budget() -> None:
    result = verdict(grown(MIB)).updated()
    assert (result.status, result.headline) == (Status.updated, "51.00 MiB (+1.00 MiB (+2.0 %))")
    assert verdict(grown(MIB), limits={"budget_bytes": MIB}).updated().status is Status.over_budget
    moved = verdict(environment={**BASE.environment, "device": "cpu"}).updated()
    assert (moved.status, moved.base, moved.differing) == (Status.updated, None, {})


@pytest.mark.parametrize(
    ("statuses", "code", "lenient"),
    [
        ([Status.same, Status.improved, Status.new, Status.updated], 0, 0),
        ([Status.same, Status.regression], 1, 0),
        ([Status.over_budget, Status.missing], 1, 0),
        ([Status.stale], 1, 0),
        ([Status.not_comparable], 2, 0),
        ([Status.missing, Status.same], 2, 0),
        ([TargetError("no such file")], 2, 2),
        ([TargetRaised("it raised"), Status.not_comparable], 3, 3),
        ([TargetRaised("it raised"), Status.regression], 1, 3),
        ([], 0, 0),
    ],
)
def test_exit_codes(statuses: list[Any], code: int, lenient: int) -> None:
    results = [
        Result("t", s) if isinstance(s, Status) else Result("t", Status.error, error=s) for s in statuses
    ]  # fmt: skip
    assert exit_code(results) == code
    assert exit_code(results, exit_zero=True) == lenient
