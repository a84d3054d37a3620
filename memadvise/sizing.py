"""How large a batch, or how long a sequence, fits a budget: a search over few traced sizes, and its result.

The peak of each phase is close to a straight line over the size, and the peak of the step the highest of them. So two
traced sizes say where to look; the size found is traced, and so is the one above it. Where the line was wrong, the
search goes on between what fits and what does not: no size is ever reported that was not traced, and, unless it is a
limit, the next one was traced as well and does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from memadvise.errors import TargetError, UsageError
from memadvise.ledger import MemoryLedger

_LINES = 8  # traces that follow a line, before halving takes over


@dataclass(frozen=True)
class TracedSize:
    """One trace of the search."""

    size: int
    peak_bytes: int


@dataclass(frozen=True)
class FitRow:
    """The largest size of one way to run the step.

    Args:
        name: the way, in words.
        how: what to write to run so; empty for the target as it stands.
        size: samples of a micro-batch, or tokens of a sequence; None when not even the smallest fits.
        at_limit: ``size`` is the largest that was to be tried, or that runs.
        ledger: the trace of ``size``, or of the smallest size when none fits; None when none could be traced.
        next_peak_bytes: the peak of the next size up, which does not fit; None at the limit.
        traces: every size traced, in order.
        problem: why the way is not open to this target, or why the sizes end where they do.
    """

    name: str
    how: str = ""
    size: int | None = None
    at_limit: bool = False
    ledger: MemoryLedger | None = field(default=None, repr=False)
    next_peak_bytes: int | None = None
    traces: tuple[TracedSize, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Fit:
    """What fits a budget; ``rows`` are of micro-batches, ``sequences`` of sequence lengths (empty if not asked for).

    ``seq_len`` is the sequence length of ``rows`` and ``batch_size`` the batch size of ``sequences``, where known.
    """

    target: str
    device: str
    budget_bytes: int
    rows: tuple[FitRow, ...]
    sequences: tuple[FitRow, ...] = ()
    seq_len: int | None = None
    batch_size: int | None = None
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether any way fits with any size."""
        return any(row.size is not None for row in (*self.rows, *self.sequences))


def largest(
    name: str, how: str, trace: Callable[[int], MemoryLedger], budget: int, *, start: int, limit: int, unit: int = 1
) -> FitRow:
    """The largest size up to ``limit`` whose traced peak is at most ``budget``.

    Args:
        name: the way, for the row.
        how: what to write, for the row.
        trace: the ledger of a size; a TargetError or UsageError at others than the first says that those do not run.
        budget: bytes.
        start: the size to begin with, which runs.
        limit: the largest size to try.
        unit: sizes are multiples of this, but for ``start``.
    """
    return _Search(name, how, trace, budget, max(limit // unit, 1), unit).run(max(1, min(start, limit) // unit))


class _Search:
    """Numbers here are counts of units."""

    def __init__(
        self, name: str, how: str, trace: Callable[[int], MemoryLedger], budget: int, limit: int, unit: int
    ) -> None:
        self._name, self._how, self._trace, self._budget, self._unit = name, how, trace, budget, unit
        self._low, self._high = 0, limit + 1  # fits (or is too small to run), and does not (or is out of bounds)
        self._limit = limit
        self._ledgers: dict[int, MemoryLedger] = {}
        self._stopped: str | None = None

    def run(self, start: int) -> FitRow:
        self._look(start)
        self._look_further(min(2 * start, self._limit) if self._fits(start) else max(1, start // 2))
        while self._high - self._low > 1:
            guess = self._guess() if len(self._ledgers) < _LINES else (self._low + self._high) // 2
            self._look_further(min(max(guess, self._low + 1), self._high - 1))
        return self._row()

    def _fits(self, count: int) -> bool:
        return self._ledgers[count].peak_bytes <= self._budget

    def _look(self, count: int) -> None:
        self._ledgers[count] = self._trace(count * self._unit)
        if self._fits(count):
            self._low = max(self._low, count)
        else:
            self._high = min(self._high, count)

    def _look_further(self, count: int) -> None:
        if count in self._ledgers:
            return
        try:
            self._look(count)
        except (TargetError, UsageError) as error:
            self._stopped = f"{count * self._unit} does not run: {error.message}"
            if count > min(self._ledgers):
                self._high = min(self._high, count)
            else:
                self._low = max(self._low, count)

    def _guess(self) -> int:
        """Where the highest of the phases' lines crosses the budget."""
        known = sorted(self._ledgers)
        if self._high in self._ledgers:  # between the neighbours, or below two that do not fit
            pair = (self._low, self._high) if self._low in self._ledgers else tuple(known[:2])
        else:
            pair = tuple(known[-2:])
        if len(pair) < 2 or pair[0] == pair[1]:
            return (self._low + self._high) // 2
        (a, b), found = pair, self._high - 1
        for phase in self._ledgers[b].phases:
            there = phase.peak_bytes
            here = next((p.peak_bytes for p in self._ledgers[a].phases if p.phase == phase.phase), there)
            if there > here:
                found = min(found, a + (self._budget - here) * (b - a) // (there - here))
        return found

    def _row(self) -> FitRow:
        fitting = self._low if self._low in self._ledgers else None
        shown = self._ledgers[fitting if fitting is not None else min(self._ledgers)]
        above = self._ledgers.get(self._high)
        return FitRow(
            self._name,
            self._how,
            size=fitting * self._unit if fitting is not None else None,
            at_limit=fitting is not None and above is None,
            ledger=shown,
            next_peak_bytes=above.peak_bytes if above is not None and fitting is not None else None,
            traces=tuple(TracedSize(count * self._unit, ledger.peak_bytes) for count, ledger in self._ledgers.items()),
            problem=self._stopped,
        )
