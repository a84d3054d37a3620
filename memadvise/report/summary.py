"""From a scan's ledgers to the rows of its tables: pure data, so that text and HTML show the same numbers."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memadvise.ledger import HessianValue, MemoryLedger, Parameter, ParameterProbe, Scan, SnrValue
from memadvise.names import repeat_pattern

OUTSIDE = "(no module)"


@dataclass(frozen=True)
class ModuleRow:
    """Bytes at the peak of ``count`` equal modules together."""

    pattern: str
    count: int
    total_bytes: int
    by_category: dict[str, int]


def module_rows(ledger: MemoryLedger, *, depth: int = 3, limit: int = 16) -> tuple[ModuleRow, ...]:
    """Modules down to ``depth`` named segments, repeated blocks as one row, largest first.

    The rows add up to the peak: what is beyond ``limit`` rows is one last row.
    """
    members: dict[str, set[str]] = defaultdict(set)
    sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for module, categories in ledger.by_module.items():
        prefix = _prefix(module, depth)
        pattern = repeat_pattern(prefix)[0] if prefix else OUTSIDE
        members[pattern].add(prefix)
        for category, size in categories.items():
            sums[pattern][category] += size
    rows = [ModuleRow(p, len(members[p]), sum(sums[p].values()), dict(sums[p])) for p in sums]
    rows.sort(key=lambda row: (-row.total_bytes, row.pattern))
    if len(rows) > limit:
        rest = rows[limit - 1 :]
        merged: dict[str, int] = defaultdict(int)
        for row in rest:
            for category, size in row.by_category.items():
                merged[category] += size
        total, count = sum(row.total_bytes for row in rest), sum(row.count for row in rest)
        rows = rows[: limit - 1] + [ModuleRow(f"({len(rest)} smaller rows)", count, total, dict(merged))]
    return tuple(rows)


def _prefix(module: str, depth: int) -> str:
    """The first ``depth`` named segments with the numbers after them: depth 1 of ``h.3.mlp.fc`` is ``h.3``."""
    kept: list[str] = []
    named = 0
    for part in module.split("."):
        named += not part.isdigit()
        if named > depth:
            break
        kept.append(part)
    return ".".join(kept)


def axes_label(parameter: Parameter, axes: Sequence[int]) -> str:
    """The axes as written in a plan and what they mean: ``[1] fan_in``, ``[0, 1] all``."""
    kept = tuple(axes)
    meaning = ""
    if len(kept) == len(parameter.shape) and len(kept) > 1:
        meaning = " all"
    elif kept == parameter.fan_in:
        meaning = " fan_in"
    elif kept == parameter.fan_out:
        meaning = " fan_out"
    return f"[{', '.join(str(axis) for axis in kept)}]{meaning}"


@dataclass(frozen=True)
class SnrRow:
    """The axes of one role along which the second moment varies least; SNR over the role's tensors."""

    role: str
    count: int
    numel: int
    best: str
    median_snr: float | None
    lowest_snr: float | None
    error: float | None
    others: tuple[tuple[str, float], ...]


def snr_rows(scan: Scan) -> tuple[SnrRow, ...]:
    """One row per role and dimension, most elements first."""
    grouped: dict[tuple[str, int], list[tuple[Parameter, ParameterProbe]]] = defaultdict(list)
    for parameter, probe in _probed(scan):
        if probe.snr:
            grouped[parameter.role, len(parameter.shape)].append((parameter, probe))
    rows = []
    for (role, _), members in grouped.items():
        by_axes: dict[str, list[SnrValue]] = defaultdict(list)
        for parameter, probe in members:
            for value in probe.snr:
                by_axes[axes_label(parameter, value.axes)].append(value)
        medians = {label: _median(v.snr for v in values) for label, values in by_axes.items()}
        finite = {label: snr for label, snr in medians.items() if snr is not None}
        best = max(finite, key=lambda label: finite[label], default=next(iter(by_axes)))
        known = [v.snr for v in by_axes[best] if v.snr is not None]
        rows.append(
            SnrRow(
                role=role,
                count=len(members),
                numel=sum(parameter.numel for parameter, _ in members),
                best=best,
                median_snr=medians[best],
                lowest_snr=min(known, default=None),
                error=_median(v.error for v in by_axes[best]),
                others=tuple((label, snr) for label, snr in finite.items() if label != best),
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.numel, row.role)))


@dataclass(frozen=True)
class HessianRow:
    """Block structure of one role under one partition, averaged over its tensors; ``stderr`` is of that mean."""

    role: str
    partition: str
    estimator: str
    count: int
    num_samples: int
    score: float
    stderr: float


def hessian_rows(scan: Scan) -> tuple[HessianRow, ...]:
    """One row per role, partition and estimator; the best partition of a role first."""
    grouped: dict[tuple[str, str, str], list[HessianValue]] = defaultdict(list)
    numel: dict[str, int] = defaultdict(int)
    for parameter, probe in _probed(scan):
        if probe.hessian:
            numel[parameter.role] += parameter.numel
        for value in probe.hessian:
            grouped[parameter.role, value.partition, value.estimator].append(value)
    rows = [
        HessianRow(
            role=role,
            partition=partition,
            estimator=estimator,
            count=len(values),
            num_samples=min(v.num_samples for v in values),
            score=statistics.fmean(v.score for v in values),
            stderr=math.sqrt(sum(v.stderr**2 for v in values)) / len(values),
        )
        for (role, partition, estimator), values in grouped.items()
    ]
    return tuple(sorted(rows, key=lambda r: (-numel[r.role], r.role, r.estimator, -r.score, r.partition)))


def unknown_reasons(scan: Scan) -> tuple[tuple[str, int, int], ...]:
    """(reason, tensors, elements) of what the probe could not measure, most elements first."""
    counts: dict[str, list[int]] = defaultdict(list)
    for parameter, probe in _probed(scan):
        if probe.unknown is not None:
            counts[probe.unknown].append(parameter.numel)
    return tuple(sorted(((r, len(n), sum(n)) for r, n in counts.items()), key=lambda item: -item[2]))


def _probed(scan: Scan) -> Iterable[tuple[Parameter, ParameterProbe]]:
    by_name = {parameter.name: parameter for parameter in scan.parameters}
    for probe in scan.probe.parameters if scan.probe else ():
        if probe.name in by_name:
            yield by_name[probe.name], probe


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
