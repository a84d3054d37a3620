"""From a scan and a budget to a plan: the ladder chooses, the peak is traced again at the end.

A state's bytes are alive from the first step on, in every phase. So for one combination of switches the peak of a plan
is the largest over the phases of (that phase's bytes without optimizer state) + (the plan's state); the knapsack gets
what the budget leaves. The plan found is then traced as it will run, and the room for state shrinks by what the trace
shows beyond the arithmetic (scratch, rounding) until the traced peak fits. Before a budget is called too small, the
smallest plan of all is traced: its peak is what the answer names, so a budget of that size has a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from memadvise.advise.candidates import Group, candidate_settings, confidence, make_groups, tier
from memadvise.advise.choose import OBJECTIVES, Choice, Chosen, Ladder, Priced, Row, fixed_peak_bytes
from memadvise.advise.drafting import draft_plan, reasons, runners_up
from memadvise.advise.explain import confidence_of, explain, infeasible, optimizer_time, plan_confidence
from memadvise.advise.harm import HarmTable
from memadvise.advise.profile import Profile, relative_depths
from memadvise.advise.rules import DENSE, broken_rules, check_names, codecs_of
from memadvise.advise.sizes import ENGINE_ADAMW as ENGINE_ADAMW  # of the public names here
from memadvise.advise.sizes import StateSizes
from memadvise.advise.statistics import narrowed
from memadvise.advise.weight_forms import NarrowWeights, weight_ladders
from memadvise.errors import OptimizerError, UsageError
from memadvise.ledger import MemoryLedger, Parameter, Scan
from memadvise.names import matches
from memadvise.optim.codecs.table import CODECS
from memadvise.optim.registry import method_info, validate
from memadvise.optim.step_costs import step_cost
from memadvise.plan.schema import Plan, Setting, Switches

_MAX_TRACES = 5
_CHUNKED_CODECS = frozenset({"dynamic8", "int4"})
_CODECS = frozenset(CODECS)

Tracer = Callable[[Plan], MemoryLedger]


@dataclass(frozen=True)
class Wishes:
    """What the user decided.

    Args:
        pins: (glob, setting) pairs; the first match wins.
        forbidden: methods and codecs never to choose.
        allowed: hard rules set aside.
        objective: "quality", or "speed" within the same level of confidence.
    """

    pins: tuple[tuple[str, Setting], ...] = ()
    forbidden: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    objective: str = "quality"


@dataclass(frozen=True)
class GroupChoice:
    """One row of the advice.

    ``expected_harm``: the score in the metric of its tier (see :mod:`memadvise.advise.harm`), None where not measured;
    it ranks, it is no loss. ``confidence`` and ``runners_up`` in words; ``broken_rules``: names of hard rules.
    """

    pattern: str
    role: str
    count: int
    setting_key: str
    state_bytes_before: int
    state_bytes_after: int
    expected_harm: float | None
    reason: str
    weight_bytes_saved: int = 0
    confidence: str = "high"
    runners_up: tuple[str, ...] = ()
    lr_factor: float = 1.0
    broken_rules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recommendation:
    """What was chosen and why. ``after`` is the traced ledger of the plan itself.

    ``optimizer_time``: of the optimizer step, over AdamW's (a CPU's ratio, see :mod:`memadvise.optim.step_costs`).
    """

    plan: Plan
    needs_compression: bool
    before: MemoryLedger
    after: MemoryLedger
    budget_bytes: int
    margin_bytes: int
    groups: tuple[GroupChoice, ...]
    solver_note: str
    explanation: tuple[str, ...]
    confidence: str = "high"
    optimizer_time: float = 1.0


def recommend(
    scan: Scan,
    budget_bytes: int,
    *,
    trace: Tracer,
    wishes: Wishes = Wishes(),
    profile: Profile | None = None,
) -> Recommendation:
    """The plan of the surest kind whose peak fits ``budget_bytes``, and of that kind the least harmful.

    Args:
        scan: what was traced and measured.
        budget_bytes: limit on the peak of the whole step.
        trace: traces the target again with a given plan; the plan's peak is what this says.
        wishes: the user's pins, prohibitions, rules set aside, and objective.
        profile: scores of other models, for tensors that the scan did not measure.

    Raises:
        Infeasible: nothing fits; names the smallest reachable peak and what dominates it.
        UsageError: a pin that matches nothing, a setting that does not fit its tensor, an unknown rule or method.
    """
    return Advisor(scan, trace=trace, wishes=wishes, profile=profile).recommend(budget_bytes)


class Advisor:
    """A scan with everything priced, for one budget or many; arguments as of :func:`recommend`."""

    def __init__(self, scan: Scan, *, trace: Tracer, wishes: Wishes = Wishes(), profile: Profile | None = None) -> None:
        if wishes.objective not in OBJECTIVES:
            raise UsageError(f"there is no objective '{wishes.objective}'", hint=f"one of: {', '.join(OBJECTIVES)}")
        self._scan, self._trace, self._wishes = scan, trace, wishes
        self._sizes = StateSizes(scan)
        self._known: dict[str, MemoryLedger] = {}  # traces by rules and switches
        settings_of = _settings_under(scan.parameters, wishes)
        probes = {p.name: p for p in scan.probe.parameters} if scan.probe else {}
        groups = tuple(narrowed(group, probes) for group in make_groups(scan.parameters, settings_of))
        self._table = HarmTable(scan.probe, profile, relative_depths(scan.parameters))
        self._table.learn_worst(groups)
        self._pinned = frozenset(
            p.name for p in scan.parameters if any(matches(pattern, p.name) for pattern, _ in wishes.pins)
        )
        rows = [Row(group, self.price(group)) for group in groups]
        engine = [ledger for ledger in scan.memory if ledger.optimizer == ENGINE_ADAMW and not ledger.weights] or [
            scan.memory[0]
        ]
        self._ladder = Ladder(engine, rows, self.price, wishes.objective)
        # Codecs are decoded in pieces of a few MB, some in larger ones: where those do not fit, less of the kind may.
        self._ladders = (self._ladder, *(self._without(codecs, rows, engine) for codecs in (_CHUNKED_CODECS, _CODECS)))

    def _without(self, codecs: frozenset[str], rows: Sequence[Row], ledgers: Sequence[MemoryLedger]) -> Ladder:
        """The ladder without these codecs, but where a pin has one."""

        def kept(options: tuple[Priced, ...]) -> tuple[Priced, ...]:
            return tuple(o for o in options if codecs.isdisjoint(codecs_of(o.setting).values())) or options

        def price(group: Group) -> tuple[Priced, ...]:
            return kept(self.price(group))

        fewer = [Row(row.group, kept(row.options)) for row in rows]
        return Ladder(ledgers, fewer, price, self._wishes.objective)

    def recommend(self, budget_bytes: int) -> Recommendation:
        """See :func:`recommend`."""
        return self.finished(*self.found(budget_bytes), budget_bytes)

    def found(self, budget_bytes: int) -> tuple[Choice, Plan, MemoryLedger]:
        """The ladder's choice for a budget, its plan, and that plan's trace; errors as of :func:`recommend`."""
        ladder, before = self._ladder, self._scan.memory[0]
        if before.peak_bytes <= budget_bytes and not self._wishes.pins:
            dense = replace(ladder.dense(), switches=Switches())
            plan, after = self.traced(dense, budget_bytes)
            if after.peak_bytes <= budget_bytes:
                return dense, plan, after
        narrow: list[NarrowWeights] = []
        for candidates, lost, momentum in self._stages(narrow):
            if found := self._search(candidates, budget_bytes, lost, momentum):
                return found
        smallest, plan, after = self._smallest(narrow, budget_bytes)
        if after.peak_bytes <= budget_bytes:
            return smallest, plan, after
        raise infeasible(before, after, smallest, budget_bytes)

    def smallest_peak(self) -> int:
        """The traced peak of the smallest plan there is: no smaller budget has one."""
        narrow: list[NarrowWeights] = []
        for _ in self._stages(narrow):
            pass
        return self._smallest(narrow, None)[2].peak_bytes

    def _smallest(self, narrow: Sequence[NarrowWeights], budget: int | None) -> tuple[Choice, Plan, MemoryLedger]:
        smallest = self._ladder.smallest()
        least = fixed_peak_bytes(smallest.ledger) + smallest.num_bytes
        for weights in narrow:
            other = weights.ladder.smallest()
            if weights.arithmetic_peak(other) < least:
                smallest, least = other, weights.arithmetic_peak(other)
        return smallest, *self.traced(smallest, budget)

    def _stages(self, narrow: list[NarrowWeights]) -> Iterator[tuple[Ladder, int, bool]]:
        """What is tried one after the other: (ladder, bytes lost beforehand, whether all keep the momentum).

        ``narrow`` is filled with the ladders of narrower weights, once they are needed.
        """
        for ladder in self._ladders:
            yield ladder, 0, True
        dense_bytes = sum(self._sizes.of(row.group, row.options[0].setting) for row in self._ladder.rows)
        for weights in weight_ladders(
            self._ladder, self._scan.parameters, dense_bytes, lambda c: self.traced(c, None)[1], self._wishes.forbidden
        ):
            narrow.append(weights)
            yield weights.ladder, weights.extra_bytes, True
        for ladder in self._ladders:
            yield ladder, 0, False
        for weights in narrow:
            yield weights.ladder, weights.extra_bytes, False

    def for_state(self, state_bytes: int) -> Plan | None:
        """The plan for a limit on the optimizer state alone, without switches and untraced; None when nothing fits."""
        choice = self.within(state_bytes)
        return None if choice is None else self.drafted(choice, None)

    def within(self, state_bytes: int) -> Choice | None:
        """The choice for a limit on the optimizer state alone, without switches; None when nothing fits."""
        choice = self._ladder.within(state_bytes)
        return None if choice is None else replace(choice, switches=Switches())

    def drafted(self, choice: Choice, budget: int | None) -> Plan:
        """The plan of a choice, untraced."""
        return draft_plan(self._scan, choice.chosen, choice.switches, budget, self._sizes, self._pinned)

    def may_be(self, group: Group, setting: Setting) -> bool:
        """Whether neither a hard rule nor the user's wishes keep ``setting`` from the group; it must fit the shape."""
        member = group.members[0]
        free = member.name not in self._pinned and not _is_forbidden(setting, self._wishes.forbidden)
        return free and not broken_rules(member, setting, self._wishes.allowed)

    def _search(
        self, ladder: Ladder, budget: int, lost: int, momentum: bool
    ) -> tuple[Choice, Plan, MemoryLedger] | None:
        """The first choice of the ladder whose traced peak fits."""
        # Per combination of switches: bytes the traces showed beyond the arithmetic.
        room_lost = dict.fromkeys(range(len(ladder.ledgers)), lost)
        for _ in range(_MAX_TRACES * len(ladder.ledgers)):
            choice = ladder.best(budget, room_lost, momentum=momentum)
            if choice is None:
                return None
            plan, after = self.traced(choice, budget)
            if after.peak_bytes <= budget:
                return choice, plan, after
            # What this trace shows beyond the arithmetic; the next state is smaller than this one, so the loop ends.
            expected = fixed_peak_bytes(choice.ledger) + choice.num_bytes
            room_lost[ladder.ledgers.index(choice.ledger)] = after.peak_bytes - expected
        return None

    def price(self, group: Group) -> tuple[Priced, ...]:
        """Every setting of a group (or of a part of one) with its bytes, harm, tier, confidence and time."""
        held = self._sizes.holders(group)
        return tuple(
            Priced(
                setting=setting,
                num_bytes=self._sizes.of(group, setting) - self._sizes.weights_saved(group, setting),
                harm=self._table.of(held, setting),
                tier=tier(setting),
                confidence=confidence(group.members[0], setting),
                step_time=step_cost(setting) * sum(m.numel for m in group.members),
            )
            for setting in group.settings
        )

    def traced(self, choice: Choice, budget: int | None) -> tuple[Plan, MemoryLedger]:
        """The plan of a choice and its ledger."""
        plan = self.drafted(choice, budget)
        key = repr((plan.rules, plan.switches))
        if key not in self._known:
            self._known[key] = self._trace(plan)
        return plan, self._known[key]

    def finished(self, choice: Choice, plan: Plan, after: MemoryLedger, budget: int) -> Recommendation:
        """A traced choice with everything that is said of it."""
        notes = tuple(explain(self._scan, after, plan, budget, choice))
        plan = replace(
            plan, predicted_peak_bytes=after.peak_bytes, predicted_state_bytes=after.state_bytes, notes=notes
        )
        needed = any(c.priced.setting != DENSE for c in choice.chosen) or choice.switches != Switches()
        return Recommendation(
            plan=plan,
            needs_compression=needed,
            before=self._scan.memory[0],
            after=after,
            budget_bytes=budget,
            margin_bytes=budget - after.peak_bytes,
            groups=tuple(self._row(c) for c in choice.chosen),
            solver_note=choice.note,
            explanation=notes,
            confidence=plan_confidence(choice).words,
            optimizer_time=optimizer_time(choice.chosen),
        )

    def _row(self, choice: Chosen) -> GroupChoice:
        group, priced = choice.group, choice.priced
        return GroupChoice(
            pattern=group.label,
            role=group.role,
            count=len(group.members),
            setting_key=priced.setting.key,
            state_bytes_before=self._sizes.of(group, DENSE),
            state_bytes_after=self._sizes.of(group, priced.setting),
            expected_harm=priced.harm.value if priced.harm.measured else None,
            reason=reasons(choice, self._pinned)[0]
            if choice.group.members[0].name in self._pinned
            else priced.harm.reason,
            weight_bytes_saved=self._sizes.weights_saved(group, priced.setting),
            confidence=confidence_of(choice).words,
            runners_up=tuple(runners_up(choice)),
            lr_factor=priced.harm.lr_factor,
            broken_rules=tuple(rule.name for rule in broken_rules(group.members[0], priced.setting)),
        )


def _settings_under(parameters: Sequence[Parameter], wishes: Wishes) -> Callable[[Parameter], tuple[Setting, ...]]:
    """Candidates after the user's wishes, checked."""
    _check_forbidden(wishes.forbidden)
    allowed = check_names(wishes.allowed)
    names = {p.name: p for p in parameters if p.trainable}
    for pattern, setting in wishes.pins:
        hits = [p for name, p in names.items() if matches(pattern, name)]
        if not hits:
            raise UsageError(
                f"the pin '{pattern}' matches no trainable parameter", hint="the names are those of the scan"
            )
        for parameter in hits:
            validate(setting, parameter.shape, name=parameter.name)

    def settings_of(parameter: Parameter) -> tuple[Setting, ...]:
        for pattern, setting in wishes.pins:
            if matches(pattern, parameter.name):
                return (setting,)
        return tuple(s for s in candidate_settings(parameter, allowed) if not _is_forbidden(s, wishes.forbidden))

    return settings_of


def _check_forbidden(forbidden: Collection[str]) -> None:
    for name in forbidden:
        if name in CODECS:
            continue
        try:
            method = method_info(name).name
        except OptimizerError as error:
            hint = f"{error.hint or ''}; or a codec: {', '.join(CODECS)}".removeprefix("; ")
            raise OptimizerError(error.message, hint=hint) from error
        if method == DENSE.method:
            raise UsageError(
                "adamw cannot be forbidden: vectors and tiny tensors always keep their full state",
                hint=f"to keep it from fewer bits, forbid the codecs: {', '.join(CODECS)}",
            )


def _is_forbidden(setting: Setting, forbidden: Collection[str]) -> bool:
    return setting.method in forbidden or not set(codecs_of(setting).values()).isdisjoint(forbidden)
