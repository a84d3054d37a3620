"""The ladder: the surest kind of plan that fits, then the least harm of that kind.

1. Full and 8-bit moments. No loss was ever measured, so the switches that cost the least time win, and fewer bits
   only make room: 8-bit state comes before micro-batches, those before checkpointing.
2. Factored second moments and one value a row, with momentum. From here on quality is at stake, and what costs only
   time comes first: switches are taken before anything is compressed further than it must be.
3. Everything that keeps the momentum.
4. Tensors without it (tier 2): the fewest that make room, of those the ones with the smallest displacement; then the
   least harm among the others. Harm of the two tiers is never added.

Within a level the knapsack is exact, or says how far from optimal it can be (:mod:`memadvise.advise.solver`).
``objective="speed"`` asks within the same level for the least time instead: switches first, then the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from memadvise.advise.candidates import Confidence, Group
from memadvise.advise.harm import Harm
from memadvise.advise.rules import codecs_of
from memadvise.advise.solver import Option, Solution, solve
from memadvise.ledger import MemoryLedger
from memadvise.plan.schema import Setting, Switches

OBJECTIVES = ("quality", "speed")
_SLOW_CODEC = "dynamic8"  # saves 4 % of int8's bytes and takes many times its step on a CPU: the last of the 8-bit ones


@dataclass(frozen=True)
class Priced:
    """One setting of one group: exact bytes, harm in its tier's metric, how sure, and its step's time.

    ``num_bytes``: of state, less what the setting takes off the weights. ``step_time``: of the optimizer, AdamW's on
    one element = 1.
    """

    setting: Setting
    num_bytes: int
    harm: Harm
    tier: int
    confidence: Confidence
    step_time: float


@dataclass(frozen=True)
class Row:
    """One group with all it may be, or with what was chosen."""

    group: Group
    options: tuple[Priced, ...]


@dataclass(frozen=True)
class Chosen:
    """A group, its choice, and what else it could have been."""

    group: Group
    priced: Priced
    others: tuple[Priced, ...]


@dataclass(frozen=True)
class Choice:
    """The best plan of the surest level that fits, by arithmetic; ``level`` is that of the ladder.

    ``smallest``: nothing was weighed, it is the least state there is. ``contest``: how a contest of plans ended, where
    one was held.
    """

    ledger: MemoryLedger
    switches: Switches
    chosen: tuple[Chosen, ...]
    level: Confidence
    note: str
    smallest: bool = False
    contest: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(c.priced.num_bytes for c in self.chosen)


def switches_of(ledger: MemoryLedger) -> Switches:
    """The switches a ledger was traced under."""
    return ledger.switches


def time_rank(switches: Switches) -> tuple[int, int]:
    """Cheapest in time first: nothing, release, micro-batches, then a second forward pass, then both."""
    return (1 if switches.checkpoint else 0, switches.micro_batches + switches.gradient_release)


def fixed_peak_bytes(ledger: MemoryLedger) -> int:
    """The largest phase peak without the optimizer's state: what no choice of methods can remove."""
    return max(p.peak_bytes - p.by_category.get("optimizer_state", 0) for p in ledger.phases)


class Ladder:
    """Chooses settings and switches for a budget.

    Args:
        ledgers: traces of AdamW by memadvise's engine, one a combination of switches.
        rows: what each group may be.
        price: prices every setting of a part of a group, as the rows were priced.
        objective: "quality" or "speed".
    """

    def __init__(
        self,
        ledgers: Sequence[MemoryLedger],
        rows: Sequence[Row],
        price: Callable[[Group], tuple[Priced, ...]],
        objective: str = "quality",
    ) -> None:
        self.ledgers, self.rows, self.price, self.objective = ledgers, rows, price, objective

    def best(self, budget: int, room_lost: Mapping[int, int], *, momentum: bool = True) -> Choice | None:
        """The choice for a budget on the peak; None when nothing fits.

        Args:
            budget: bytes, with what the options take off the weights counted as state.
            room_lost: index of a ledger -> bytes that traces showed beyond the arithmetic.
            momentum: whether every tensor keeps it (levels 1 to 3), or as few as must lose it (level 4).
        """
        rooms = [budget - fixed_peak_bytes(ledger) - room_lost.get(i, 0) for i, ledger in enumerate(self.ledgers)]
        return self._climb(rooms) if momentum else self._without_momentum(rooms)

    def within(self, state_bytes: int) -> Choice | None:
        """The choice for a limit on the state alone, under the first ledger's switches; None when nothing fits."""
        alone = Ladder(self.ledgers[:1], self.rows, self.price, self.objective)
        return alone._climb([state_bytes]) or alone._without_momentum([state_bytes])

    def _climb(self, rooms: Sequence[int]) -> Choice | None:
        for level in (Confidence.HIGH, Confidence.FAIRLY_HIGH, Confidence.MEDIUM):
            time_first = level is Confidence.HIGH or self.objective == "speed"
            choice = self._soonest(level, rooms) if time_first else self._roomiest(level, rooms)
            if choice is not None:
                return choice
        return None

    def dense(self) -> Choice:
        """The first option of every row (AdamW in full, or a pin) under the switches that leave the most room."""
        ledger = self._roomiest_ledger()
        chosen = tuple(Chosen(row.group, row.options[0], row.options) for row in self.rows)
        return Choice(ledger, switches_of(ledger), chosen, Confidence.HIGH, "nothing to optimise")

    def _roomiest_ledger(self) -> MemoryLedger:
        return min(self.ledgers, key=lambda ledger: (fixed_peak_bytes(ledger), time_rank(switches_of(ledger))))

    def smallest(self) -> Choice:
        """The least state under the switches that leave the least beside it."""
        ledger = self._roomiest_ledger()
        chosen = tuple(
            Chosen(row.group, min(row.options, key=lambda o: (o.num_bytes, o.tier, o.harm.value)), row.options)
            for row in self.rows
        )
        return Choice(ledger, switches_of(ledger), chosen, Confidence.LOW, "the least state of all candidates", True)

    # ------------------------------------------------------------ levels of tier 1

    def _soonest(self, level: Confidence, rooms: Sequence[int]) -> Choice | None:
        """The first switches, cheapest in time first, under which the level fits."""
        order = sorted(range(len(rooms)), key=lambda i: time_rank(switches_of(self.ledgers[i])))
        for index in order:
            for slow in (False, True) if level is Confidence.HIGH else (True,):
                choice = self._solved(level, index, rooms[index], slow)
                if choice is not None:
                    return choice
        return None

    def _roomiest(self, level: Confidence, rooms: Sequence[int]) -> Choice | None:
        """The least harm is found where there is most room; of the switches that leave enough for it, the soonest."""
        order = sorted(range(len(rooms)), key=lambda i: (-rooms[i], time_rank(switches_of(self.ledgers[i]))))
        choice = self._solved(level, order[0], rooms[order[0]], slow=True)
        return choice and self._soonest_for(choice, rooms)

    def _soonest_for(self, choice: Choice, rooms: Sequence[int]) -> Choice:
        enough = [ledger for ledger, room in zip(self.ledgers, rooms, strict=True) if room >= choice.num_bytes]
        ledger = min(enough, key=lambda ledger: time_rank(switches_of(ledger)))
        return replace(choice, ledger=ledger, switches=switches_of(ledger))

    def _solved(self, level: Confidence, index: int, room: int, slow: bool) -> Choice | None:
        kept = [self._of_level(row, level, slow) for row in self.rows]
        solution = self._solve(kept, room)
        if solution is None:
            return None
        chosen = tuple(
            Chosen(row.group, options[number], row.options)
            for row, options, number in zip(self.rows, kept, solution.choice, strict=True)
        )
        ledger = self.ledgers[index]
        return Choice(ledger, switches_of(ledger), chosen, level, solution.note)

    @staticmethod
    def _of_level(row: Row, level: Confidence, slow: bool) -> tuple[Priced, ...]:
        """The options that are sure enough; the surest there are where none is (the user's pins)."""
        level = max(level, min(option.confidence for option in row.options))
        sure = [option for option in row.options if option.confidence <= level]
        quick = [option for option in sure if slow or _SLOW_CODEC not in codecs_of(option.setting).values()]
        return tuple(quick or sure)

    def _solve(self, options: Sequence[Sequence[Priced]], room: int) -> Solution | None:
        """Least harm or least time within ``room``; where a row has one tier only, harm is of one metric."""
        speed = self.objective == "speed"
        return solve(
            [[Option(o.num_bytes, o.step_time if speed else o.harm.value) for o in row] for row in options], room
        )

    # ------------------------------------------------------------ tier 2

    def _without_momentum(self, rooms: Sequence[int]) -> Choice | None:
        """The fewest tensors of tier 2 that make room, chosen where there is most of it."""
        order = sorted(range(len(rooms)), key=lambda i: (-rooms[i], time_rank(switches_of(self.ledgers[i]))))
        index = order[0]
        picks = [_Pool.of(row, self.price) for row in self.rows]
        # A tensor counts 1 and its displacement less than 1/2 in all, so that fewer tensors always come first.
        largest = sum(max(pool.displacements(), default=0.0) for pool in picks) or 1.0
        solution = solve(
            [[Option(p.num_bytes, p.count + 0.5 * p.displacement / largest) for p in pool.picks] for pool in picks],
            rooms[index],
        )
        if solution is None:
            return None
        taken: list[Chosen] = []
        rest: list[Row] = []
        for pool, number in zip(picks, solution.choice, strict=True):
            pick = pool.picks[number]
            taken += [Chosen(group, priced, pool.row.options) for group, priced in pick.taken]
            rest += [Row(group, self.price(group)) for group in pick.left]
        kept = [[o for o in row.options if o.tier == 1] or list(row.options) for row in rest]
        room = rooms[index] - sum(c.priced.num_bytes for c in taken)
        others = self._solve(kept, room)
        assert others is not None, "the smallest of tier 1 fit beside these"
        taken += [
            Chosen(row.group, options[number], row.options)
            for row, options, number in zip(rest, kept, others.choice, strict=True)
        ]
        ledger = self.ledgers[index]
        exact = solution.optimal and others.optimal
        note = "optimal" if exact else f"tier 2 {solution.note}; tier 1 {others.note}"
        choice = Choice(ledger, switches_of(ledger), tuple(taken), Confidence.LOW, note)
        return self._soonest_for(choice, rooms)


@dataclass(frozen=True)
class _Pick:
    """``count`` tensors of a pool under one tier-2 setting, the others as small as tier 1 makes them."""

    num_bytes: int
    count: int
    displacement: float
    taken: tuple[tuple[Group, Priced], ...]
    left: tuple[Group, ...]


@dataclass(frozen=True)
class _Pool:
    """A row's ways to put the 0, 1, ... tensors that move least into tier 2."""

    row: Row
    picks: tuple[_Pick, ...]

    def displacements(self) -> list[float]:
        return [pick.displacement for pick in self.picks]

    @staticmethod
    def of(row: Row, price: Callable[[Group], tuple[Priced, ...]]) -> _Pool:
        first = [option for option in row.options if option.tier == 1]
        second = [option for option in row.options if option.tier == 2]
        if not first:  # pinned, or nothing else allowed: no choice here
            least = min(row.options, key=lambda o: (o.num_bytes, o.harm.value))
            return _Pool(row, (_Pick(least.num_bytes, 0, 0.0, ((row.group, least),), ()),))
        smallest = min(option.num_bytes for option in first)
        picks = [_Pick(smallest, 0, 0.0, (), (row.group,))]
        members = row.group.members
        for option in second:
            if option.num_bytes >= smallest:
                continue
            singles = [
                (member, next(o for o in price(replace(row.group, members=(member,))) if o.setting == option.setting))
                for member in members
            ]
            singles.sort(key=lambda pair: pair[1].harm.value)
            for count in range(1, len(singles) + 1):
                moved = {member.name for member, _ in singles[:count]}
                taken = tuple(m for m in members if m.name in moved)
                left = tuple(m for m in members if m.name not in moved)
                group = replace(row.group, members=taken)
                priced = next(o for o in price(group) if o.setting == option.setting)
                rest = replace(row.group, members=left)
                bytes_left = min((o.num_bytes for o in price(rest) if o.tier == 1), default=0) if left else 0
                picks.append(
                    _Pick(
                        priced.num_bytes + bytes_left,
                        count,
                        priced.harm.value,
                        ((group, priced),),
                        (rest,) if left else (),
                    )
                )
        return _Pool(row, tuple(picks))
