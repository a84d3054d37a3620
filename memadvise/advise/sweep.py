"""The Pareto table: what each budget buys, from AdamW as it stands down to the least that any plan takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from memadvise.advise.recommend import Advisor, Recommendation
from memadvise.errors import Infeasible

NUM_BUDGETS = 8


@dataclass(frozen=True)
class SweepRow:
    """One plan: the peak it takes is the smallest budget it serves.

    ``settings``: kind of setting -> tensors. ``optimizer_time``: of the optimizer step over AdamW's; ``pass_time``: of
    forward and backward passes, 4/3 where activations are recomputed (by arithmetic). None where nothing fits.
    """

    budget_bytes: int
    peak_bytes: int | None
    state_bytes: int | None
    confidence: str | None
    switches: str
    settings: dict[str, int]
    optimizer_time: float | None
    pass_time: float | None


def sweep(
    advisor: Advisor, largest: int, smallest: int, *, progress: Callable[[str, int, int], None] | None = None
) -> tuple[SweepRow, ...]:
    """Plans for evenly spaced budgets from ``largest`` down to ``smallest``; of equal plans, the smallest budget."""
    report = progress or (lambda what, done, total: None)
    rows: list[SweepRow] = []
    for number in range(NUM_BUDGETS):
        report("sweeping over budgets", number, NUM_BUDGETS)
        budget = largest - (largest - smallest) * number // (NUM_BUDGETS - 1)
        try:
            row = _row(budget, advisor.recommend(budget))
        except Infeasible:
            row = SweepRow(budget, None, None, None, "", {}, None, None)
        if rows and row.peak_bytes is not None and row.peak_bytes == rows[-1].peak_bytes:
            rows.pop()
        rows.append(row)
    report("sweeping over budgets", NUM_BUDGETS, NUM_BUDGETS)
    return tuple(rows)


def _row(budget: int, found: Recommendation) -> SweepRow:
    counts = Counter[str]()
    for group in found.groups:
        counts[group.setting_key] += group.count
    switches = found.plan.switches
    return SweepRow(
        budget_bytes=budget,
        peak_bytes=found.after.peak_bytes,
        state_bytes=found.after.state_bytes,
        confidence=found.confidence,
        switches=switches.describe(),
        settings=dict(counts.most_common()),
        optimizer_time=round(found.optimizer_time, 2),
        pass_time=round(4 / 3, 2) if switches.checkpoint else 1.0,
    )
