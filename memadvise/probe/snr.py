"""Signal-to-noise ratio of Adam's second moment along sets of axes (SlimAdam, arXiv 2503.01843).

``SNR_K(V) = mean over slices of mean_K(V)^2 / Var_K(V)`` with the population variance. For one slice
``1 / (1 + SNR)`` is exactly the share of ``||V||^2`` that is lost when the slice is replaced by its mean, so SNR > 1
means that the mean explains more than half of it. The attainable ceiling depends on beta2: independent Gaussian
gradients give 0.5 at step 1 and ``(1 + beta2) / (2 (1 - beta2))`` in the steady state.

Sums and sums of squares are taken in float64 over chunks of the first axis: the temporaries are a few MB whatever the
tensor's size, and ``E[V^2] - E[V]^2`` is exact to about 1e-15, far below the 1e-6 that the cap on a slice resolves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from memadvise.errors import UsageError
from memadvise.ledger import SnrValue

SNR_CAP = 1e6  # a slice without variance is perfectly compressible, yet must not make the mean infinite
_CHUNK = 2**17  # elements converted to float64 at a time: 1 MB, twice (values and squares), which stays in the cache
_MAX_NDIM = 5  # 31 axis sets; beyond that only single axes and all of them


@dataclass(frozen=True)
class SliceSnr:
    """SNR of one tensor along one axis set at one step: over slices the mean, the median, the mean of 1/(1+SNR).

    All None when no slice says anything: none was ever touched (mean = variance = 0) or the axes have size 1.
    """

    snr: float | None
    median: float | None
    error: float | None


_NOTHING = SliceSnr(None, None, None)

SnrRule = Literal["cutoff", "official"]
# What is taken of the axis sets above the cutoff: the largest slices, as the paper's text has it and the comment in its
# code, or the highest SNR, as that code does.
SNR_RULES: dict[SnrRule, Literal["max_compression", "max_snr"]] = {"cutoff": "max_compression", "official": "max_snr"}


def axis_sets(ndim: int) -> tuple[tuple[int, ...], ...]:
    """Every non-empty set of axes, fewer axes first: 2 -> ``((0,), (1,), (0, 1))``; 4 -> 15 sets."""
    if ndim > _MAX_NDIM:
        return (*((axis,) for axis in range(ndim)), tuple(range(ndim)))
    return tuple(axes for count in range(1, ndim + 1) for axes in combinations(range(ndim), count))


def snr(v: Tensor, axes: Sequence[int]) -> SliceSnr:
    """SNR of ``v`` along ``axes`` (0 <= axis < ndim): one ratio per slice of the other axes, then their mean.

    Raises:
        UsageError: an axis out of range, twice, or none at all.
    """
    wanted = tuple(sorted(axes))
    if not wanted or len(set(wanted)) != len(wanted) or wanted[0] < 0 or wanted[-1] >= v.ndim:
        raise UsageError(f"the axes {list(axes)} are not distinct axes of a tensor of shape {tuple(v.shape)}")
    return _measure(v, (wanted,))[wanted]


def snr_all(v: Tensor) -> dict[tuple[int, ...], SliceSnr]:
    """:func:`snr` for every set of :func:`axis_sets`, in one pass over ``v``; empty for a scalar."""
    return _measure(v, axis_sets(v.ndim))


def _measure(v: Tensor, wanted: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], SliceSnr]:
    if v.ndim == 0 or v.numel() == 0:
        return dict.fromkeys(wanted, _NOTHING)
    sums = _sums(v.detach(), wanted)
    result = {}
    for axes in wanted:
        count = math.prod(v.shape[axis] for axis in axes)
        result[axes] = _summarise(*sums[axes], count) if count > 1 else _NOTHING
    return result


def _sums(v: Tensor, wanted: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
    """Per axis set the sum of v and of v^2 over those axes, as flat float64 tensors over the slices.

    Sets with axis 0 add up over chunks of rows; the others are complete within a chunk. Within a chunk a set is
    reduced from the set without its last axis, so a matrix is read once for all three of its sets.
    """
    inner = sorted({tuple(axis for axis in axes if axis != 0) for axes in wanted}, key=len)
    with_first = {axes for axes in wanted if axes[0] == 0}
    added: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    pieces: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {axes: [] for axes in wanted if axes[0] != 0}
    rows = max(1, _CHUNK // max(1, v[0].numel()))
    for start in range(0, v.shape[0], rows):
        chunk = v[start : start + rows].to(torch.float64)
        partial: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {(): (chunk, chunk * chunk)}
        for axes in inner:
            if axes and axes not in partial:
                parent = axes[:-1] if axes[:-1] in partial else ()
                remaining = [axis for axis in axes if axis not in parent]
                first, second = partial[parent]
                partial[axes] = (first.sum(remaining, keepdim=True), second.sum(remaining, keepdim=True))
            first, second = partial[axes]
            if axes in pieces:
                pieces[axes].append((first.flatten(), second.flatten()))
            whole = (0, *axes)
            if whole in with_first:
                first, second = first.sum(0).flatten(), second.sum(0).flatten()
                if whole in added:
                    first, second = first + added[whole][0], second + added[whole][1]
                added[whole] = (first, second)
    joined = {axes: tuple(torch.cat(column) for column in zip(*parts, strict=True)) for axes, parts in pieces.items()}
    return {**added, **{axes: (first, second) for axes, (first, second) in joined.items()}}


def _summarise(first: Tensor, second: Tensor, count: int) -> SliceSnr:
    mean = first / count
    square = mean * mean
    variance = (second / count - square).clamp_min(0.0)
    ratio = torch.where(variance * SNR_CAP > square, square / variance, torch.full_like(square, SNR_CAP))
    known = torch.isfinite(second) & (square + variance > 0)
    ratio = ratio[known]
    if ratio.numel() == 0:
        return _NOTHING
    middle = ratio.numel() // 2
    low = ratio.kthvalue((ratio.numel() - 1) // 2 + 1).values
    high = ratio.kthvalue(middle + 1).values
    return SliceSnr(ratio.mean().item(), ((low + high) / 2).item(), (1 / (1 + ratio)).mean().item())


class SnrTrajectory:
    """Plain mean of :func:`snr_all` over the recorded steps; steps in which a set says nothing are left out."""

    def __init__(self) -> None:
        self._steps: dict[tuple[int, ...], list[SliceSnr]] = {}

    def add(self, v: Tensor) -> None:
        """Record the second moment of one step."""
        for axes, value in snr_all(v).items():
            self._steps.setdefault(axes, []).append(value)

    @property
    def num_steps(self) -> int:
        """How many steps were recorded."""
        return max((len(steps) for steps in self._steps.values()), default=0)

    def values(self) -> tuple[SnrValue, ...]:
        """One record per axis set, in the order of :func:`axis_sets`."""
        return tuple(
            SnrValue(
                axes,
                _mean([step.snr for step in steps]),
                _mean([step.median for step in steps]),
                _mean([step.error for step in steps]),
            )
            for axes, steps in self._steps.items()
        )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def rules_from_snr(
    values: Sequence[SnrValue],
    cutoff: float = 1.0,
    policy: Literal["max_snr", "max_compression"] = "max_snr",
    *,
    shape: Sequence[int] | None = None,
) -> tuple[int, ...] | None:
    """SlimAdam's rule for one tensor: the axes to average v over, or None to keep it dense (arXiv 2503.01843).

    Axis sets with SNR above ``cutoff`` qualify; ``max_snr`` takes the highest SNR (as the official code does),
    ``max_compression`` the largest slices (by ``shape`` if given, else by number of axes), ties by SNR.
    Vectors stay dense: their v is small and their SNR low.
    """
    if not any(axis > 0 for value in values for axis in value.axes):
        return None
    above = [(value.snr, value.axes) for value in values if value.snr is not None and value.snr > cutoff]
    if not above:
        return None
    if policy == "max_snr":
        return max(above, key=lambda item: (item[0], -len(item[1])))[1]

    def saved(axes: tuple[int, ...]) -> int:
        return math.prod(shape[axis] for axis in axes) if shape is not None else len(axes)

    return max(above, key=lambda item: (saved(item[1]), item[0]))[1]
