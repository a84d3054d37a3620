"""The way from a scan to a plan, with a tracer that answers by arithmetic plus a known scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from memadvise.advise.candidates import candidate_settings
from memadvise.advise.recommend import ENGINE_ADAMW, Recommendation, Wishes
from memadvise.advise.recommend import recommend as recommend_under
from memadvise.errors import Infeasible, MemadviseError, UsageError
from memadvise.ledger import (
    FidelityValue,
    MemoryLedger,
    Parameter,
    ParameterProbe,
    PhasePeak,
    ProbeLedger,
    Scan,
)
from memadvise.names import matches
from memadvise.optim.registry import state_bytes
from memadvise.plan.schema import Plan, Setting, Switches
from memadvise.report.text import render_recommendation
from memadvise.units import format_bytes

SCRATCH = 10_000
ROWS, COLUMNS = 256, 128
WEIGHT = 4 * ROWS * COLUMNS
DENSE_BYTES = state_bytes(Setting("adamw"), (ROWS, COLUMNS))


PLAIN = Switches()


def matrix(name: str, role: str) -> Parameter:
    return Parameter(name, (ROWS, COLUMNS), "float32", WEIGHT, True, role, name, "Linear", (1,), (0,))


PARAMETERS = (
    matrix("h.0.up.weight", "mlp_up"),
    matrix("h.1.up.weight", "mlp_up"),
    matrix("h.0.down.weight", "mlp_down"),
    matrix("h.1.down.weight", "mlp_down"),
    matrix("head.weight", "head"),
    Parameter("norm.weight", (COLUMNS,), "float32", 4 * COLUMNS, True, "norm", "norm", "LayerNorm"),
)
DENSE_STATE = sum(state_bytes(Setting("adamw"), p.shape) for p in PARAMETERS)
WEIGHTS = sum(p.num_bytes for p in PARAMETERS)

# Averaging over axis 1 hardly hurts the MLP, axis 0 hurts it ten times more; the head is the most sensitive.
HARM = {"mlp_up": 1.0, "mlp_down": 2.0, "head": 50.0}


# What these tests leave out where they count the bytes of means: everything else there is.
ONLY_MEANS = (
    "int8", "dynamic8", "int4", "adafactor", "adapprox", "apollo", "apollo_mini", "lion", "micro_adam", "galore",
)  # fmt: skip


def recommend(
    scan: Scan,
    budget: int,
    *,
    trace: Callable[[Plan], MemoryLedger],
    pins: Sequence[tuple[str, Setting]] = (),
    forbidden: Sequence[str] = ONLY_MEANS,
    **more: Any,
) -> Recommendation:
    return recommend_under(scan, budget, trace=trace, wishes=Wishes(tuple(pins), tuple(forbidden), **more))


def means(parameter: Parameter) -> tuple[Setting, ...]:
    return tuple(s for s in candidate_settings(parameter) if s.method == "slimadam" and len(s.options) == 1)


LEAST_STATE = sum(min(state_bytes(s, p.shape) for s in means(p) or (Setting("adamw"),)) for p in PARAMETERS)


def harm(parameter: Parameter, setting: Setting) -> float:
    return HARM[parameter.role] * {(1,): 1.0, (0,): 10.0, (0, 1): 20.0}[tuple(setting.options["axes"])]


def ledger(
    state: int, switches: Switches = PLAIN, optimizer: str = ENGINE_ADAMW, scratch: int = 0, saved: int = 300_000
) -> MemoryLedger:
    activations = saved // switches.micro_batches // (4 if switches.checkpoint else 1)
    forward = {"weights": WEIGHTS, "optimizer_state": state, "activations": activations}
    step = {"weights": WEIGHTS, "gradients": WEIGHTS, "optimizer_state": state, "temporaries": scratch}
    phases = (
        PhasePeak("forward", sum(forward.values()), forward),
        PhasePeak("step", sum(step.values()), step),
    )
    worst = max(phases, key=lambda p: p.peak_bytes)
    return MemoryLedger(
        source="estimate",
        device="cuda",
        optimizer=optimizer,
        micro_batches=switches.micro_batches,
        checkpoint=switches.checkpoint,
        peak_bytes=worst.peak_bytes,
        peak_phase=worst.phase,
        state_bytes=state,
        by_category=worst.by_category,
        by_module={"": worst.by_category},
        phases=phases,
        live_at_peak=(),
        timeline=(),
        num_events=0,
    )


def plan_state(plan: Plan) -> int:
    total = 0
    for parameter in PARAMETERS:
        rule = next(r for r in plan.rules if matches(r.match, parameter.name))
        total += state_bytes(Setting(rule.method, rule.options), parameter.shape)
    return total


def test_int8_weights_of_a_pin_count_as_saved_and_leave_room_for_state() -> None:
    pin = Setting("adamw", {"weights": "int8"})
    less = WEIGHT - int(WEIGHT / 4 * (1 + 3 / 128))

    def traced(plan: Plan) -> MemoryLedger:
        whole = ledger(plan_state(plan), plan.switches, "memadvise plan", SCRATCH)
        phases = tuple(
            replace(p, peak_bytes=p.peak_bytes - less, by_category={**p.by_category, "weights": WEIGHTS - less})
            for p in whole.phases
        )
        return replace(whole, phases=phases, peak_bytes=max(p.peak_bytes for p in phases))

    mean = state_bytes(Setting("slimadam", {"axes": [1]}), (ROWS, COLUMNS))
    budget = room(DENSE_STATE - 2 * (DENSE_BYTES - mean) - less)  # weights less, one pair of means suffices
    result = recommend(scan(), budget, trace=traced, pins=[("head.weight", pin)])
    choice = next(c for c in result.groups if c.role == "head")
    assert choice.weight_bytes_saved == less
    assert choice.state_bytes_before == choice.state_bytes_after
    rule = next(r for r in result.plan.rules if r.match == "head.weight")
    assert f"saves {format_bytes(less)};" in rule.reason
    assert settings(result)["mlp_up"] == "slimadam(axes=[1])"
    assert settings(result)["mlp_down"] == "adamw"
    text = render_recommendation(result)
    assert "weights save" in text
    assert format_bytes(less) in text
    assert "weights save" not in render_recommendation(recommend(scan(), 10**9, trace=trace))


def trace(plan: Plan) -> MemoryLedger:
    return ledger(plan_state(plan), plan.switches, "memadvise plan", SCRATCH)


def scan(switches: tuple[Switches, ...] = (Switches(),), *, probe: bool = True, saved: int = 300_000) -> Scan:
    measured = tuple(
        ParameterProbe(
            p.name, fidelity=tuple(FidelityValue(s.key, harm(p, s), 0.01) for s in means(p))
        )
        for p in PARAMETERS
    )  # fmt: skip
    return Scan(
        target="model.py",
        target_sha256=None,
        environment={},
        fingerprint="sha256:f",
        parameters=PARAMETERS,
        memory=(
            ledger(DENSE_STATE, optimizer="torch.optim.AdamW", scratch=WEIGHTS, saved=saved),
            *(ledger(DENSE_STATE, s, saved=saved) for s in switches),
        ),
        probe=ProbeLedger(2, (1,), 1e-3, (1.0,), measured, ()) if probe else None,
    )


def settings(result: Recommendation) -> dict[str, str]:
    return {choice.role: choice.setting_key for choice in result.groups}


def room(state: int) -> int:
    """The budget that leaves exactly ``state`` bytes for state in the step phase, scratch included."""
    return 2 * WEIGHTS + SCRATCH + state


def test_what_fits_needs_no_compression() -> None:
    result = recommend(scan(), 10**9, trace=trace)
    assert not result.needs_compression
    assert [(r.match, r.method) for r in result.plan.rules] == [("**", "adamw")]
    assert "nothing needs compressing" in result.explanation[0]
    assert result.plan.predicted_state_bytes == DENSE_STATE
    assert result.margin_bytes == 10**9 - result.after.peak_bytes


def test_the_least_sensitive_group_is_compressed_first() -> None:
    mean = state_bytes(Setting("slimadam", {"axes": [1]}), (ROWS, COLUMNS))
    one_pair_saved = DENSE_STATE - 2 * (DENSE_BYTES - mean)
    result = recommend(scan(), room(one_pair_saved), trace=trace)
    assert result.needs_compression
    assert settings(result) == {
        "mlp_up": "slimadam(axes=[1])", "mlp_down": "adamw", "head": "adamw", "norm": "adamw",
    }  # fmt: skip
    assert result.solver_note == "optimal"
    assert result.after.peak_bytes == result.budget_bytes  # the scratch was found by tracing, not guessed
    assert result.margin_bytes == 0
    assert result.plan.predicted_peak_bytes == result.after.peak_bytes
    assert result.plan.predicted_state_bytes == plan_state(result.plan) == one_pair_saved


def test_one_byte_less_compresses_the_next_group() -> None:
    mean = state_bytes(Setting("slimadam", {"axes": [1]}), (ROWS, COLUMNS))
    result = recommend(scan(), room(DENSE_STATE - 2 * (DENSE_BYTES - mean)) - 1, trace=trace)
    assert settings(result)["head"] == "adamw"
    assert result.after.peak_bytes <= result.budget_bytes


def test_time_is_spent_before_quality() -> None:
    # 2 MB of activations: half of them fit the budget with every state in full, so nothing is compressed.
    saved = 2_000_000
    big = scan((Switches(), Switches(2), Switches(1, ("h.*",)), Switches(2, ("h.*",))), saved=saved)

    def traced(plan: Plan) -> MemoryLedger:
        return ledger(plan_state(plan), plan.switches, "memadvise plan", SCRATCH, saved)

    budget = WEIGHTS + DENSE_STATE + saved // 2
    assert budget >= room(DENSE_STATE)
    result = recommend(big, budget, trace=traced)
    assert result.plan.switches == Switches(2)  # two micro-batches are the cheapest that fit
    assert {c.setting_key for c in result.groups} == {"adamw"}
    assert any("split_batch" in line for line in result.explanation)
    tight = recommend(big, budget - saved // 8 - 1, trace=traced)
    assert tight.plan.switches.checkpoint == ("h.*",)
    assert {c.setting_key for c in tight.groups} == {"adamw"}


def test_infeasible_names_the_smallest_peak_and_what_dominates() -> None:
    with pytest.raises(Infeasible) as caught:
        recommend(scan((Switches(), Switches(1, ("h.*",)))), 300_000, trace=trace)
    assert caught.value.exit_code == 1
    text = str(caught.value)
    assert "smallest reachable peak" in text
    assert "gradients" in text
    assert "hint" in text
    smallest = int("".join(ch for ch in (caught.value.hint or "").split("to ")[1].split(" ")[0] if ch.isdigit()))
    fits = recommend(scan((Switches(), Switches(1, ("h.*",)))), smallest, trace=trace)
    assert fits.after.peak_bytes == smallest  # scratch included: it was traced
    with pytest.raises(Infeasible):
        recommend(scan((Switches(), Switches(1, ("h.*",)))), smallest - 1, trace=trace)


def test_the_smallest_plan_is_tried_when_other_plans_have_more_scratch() -> None:
    """Scratch that only plans with something left in full have must not rule out the plan without."""

    def traced(plan: Plan) -> MemoryLedger:
        state = plan_state(plan)
        return ledger(state, plan.switches, "memadvise plan", SCRATCH if state == LEAST_STATE else 20 * SCRATCH)

    result = recommend(scan(), room(LEAST_STATE), trace=traced)
    assert result.plan.predicted_state_bytes == LEAST_STATE
    assert result.margin_bytes == 0


def test_nothing_needs_compressing_where_only_the_engine_fits() -> None:
    """torch's AdamW needs temporaries that memadvise's does not: the plan is AdamW in full, and the text says why."""
    result = recommend(scan(), room(DENSE_STATE), trace=trace)
    assert result.before.peak_bytes > result.budget_bytes
    assert not result.needs_compression
    assert "nothing needs compressing: AdamW in full, run by memadvise" in result.explanation[0]
    assert "over the budget" in result.explanation[1]


def test_a_pinned_plan_of_what_fits_anyway_is_not_said_to_be_over_the_budget() -> None:
    result = recommend(scan(), 10**9, trace=trace, pins=[("head.weight", Setting("lion"))])
    assert "within the budget" in result.explanation[0]
    assert not any("over the budget" in line for line in result.explanation)


def test_state_of_float64_parameters_is_float64() -> None:
    double = tuple(replace(p, dtype="float64", num_bytes=2 * p.num_bytes) for p in PARAMETERS)
    result = recommend(replace(scan(), parameters=double), 10**9, trace=trace)
    assert sum(choice.state_bytes_before for choice in result.groups) == 2 * DENSE_STATE - 4 * len(double)  # step


def test_narrow_parameters_that_fit_only_with_narrow_state_are_told_so() -> None:
    narrow = tuple(replace(p, dtype="bfloat16") for p in PARAMETERS)
    mine = scan()
    fits = ledger(DENSE_STATE // 2, optimizer="torch.optim.AdamW")
    mine = replace(mine, parameters=narrow, memory=(fits, *mine.memory[1:]))
    result = recommend(mine, room(DENSE_STATE) - 1, trace=trace)
    assert result.needs_compression
    assert "within the budget" in result.explanation[0]
    assert "bfloat16 parameters memadvise keeps state in float32" in result.explanation[1]


def test_where_no_plan_fits_but_plain_adamw_does_the_hint_says_so() -> None:
    mine = scan()
    fits = ledger(LEAST_STATE // 4, optimizer="torch.optim.AdamW")
    with pytest.raises(Infeasible, match=r"AdamW as it stands peaks at .* and fits: train with that"):
        recommend(replace(mine, memory=(fits, *mine.memory[1:])), fits.peak_bytes, trace=trace)


def test_a_parameter_without_a_gradient_has_no_state_and_does_not_hold_others_back() -> None:
    """Where the trace shows a module without a byte of state, the bytes and the harm of its parameters are nothing."""
    mine = scan()
    assert mine.probe is not None
    by_module = {p.module: {"weights": p.num_bytes, "optimizer_state": 1} for p in PARAMETERS}
    by_module["h.1.up.weight"] = {"weights": WEIGHT}
    probes = tuple(
        replace(p, fidelity=(), unknown="never received a gradient") if p.name == "h.1.up.weight" else p
        for p in mine.probe.parameters
    )
    engine = replace(ledger(DENSE_STATE - DENSE_BYTES), by_module=by_module)
    mine = replace(mine, memory=(mine.memory[0], engine), probe=replace(mine.probe, parameters=probes))

    def traced(plan: Plan) -> MemoryLedger:
        idle = next(r for r in plan.rules if matches(r.match, "h.1.up.weight"))
        state = plan_state(plan) - state_bytes(Setting(idle.method, idle.options), (ROWS, COLUMNS))
        return ledger(state, plan.switches, "memadvise plan", SCRATCH)

    mean = state_bytes(Setting("slimadam", {"axes": [1]}), (ROWS, COLUMNS))
    one_saved = DENSE_STATE - DENSE_BYTES - (DENSE_BYTES - mean)
    result = recommend(mine, room(one_saved), trace=traced)
    assert settings(result)["mlp_up"] == "slimadam(axes=[1])"  # still the least sensitive, and one is enough
    assert settings(result)["mlp_down"] == "adamw"
    assert result.plan.predicted_state_bytes == one_saved
    assert sum(choice.state_bytes_after for choice in result.groups) == one_saved


def test_unmeasured_parameters_are_compressed_last_and_say_so() -> None:
    base = scan()
    assert base.probe is not None
    probes = tuple(
        replace(p, fidelity=(), unknown="out of memory") if ".up." in p.name else p for p in base.probe.parameters
    )
    partial = replace(base, probe=replace(base.probe, parameters=probes))
    mean = state_bytes(Setting("slimadam", {"axes": [1]}), (ROWS, COLUMNS))
    result = recommend(partial, room(DENSE_STATE - 2 * (DENSE_BYTES - mean)), trace=trace)
    assert settings(result)["mlp_up"] == "adamw"
    assert settings(result)["mlp_down"] == "slimadam(axes=[1])"
    everything = recommend(partial, room(DENSE_STATE - 5 * (DENSE_BYTES - mean)), trace=trace)
    unmeasured = next(c for c in everything.groups if c.role == "mlp_up")
    assert unmeasured.setting_key == "slimadam(axes=[1])"  # one value a row, the surest mean
    assert unmeasured.expected_harm is None
    assert "out of memory" in unmeasured.reason


def test_without_a_probe_rows_are_averaged_and_the_confidence_is_lower() -> None:
    mean = state_bytes(Setting("slimadam", {"axes": [1]}), (ROWS, COLUMNS))
    result = recommend(scan(probe=False), room(DENSE_STATE - 5 * (DENSE_BYTES - mean)), trace=trace)
    assert settings(result)["mlp_up"] == "slimadam(axes=[1])"
    assert result.confidence == "medium"
    assert any("one level lower, for some scores are priors" in line for line in result.explanation)
    assert all(c.expected_harm is None for c in result.groups if c.setting_key != "adamw")
    assert any("no probe" in c.reason for c in result.groups)


def test_without_a_probe_the_head_is_compressed_last() -> None:
    mean = state_bytes(Setting("slimadam", {"axes": [1]}), (ROWS, COLUMNS))
    result = recommend(scan(probe=False), room(DENSE_STATE - 4 * (DENSE_BYTES - mean)), trace=trace)
    assert settings(result)["head"] == "adamw"
    assert settings(result)["mlp_up"] != "adamw"
    assert settings(result)["mlp_down"] != "adamw"


def test_pins_and_prohibitions() -> None:
    result = recommend(scan(), 10**9, trace=trace, pins=[("h.0.**", Setting("lion"))])
    assert {r.match: r.method for r in result.plan.rules} == {
        "h.0.up.weight": "lion",
        "h.0.down.weight": "lion",
        "**": "adamw",
    }
    with pytest.raises(Infeasible):
        recommend(scan(), room(DENSE_STATE) - 1, trace=trace, forbidden=[*ONLY_MEANS, "slimadam"])
    with pytest.raises(UsageError, match="matches no trainable parameter"):
        recommend(scan(), 10**9, trace=trace, pins=[("nothing.*", Setting("lion"))])
    with pytest.raises(UsageError, match="cannot be forbidden"):
        recommend(scan(), 10**9, trace=trace, forbidden=["adamw"])
    with pytest.raises(MemadviseError, match="slimadam"):
        recommend(scan(), 10**9, trace=trace, forbidden=["slimadm"])
    with pytest.raises(MemadviseError, match=r"norm\.weight"):
        recommend(scan(), 10**9, trace=trace, pins=[("norm.*", Setting("slimadam", {"axes": [1]}))])


def test_patterns_never_reach_into_another_decision() -> None:
    names = [("0.weight", "mlp_up"), ("2.weight", "mlp_down"), ("4.weight", "mlp_up")]
    parameters = tuple(matrix(name, role) for name, role in names)
    measured = tuple(
        ParameterProbe(p.name, fidelity=tuple(FidelityValue(s.key, harm(p, s), 0.0) for s in means(p)))
        for p in parameters
    )
    mine = replace(scan(), parameters=parameters, probe=ProbeLedger(2, (1,), 1e-3, (1.0,), measured, ()))

    def traced(plan: Plan) -> MemoryLedger:
        return ledger(plan.predicted_state_bytes or 0, plan.switches)

    mean = state_bytes(Setting("slimadam", {"axes": [1]}), (ROWS, COLUMNS))
    result = recommend(mine, 2 * WEIGHTS + DENSE_BYTES + 2 * mean, trace=traced)
    assert [r.match for r in result.plan.rules] == ["0.weight", "4.weight", "**"]  # *.weight would take 2.weight, too
    assert result.plan.model is not None
    assert result.plan.model.shapes == {"*.weight": (ROWS, COLUMNS)}


def test_a_trace_that_never_fits_ends() -> None:
    def growing(plan: Plan) -> MemoryLedger:
        return ledger(plan_state(plan) + 50_000_000, plan.switches)

    tracer: Callable[[Plan], MemoryLedger] = growing
    with pytest.raises(Infeasible):
        recommend(scan(), room(DENSE_STATE) - 1, trace=tracer)
