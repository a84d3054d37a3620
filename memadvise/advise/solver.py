"""Multiple-choice knapsack: one option per group, total bytes within the budget, least total harm.

Greedy on the lower convex hulls gives a start and, through its fractional last step, a lower bound (the linear
relaxation); depth-first branch and bound with that bound then proves optimality or, when its node limit is reached,
leaves a stated gap. Plain Python: after pooling equal layers there are tens of groups, not thousands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_NODE_LIMIT = 20_000  # seconds for hundreds of groups; ten times as many found nothing better there


@dataclass(frozen=True)
class Option:
    """One way to treat a group: exact bytes, harm >= 0 (a gain is never credited)."""

    num_bytes: int
    harm: float


@dataclass(frozen=True)
class Solution:
    """``choice[i]`` indexes the options of group i; ``lower_bound`` is proven, so the gap is at most harm - bound."""

    choice: tuple[int, ...]
    num_bytes: int
    harm: float
    lower_bound: float
    optimal: bool

    @property
    def note(self) -> str:
        """``optimal``, or how far from optimal it can be at most."""
        if self.optimal:
            return "optimal"
        if self.lower_bound <= 0:
            return "best found; the lower bound is 0, so no percentage can be given"
        return f"within {100 * (self.harm / self.lower_bound - 1):.1f} % of optimal"


@dataclass(frozen=True)
class _Step:
    """Moving along a hull towards fewer bytes: ``slope`` = harm added for each byte saved."""

    slope: float
    group: int
    saved: int
    harm: float
    target: int


def solve(groups: Sequence[Sequence[Option]], budget_bytes: int, *, node_limit: int = _NODE_LIMIT) -> Solution | None:
    """Choose one option per group.

    Args:
        groups: the options of each group, at least one each.
        budget_bytes: upper limit of the summed bytes.
        node_limit: nodes of the exact search before the best solution so far is returned with its gap.

    Returns:
        The solution, or None when even the smallest options do not fit.
    """
    if not groups:
        return Solution((), 0, 0.0, 0.0, True) if budget_bytes >= 0 else None
    undominated = [_undominated(options) for options in groups]
    if sum(options[kept[-1]].num_bytes for options, kept in zip(groups, undominated, strict=True)) > budget_bytes:
        return None
    hulls = [_hull(options, kept) for options, kept in zip(groups, undominated, strict=True)]
    search = _Search(groups, undominated, hulls, budget_bytes, node_limit)
    return search.run()


def _undominated(options: Sequence[Option]) -> list[int]:
    """Indices from most to fewest bytes with strictly rising harm; ties keep the first given."""
    order = sorted(range(len(options)), key=lambda i: (options[i].num_bytes, options[i].harm, i))
    kept: list[int] = []
    for i in order:
        if not kept or options[i].harm < options[kept[-1]].harm:
            kept.append(i)
    return kept[::-1]


def _hull(options: Sequence[Option], kept: Sequence[int]) -> list[int]:
    """The lower convex hull of ``kept`` in the (bytes, harm) plane."""
    hull: list[int] = []
    for i in kept:
        while len(hull) >= 2 and _slope(options, hull[-2], hull[-1]) >= _slope(options, hull[-2], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(options: Sequence[Option], larger: int, smaller: int) -> float:
    return (options[smaller].harm - options[larger].harm) / (options[larger].num_bytes - options[smaller].num_bytes)


class _Search:
    def __init__(
        self,
        groups: Sequence[Sequence[Option]],
        undominated: list[list[int]],
        hulls: list[list[int]],
        budget: int,
        node_limit: int,
    ) -> None:
        self.groups, self.undominated, self.budget, self.node_limit = groups, undominated, budget, node_limit
        # Branch on the groups with the most bytes at stake first: their choice moves the bound most.
        spread = [g[k[0]].num_bytes - g[k[-1]].num_bytes for g, k in zip(groups, undominated, strict=True)]
        self.order = sorted(range(len(groups)), key=lambda i: -spread[i])
        self.depth_of = {group: depth for depth, group in enumerate(self.order)}
        self.steps = sorted(
            (
                _Step(
                    _slope(groups[g], a, b),
                    g,
                    groups[g][a].num_bytes - groups[g][b].num_bytes,
                    groups[g][b].harm - groups[g][a].harm,
                    b,
                )
                for g, hull in enumerate(hulls)
                for a, b in itertools.pairwise(hull)
            ),
            key=lambda step: (step.slope, step.group, -step.saved),
        )
        # Suffix sums over the branching order: what the not yet decided groups cost at their largest and smallest.
        self.largest = self._suffix(lambda g: groups[g][undominated[g][0]].num_bytes)
        self.harmless = self._suffix(lambda g: groups[g][undominated[g][0]].harm)
        self.smallest = self._suffix(lambda g: groups[g][undominated[g][-1]].num_bytes)
        self.best: list[int] = []
        self.best_harm = float("inf")
        self.nodes = 0

    def _suffix(self, value: Callable[[int], float]) -> list[float]:
        out = [0.0]
        for group in reversed(self.order):
            out.append(out[-1] + value(group))
        return out[::-1]

    def run(self) -> Solution:
        bound, start = self._relax(0, 0, 0.0)
        self._accept(self._fill(start))
        self._branch(0, 0, 0.0, [-1] * len(self.groups))
        exhausted = self.nodes < self.node_limit
        return Solution(
            tuple(self.best),
            sum(self.groups[g][o].num_bytes for g, o in enumerate(self.best)),
            self.best_harm,
            self.best_harm if exhausted else bound,
            exhausted,
        )

    def _relax(self, depth: int, used: int, harm: float) -> tuple[float, dict[int, int]]:
        """Linear relaxation over the groups not yet decided: (lower bound, an integral choice that fits)."""
        choice = {g: self.undominated[g][0] for g in self.order[depth:]}
        excess = used + self.largest[depth] - self.budget
        bound = harm + self.harmless[depth]
        for step in self.steps:
            if excess <= 0:
                break
            if self.depth_of[step.group] < depth:
                continue
            choice[step.group] = step.target
            bound += step.harm * min(1.0, excess / step.saved)
            excess -= step.saved
        return bound, choice

    def _fill(self, choice: dict[int, int]) -> list[int]:
        """Spend the slack the last whole step left: the largest harm reductions that still fit."""
        picked = [choice[g] for g in range(len(self.groups))]
        slack = self.budget - sum(self.groups[g][o].num_bytes for g, o in enumerate(picked))
        while True:
            better = [
                (options[picked[g]].harm - options[o].harm, g, o)
                for g, options in enumerate(self.groups)
                for o in self.undominated[g]
                if options[o].harm < options[picked[g]].harm
                and options[o].num_bytes - options[picked[g]].num_bytes <= slack
            ]
            if not better:
                return picked
            _, g, o = max(better, key=lambda item: (item[0], -item[1], -item[2]))
            slack -= self.groups[g][o].num_bytes - self.groups[g][picked[g]].num_bytes
            picked[g] = o

    def _accept(self, picked: list[int]) -> None:
        harm = sum(self.groups[g][o].harm for g, o in enumerate(picked))
        if harm < self.best_harm:
            self.best, self.best_harm = list(picked), harm

    def _branch(self, depth: int, used: int, harm: float, picked: list[int]) -> None:
        self.nodes += 1
        if self.nodes >= self.node_limit:
            return
        if depth == len(self.order):
            self._accept(picked)
            return
        bound, rest = self._relax(depth, used, harm)
        if bound >= self.best_harm * (1 - 1e-12):
            return
        candidate = list(picked)
        for group, option in rest.items():
            candidate[group] = option
        if used + sum(self.groups[g][o].num_bytes for g, o in rest.items()) <= self.budget:
            self._accept(candidate)
        group = self.order[depth]
        for option in self.undominated[group]:
            cost = self.groups[group][option]
            if used + cost.num_bytes + self.smallest[depth + 1] > self.budget:
                continue
            picked[group] = option
            self._branch(depth + 1, used + cost.num_bytes, harm + cost.harm, picked)
        picked[group] = -1
