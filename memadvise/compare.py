"""What moved between two ledgers: peak, phases, categories, modules and the tensors alive at the peak, largest first.

Pure data, for the report that lays estimate and measurement side by side and for the check that names what grew.
Modules of repeated blocks are one row (``h.*.mlp``). Two ledgers describe the moments of their own peaks: when these
lie in different phases, ``settings`` says so.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from memadvise.ledger import CATEGORIES, PHASES, LiveGroup, MemoryLedger
from memadvise.names import shared_patterns

_PARTS = re.compile(r"[.:]+")
_MADE_IN_THE_STEP = ("activations", "temporaries")
_D = TypeVar("_D", bound="Difference")


@dataclass(frozen=True)
class Difference:
    """Bytes of one thing in both ledgers."""

    name: str
    before_bytes: int
    after_bytes: int

    @property
    def change_bytes(self) -> int:
        return self.after_bytes - self.before_bytes

    @property
    def change(self) -> float | None:
        """Relative to before: 0.01 is one per cent more; None where there was nothing before."""
        return self.change_bytes / self.before_bytes if self.before_bytes else None


@dataclass(frozen=True)
class ModuleDifference(Difference):
    """Bytes at the peak of ``count`` equal modules together; ``name`` is their pattern, ``h.*.mlp``."""

    count: int


@dataclass(frozen=True)
class CellDifference(ModuleDifference):
    """Bytes of one category in equal modules: the finest place where something can move."""

    category: str


@dataclass(frozen=True)
class TensorDifference(Difference):
    """Tensors alive at the peak, of one category, operation and dtype in equal modules (``name`` is their pattern).

    Lines of code do not tell tensors apart, so that an edit above them moves nothing; ``where`` is the line of the
    largest ones in the ledger that has more. ``dtype`` is empty where one of the ledgers does not know it.
    """

    category: str
    op: str
    dtype: str
    where: str | None
    before_count: int
    after_count: int


@dataclass(frozen=True)
class LedgerDiff:
    """Everything that two ledgers can be compared by; rows that did not move are there, last.

    ``settings`` holds what else differs: name -> (before, after), such as the optimizer or the phase of the peak.
    ``cells`` and ``tensors`` hold only what moved.
    """

    peak: Difference
    state: Difference
    phases: tuple[Difference, ...]
    categories: tuple[Difference, ...]
    modules: tuple[ModuleDifference, ...]
    cells: tuple[CellDifference, ...]
    tensors: tuple[TensorDifference, ...]
    settings: dict[str, tuple[str, str]]


def compare(before: MemoryLedger, after: MemoryLedger) -> LedgerDiff:
    """Lay ``after`` beside ``before``; a positive change is more bytes in ``after``."""
    alive = (group.module for group in (*before.live_groups, *after.live_groups))
    names = sorted({*before.by_module, *after.by_module, *alive})
    shared = shared_patterns(names)
    pattern_of = {name: pattern for pattern, members in shared.items() for name in members}
    return LedgerDiff(
        peak=Difference("peak", before.peak_bytes, after.peak_bytes),
        state=Difference("optimizer state", before.state_bytes, after.state_bytes),
        phases=tuple(
            Difference(phase, _phase_bytes(before, phase), _phase_bytes(after, phase))
            for phase in PHASES
            if _phase_bytes(before, phase) or _phase_bytes(after, phase)
        ),
        categories=_largest_first(
            Difference(name, before.by_category.get(name, 0), after.by_category.get(name, 0))
            for name in _ordered({*before.by_category, *after.by_category})
        ),
        modules=_modules(before, after, shared),
        cells=_cells(before, after, shared),
        tensors=_tensors(before, after, pattern_of),
        settings=_settings(before, after),
    )


def _phase_bytes(ledger: MemoryLedger, phase: str) -> int:
    return next((record.peak_bytes for record in ledger.phases if record.phase == phase), 0)


def _ordered(categories: set[str]) -> list[str]:
    return [c for c in CATEGORIES if c in categories] + sorted(categories - set(CATEGORIES))


def _modules(
    before: MemoryLedger, after: MemoryLedger, shared: Mapping[str, Sequence[str]]
) -> tuple[ModuleDifference, ...]:
    def total(ledger: MemoryLedger, members: Sequence[str]) -> int:
        return sum(sum(ledger.by_module.get(name, {}).values()) for name in members)

    rows = (
        ModuleDifference(pattern, total(before, members), total(after, members), _count(before, after, members))
        for pattern, members in shared.items()
    )
    return _largest_first(row for row in rows if row.count)


def _cells(
    before: MemoryLedger, after: MemoryLedger, shared: Mapping[str, Sequence[str]]
) -> tuple[CellDifference, ...]:
    rows = []
    for pattern, members in shared.items():
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for side, ledger in enumerate((before, after)):
            for name in members:
                for category, size in ledger.by_module.get(name, {}).items():
                    sums[category][side] += size
        count = _count(before, after, members)
        for category in _ordered(set(sums)):
            old, new = sums[category]
            rows.append(CellDifference(pattern, old, new, count, category))
    return _largest_first(row for row in rows if row.change_bytes)


def _count(before: MemoryLedger, after: MemoryLedger, members: Sequence[str]) -> int:
    return sum(name in before.by_module or name in after.by_module for name in members)


def _tensors(before: MemoryLedger, after: MemoryLedger, pattern_of: Mapping[str, str]) -> tuple[TensorDifference, ...]:
    # A measurement does not know of what dtype an allocation is, nor who made what was there before the step.
    traced = "measure" not in (before.source, after.source)
    alike: dict[tuple[str, str, str, str], tuple[list[LiveGroup], list[LiveGroup]]] = defaultdict(lambda: ([], []))
    for side, ledger in enumerate((before, after)):
        for group in ledger.live_groups:
            op = operation(group.op) if traced or group.category in _MADE_IN_THE_STEP else ""
            key = (pattern_of[group.module], group.category, op, group.dtype if traced else "")
            alike[key][side].append(group)
    rows = []
    for (pattern, category, op, dtype), (olds, news) in alike.items():
        old_bytes, new_bytes = (sum(group.num_bytes for group in side) for side in (olds, news))
        if old_bytes != new_bytes:
            where = max(news if new_bytes > old_bytes else olds, key=lambda group: group.num_bytes).where
            counts = [sum(group.count for group in side) for side in (olds, news)]
            rows.append(TensorDifference(pattern, old_bytes, new_bytes, category, op, dtype, where, *counts))
    return _largest_first(rows)


def operation(op: str) -> str:
    """An operation's bare name, however a trace or a profiler spells it: ``aten.addmm.default`` -> ``addmm``."""
    parts = [part for part in _PARTS.split(op) if part]
    return parts[1] if len(parts) > 1 else op


def _settings(before: MemoryLedger, after: MemoryLedger) -> dict[str, tuple[str, str]]:
    def told(ledger: MemoryLedger) -> dict[str, str]:
        return {
            "source": ledger.source,
            "device": ledger.device,
            "optimizer": ledger.optimizer,
            "micro-batches": str(ledger.micro_batches),
            "recomputed modules": ", ".join(ledger.checkpoint) or "none",
            "phase of the peak": ledger.peak_phase,
        }

    old, new = told(before), told(after)
    return {name: (old[name], new[name]) for name in old if old[name] != new[name]}


def _largest_first(rows: Iterable[_D]) -> tuple[_D, ...]:
    return tuple(sorted(rows, key=lambda row: (-abs(row.change_bytes), -row.after_bytes, row.name)))
