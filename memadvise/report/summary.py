"""From a scan's ledgers to the rows of its tables: pure data, so that text and HTML show the same numbers."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memadvise.ledger import HessianValue, MemoryLedger, Parameter, ParameterProbe, Scan, SnrValue
from memadvise.names import repeat_pattern
from memadvise.units import format_bytes

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


@dataclass(frozen=True)
class DeviceRow:
    """One part of what the device must hold: at least, and to be comfortable; ``source`` says where it comes from."""

    name: str
    needed_bytes: int
    comfortable_bytes: int
    source: str


def device_rows(ledger: MemoryLedger) -> tuple[DeviceRow, ...]:
    """Live tensors, what the allocator caches beyond them, and each line of overhead; they add up to
    ``needed_bytes`` and ``comfortable_bytes``. Empty where neither allocator nor overhead is known (the CPU).
    """
    if not (ledger.reserved or ledger.overhead):
        return ()
    rows = [DeviceRow("live tensors at the peak", ledger.peak_bytes, ledger.peak_bytes, f"{ledger.peak_phase} phase")]
    if ledger.reserved:
        rest = max(0, ledger.allocated_bytes - ledger.peak_bytes)
        if rest:
            rows.append(DeviceRow("rests of blocks too small to split", rest, rest, "with them: max_memory_allocated"))
        cached = max(0, ledger.reserved[0].peak_reserved_bytes - ledger.peak_bytes - rest)
        said = "; ".join(f"{r.settings}: {format_bytes(r.peak_reserved_bytes)} reserved" for r in ledger.reserved)
        rows.append(DeviceRow("reserved beyond them", 0, cached, f"allocator simulated, {said}"))
    rows += [DeviceRow(line.name, line.low_bytes, line.high_bytes, line.source) for line in ledger.overhead]
    return tuple(rows)


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
class DepthRow:
    """SNR of one role's tensors along one axis set, in the order of the model, and what the rule averages."""

    role: str
    axes: str
    snr: tuple[float | None, ...]
    averaged: str


def depth_rows(scan: Scan) -> tuple[DepthRow, ...]:
    """One row for every role of several matrices, along its best axes (:func:`snr_rows`), largest role first."""
    best = {row.role: row.best for row in snr_rows(scan) if row.count > 1}
    members: dict[str, list[tuple[Parameter, ParameterProbe]]] = defaultdict(list)
    for parameter, probe in _probed(scan):
        if probe.snr and len(parameter.shape) > 1 and parameter.role in best:
            members[parameter.role].append((parameter, probe))
    rows = []
    for role, axes in best.items():
        if role not in members:
            continue
        along = [{axes_label(p, v.axes): v.snr for v in probe.snr} for p, probe in members[role]]
        chosen = Counter(
            axes_label(p, probe.snr_axes) if probe.snr_axes is not None else "nothing" for p, probe in members[role]
        )
        averaged = ", ".join(f"{label} in {count}" if len(chosen) > 1 else label for label, count in chosen.items())
        rows.append(DepthRow(role, axes, tuple(found.get(axes) for found in along), averaged))
    return tuple(rows)


@dataclass(frozen=True)
class PartitionRow:
    """Which blocks of a role's tensors may share a second moment, and why: measured or a prior."""

    role: str
    count: int
    partition: str
    evidence: str


def partition_rows(scan: Scan) -> tuple[PartitionRow, ...]:
    """One row per role, partition and kind of evidence; the evidence is that of the first tensor."""
    grouped: dict[tuple[str, str, bool], list[ParameterProbe]] = defaultdict(list)
    for parameter, probe in _probed(scan):
        if probe.partition is not None:
            grouped[parameter.role, probe.partition, probe.partition_measured].append(probe)
    return tuple(
        PartitionRow(role, len(members), partition, members[0].partition_evidence or "-")
        for (role, partition, _), members in grouped.items()
    )


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
