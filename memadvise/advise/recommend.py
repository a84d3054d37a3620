"""From a scan and a budget to a plan: switches outside, knapsack inside, the peak traced again at the end.

A state's bytes are alive from the first step on, in every phase. So for one combination of switches the peak of a plan
is the largest over the phases of (that phase's bytes without optimizer state) + (the plan's state); the knapsack gets
what the budget leaves. The plan found is then traced as it will run, and the room for state shrinks by what the trace
shows beyond the arithmetic (scratch, rounding) until the traced peak fits. Before a budget is called too small, the
smallest plan of all is traced: its peak is what the answer names, so a budget of that size has a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memadvise.advise.candidates import DENSE, Group, candidate_settings, make_groups
from memadvise.advise.harm import Harm, HarmTable
from memadvise.advise.solver import Option, Solution, solve
from memadvise.errors import Infeasible, UsageError
from memadvise.ledger import MemoryLedger, Parameter, Scan
from memadvise.names import glob_escape, matches, shared_patterns
from memadvise.optim.registry import method_info, state_bytes, validate, weight_bytes
from memadvise.plan.schema import ModelShape, Plan, Rule, Setting, Switches
from memadvise.units import format_bytes

ENGINE_ADAMW = "memadvise adamw"  # the label of ledgers traced with our engine, one per combination of switches
_MAX_TRACES = 5

Tracer = Callable[[Plan], MemoryLedger]


@dataclass(frozen=True)
class GroupChoice:
    """One row of the advice; ``expected_harm`` in Adam's metric, None where it could not be measured."""

    pattern: str
    role: str
    count: int
    setting_key: str
    state_bytes_before: int
    state_bytes_after: int
    expected_harm: float | None
    reason: str
    weight_bytes_saved: int = 0


@dataclass(frozen=True)
class Recommendation:
    """What was chosen and why. ``after`` is the traced ledger of the plan itself."""

    plan: Plan
    needs_compression: bool
    before: MemoryLedger
    after: MemoryLedger
    budget_bytes: int
    margin_bytes: int
    groups: tuple[GroupChoice, ...]
    solver_note: str
    explanation: tuple[str, ...]


@dataclass(frozen=True)
class _Choice:
    """One combination of switches with the best settings found for it."""

    ledger: MemoryLedger
    solution: Solution
    switches: Switches


def recommend(
    scan: Scan,
    budget_bytes: int,
    *,
    trace: Tracer,
    pins: Sequence[tuple[str, Setting]] = (),
    forbidden: Sequence[str] = (),
) -> Recommendation:
    """The least harmful plan whose peak fits ``budget_bytes``.

    Args:
        scan: what was traced and measured.
        budget_bytes: limit on the peak of the whole step.
        trace: traces the target again with a given plan; the plan's peak is what this says.
        pins: (glob, setting) pairs the user decided; the first match wins.
        forbidden: methods never to choose.

    Raises:
        Infeasible: nothing fits; names the smallest reachable peak and what dominates it.
        UsageError: a pin that matches nothing or a setting that does not fit its tensor.
    """
    before = scan.memory[0]
    groups = make_groups(scan.parameters, _settings_under(scan.parameters, pins, forbidden))
    sizes = _StateSizes(scan)
    if before.peak_bytes <= budget_bytes and not pins:
        dense = [DENSE] * len(groups)
        plan = _plan(scan, groups, dense, Switches(), budget_bytes, ["fits as it is"] * len(groups), sizes)
        after = trace(plan)
        if after.peak_bytes <= budget_bytes:
            note = "nothing to optimise"
            return _finished(scan, plan, after, budget_bytes, groups, sizes, None, note, needs_compression=False)
    table = HarmTable(scan.probe)
    worst = table.worst_per_element(groups)
    harms = [[table.of(sizes.holders(group), setting, worst) for setting in group.settings] for group in groups]
    options = [
        [Option(sizes.of(group, setting), harm.value) for setting, harm in zip(group.settings, row, strict=True)]
        for group, row in zip(groups, harms, strict=True)
    ]

    def tried(choice: _Choice) -> tuple[MemoryLedger, Callable[[], Recommendation]]:
        """The traced ledger of a choice, and the recommendation to give if it fits."""
        picked = [g.settings[o] for g, o in zip(groups, choice.solution.choice, strict=True)]
        reasons = [row[o].reason for row, o in zip(harms, choice.solution.choice, strict=True)]
        plan = _plan(scan, groups, picked, choice.switches, budget_bytes, reasons, sizes)
        after = trace(plan)
        needed = any(s != DENSE for s in picked) or choice.switches != Switches()
        return after, lambda: _finished(
            scan, plan, after, budget_bytes, groups, sizes, (harms, choice.solution), choice.solution.note,
            needs_compression=needed,
        )  # fmt: skip

    # What pins take off the weights is room for state in every phase.
    lighter = sum(min(sizes.weights_saved(group, setting) for setting in group.settings) for group in groups)
    room_lost: dict[int, int] = {}  # per combination of switches: bytes the traces showed beyond the arithmetic
    for _ in range(_MAX_TRACES * max(1, len(scan.memory))):
        choice = _best(scan, options, budget_bytes + lighter, room_lost)
        if choice is None:
            break
        after, result = tried(choice)
        if after.peak_bytes <= budget_bytes:
            return result()
        index = scan.memory.index(choice.ledger)
        # What this trace shows beyond the arithmetic; the next state is smaller than this one, so the loop ends.
        expected = fixed_peak_bytes(choice.ledger) - lighter + choice.solution.num_bytes
        room_lost[index] = after.peak_bytes - expected
    smallest = _smallest(scan, options)
    after, result = tried(smallest)
    if after.peak_bytes <= budget_bytes:
        return result()
    raise _infeasible(before, after, smallest.switches, budget_bytes)


def _settings_under(
    parameters: Sequence[Parameter], pins: Sequence[tuple[str, Setting]], forbidden: Sequence[str]
) -> Callable[[Parameter], tuple[Setting, ...]]:
    """Candidates after the user's pins and prohibitions, checked."""
    for method in forbidden:
        if method_info(method).name == DENSE.method:
            raise UsageError("adamw cannot be forbidden: vectors and tiny tensors always keep their full state")
    names = {p.name: p for p in parameters if p.trainable}
    for pattern, setting in pins:
        hits = [p for name, p in names.items() if matches(pattern, name)]
        if not hits:
            raise UsageError(
                f"the pin '{pattern}' matches no trainable parameter", hint="the names are those of the scan"
            )
        for parameter in hits:
            validate(setting, parameter.shape, name=parameter.name)

    def settings_of(parameter: Parameter) -> tuple[Setting, ...]:
        for pattern, setting in pins:
            if matches(pattern, parameter.name):
                return (setting,)
        return tuple(s for s in candidate_settings(parameter) if s.method not in forbidden)

    return settings_of


class _StateSizes:
    """Bytes of optimizer state by group and setting; a parameter that no gradient reaches never gets any state.

    Which those are is seen in the trace of AdamW by memadvise's engine: modules without a byte of state.
    """

    def __init__(self, scan: Scan) -> None:
        traced = next((ledger for ledger in scan.memory if ledger.optimizer == ENGINE_ADAMW), None)
        self._idle: frozenset[str] = frozenset()
        if traced is not None:
            self._idle = frozenset(
                p.name
                for p in scan.parameters
                if p.module in traced.by_module and not traced.by_module[p.module].get("optimizer_state")
            )

    def holders(self, group: Group) -> Group:
        """The group without the parameters that never hold state; it may be empty."""
        return replace(group, members=tuple(m for m in group.members if m.name not in self._idle))

    @staticmethod
    def weights_saved(group: Group, setting: Setting) -> int:
        """What ``setting`` takes off the weights themselves: something for int8 alone."""
        dtype = _dtype(group.members[0].dtype)
        each = weight_bytes(DENSE, group.shape, dtype) - weight_bytes(setting, group.shape, dtype)
        return each * len(group.members)

    def of(self, group: Group, setting: Setting) -> int:
        members = self.holders(group).members
        return state_bytes(setting, group.shape, _dtype(members[0].dtype)) * len(members) if members else 0


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def switches_of(ledger: MemoryLedger) -> Switches:
    """The switches a ledger was traced under."""
    return Switches(micro_batches=ledger.micro_batches, checkpoint=ledger.checkpoint)


def _time_rank(switches: Switches) -> tuple[int, int]:
    """Cheapest in time first: nothing, then micro-batches, then a second forward pass, then both."""
    return (1 if switches.checkpoint else 0, switches.micro_batches)


def fixed_peak_bytes(ledger: MemoryLedger) -> int:
    """The largest phase peak without the optimizer's state: what no choice of methods can remove."""
    return max(p.peak_bytes - p.by_category.get("optimizer_state", 0) for p in ledger.phases)


def _best(scan: Scan, options: list[list[Option]], budget: int, room_lost: Mapping[int, int]) -> _Choice | None:
    """Least harm over the combinations of switches; of equal harm, what costs the least time."""
    best: _Choice | None = None
    for index, ledger in enumerate(scan.memory):
        if ledger.optimizer != ENGINE_ADAMW:
            continue
        room = budget - fixed_peak_bytes(ledger) - room_lost.get(index, 0)
        solution = solve(options, room)
        if solution is None:
            continue
        switches = switches_of(ledger)
        rank = (solution.harm, _time_rank(switches))
        if best is None or rank < (best.solution.harm, _time_rank(best.switches)):
            best = _Choice(ledger, solution, switches)
    return best


def _smallest(scan: Scan, options: list[list[Option]]) -> _Choice:
    """The least state under the switches that leave the least beside it."""
    picked = [min(range(len(row)), key=lambda o, row=row: (row[o].num_bytes, row[o].harm)) for row in options]  # type: ignore[misc]
    chosen = [row[o] for row, o in zip(options, picked, strict=True)]
    harm = sum(option.harm for option in chosen)
    solution = Solution(tuple(picked), sum(option.num_bytes for option in chosen), harm, harm, True)
    engine = [ledger for ledger in scan.memory if ledger.optimizer == ENGINE_ADAMW] or [scan.memory[0]]
    ledger = min(engine, key=lambda ledger: (fixed_peak_bytes(ledger), _time_rank(switches_of(ledger))))
    return _Choice(ledger, solution, switches_of(ledger))


def _plan(
    scan: Scan,
    groups: Sequence[Group],
    picked: Sequence[Setting],
    switches: Switches,
    budget: int,
    reasons: Sequence[str],
    sizes: _StateSizes,
) -> Plan:
    """Rules for every parameter: one a pattern where the pattern is unambiguous, ``**`` for what stays dense."""
    setting_of = {m.name: s.key for g, s in zip(groups, picked, strict=True) for m in g.members}
    rules: list[Rule] = []
    for group, setting, reason in zip(groups, picked, reasons, strict=True):
        if setting == DENSE:
            continue
        saved = sizes.of(group, DENSE) - sizes.of(group, setting) + sizes.weights_saved(group, setting)
        text = f"{group.role} {list(group.shape)} x {len(group.members)}: saves {format_bytes(saved)}; {reason}"
        for match in _matching((m.name for m in group.members), setting_of):
            rules.append(Rule(match, setting.method, dict(setting.options), reason=text))
            text = "as above"
    if any(setting == DENSE for setting in picked):
        rest = "everything else keeps both moments in full" if rules else "every parameter keeps both moments in full"
        rules.append(Rule("**", DENSE.method, reason=rest))
    trainable = [p for p in scan.parameters if p.trainable]
    shape_of = {p.name: p.shape for p in trainable}
    shapes = {
        pattern: shape
        for shape in dict.fromkeys(shape_of.values())
        for pattern in _matching((name for name, s in shape_of.items() if s == shape), shape_of)
    }
    return Plan(
        rules=tuple(rules),
        switches=switches,
        model=ModelShape(scan.fingerprint, sum(p.numel for p in trainable), shapes),
        budget_bytes=budget,
        predicted_state_bytes=sum(sizes.of(g, s) for g, s in zip(groups, picked, strict=True)),
        device=scan.memory[0].device,
    )


def _matching(names: Iterable[str], value_of: Mapping[str, object]) -> list[str]:
    """Patterns for ``names``, which all have one value, that match no parameter of another value."""
    patterns: list[str] = []
    for pattern, members in shared_patterns(names).items():
        pure = len({value for name, value in value_of.items() if matches(pattern, name)}) == 1
        patterns += [pattern] if pure else [glob_escape(name) for name in members]
    return patterns


def _finished(
    scan: Scan,
    plan: Plan,
    after: MemoryLedger,
    budget: int,
    groups: Sequence[Group],
    sizes: _StateSizes,
    solved: tuple[list[list[Harm]], Solution] | None,
    note: str,
    *,
    needs_compression: bool,
) -> Recommendation:
    before = scan.memory[0]
    rows = []
    for index, group in enumerate(groups):
        option = solved[1].choice[index] if solved else 0
        harm = solved[0][index][option] if solved else Harm(0.0, True, "fits as it is")
        setting = group.settings[option] if solved else DENSE
        rows.append(
            GroupChoice(
                pattern=group.label,
                role=group.role,
                count=len(group.members),
                setting_key=setting.key,
                state_bytes_before=sizes.of(group, DENSE),
                state_bytes_after=sizes.of(group, setting),
                expected_harm=harm.value if harm.measured else None,
                reason=harm.reason,
                weight_bytes_saved=sizes.weights_saved(group, setting),
            )
        )
    explanation = tuple(_explain(scan, after, plan, budget, needs_compression))
    plan = replace(
        plan, predicted_peak_bytes=after.peak_bytes, predicted_state_bytes=after.state_bytes, notes=explanation
    )
    return Recommendation(
        plan, needs_compression, before, after, budget, budget - after.peak_bytes, tuple(rows), note, explanation
    )


def _explain(scan: Scan, after: MemoryLedger, plan: Plan, budget: int, needed: bool) -> list[str]:
    before = scan.memory[0]
    over = before.peak_bytes - budget
    as_it_stands = (
        f"{before.optimizer} as it stands peaks at {format_bytes(before.peak_bytes)} in the {before.peak_phase} phase, "
        + (f"{format_bytes(over)} over the budget" if over > 0 else f"within the budget of {format_bytes(budget)}")
    )
    if not needed:
        return [
            f"nothing needs compressing: AdamW in full, run by memadvise, peaks at {format_bytes(after.peak_bytes)} in "
            f"the {after.peak_phase} phase, within the budget of {format_bytes(budget)}",
            as_it_stands,
        ]
    lines = [as_it_stands]
    narrow = sorted({p.dtype for p in scan.parameters if p.trainable} & {"bfloat16", "float16"})
    if over <= 0 and narrow:
        lines.append(
            f"a plan needs more than that: for {' and '.join(narrow)} parameters memadvise keeps state in float32, "
            "torch.optim.AdamW in their own precision"
        )
    lines.append(
        f"the plan peaks at {format_bytes(after.peak_bytes)} in the {after.peak_phase} phase; optimizer state "
        f"{format_bytes(before.state_bytes)} -> {format_bytes(after.state_bytes)}"
    )
    if plan.switches.checkpoint:
        lines.append(
            f"activations of {', '.join(plan.switches.checkpoint)} are recomputed (checkpointing): about one more "
            "forward pass a step, the same gradients; call memadvise.apply_checkpoint(model, plan.switches.checkpoint)"
        )
    if plan.switches.micro_batches > 1:
        checked = "checked" if scan.probe else "not checked without a probe"
        lines.append(
            f"each batch runs as {plan.switches.micro_batches} micro-batches with accumulated gradients, the same "
            f"gradient where the loss is a mean over samples ({checked}); "
            "use memadvise.split_batch(batch, plan.switches.micro_batches)"
        )
    return lines


def _infeasible(before: MemoryLedger, smallest: MemoryLedger, switches: Switches, budget: int) -> Infeasible:
    """Name the smallest peak that the advisor's candidates reach, what dominates it, and the way out."""
    largest = sorted(smallest.by_category.items(), key=lambda item: -item[1])[:3]
    how = [f"checkpointing {', '.join(switches.checkpoint)}"] if switches.checkpoint else []
    how += [f"{switches.micro_batches} micro-batches"] if switches.micro_batches > 1 else []
    hint = (
        f"raise the budget to {smallest.peak_bytes} bytes or more, use a smaller batch, or state in 8 bits, which the "
        "advisor does not weigh yet: --pin 'PATTERN=adamw(first_moment=dynamic8, second_moment=dynamic8)'"
    )
    if before.peak_bytes <= budget:  # its state has the parameters' own, narrower dtype
        hint = (
            f"{before.optimizer} as it stands peaks at {format_bytes(before.peak_bytes)} and fits: train with that, or "
            f"raise the budget to {smallest.peak_bytes} bytes or more"
        )
    return Infeasible(
        f"no plan fits {format_bytes(budget)}: the smallest reachable peak is {format_bytes(smallest.peak_bytes)}"
        f" ({' and '.join(how) or 'no switch helps'}; candidates: adamw, slimadam, adam_mini), in the "
        f"{smallest.peak_phase} phase, dominated by "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in largest),
        hint=hint,
    )
