"""Scratch of CUDA's reductions: partial results of an output that several thread blocks share.

Sums over the rows of a tall matrix (the gradient of a bias, above all) are split between blocks, and each thread keeps
a partial result in global memory: for a bias of 4,096 elements and 2,048 tokens that is 64 MiB. The launch
configuration follows ``setReduceConfig`` (aten/src/ATen/native/cuda/Reduce.cuh); measured on an H200 with torch 2.11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from memadvise.memory.architecture import DeviceModel

_aten = torch.ops.aten
_MOST_THREADS, _WARP = 512, 32
_LEAST_VALUES, _MOST_VALUES = 16, 256  # of one thread
_WIDEST_VECTOR = 4
_SEMAPHORE = 4  # bytes
_LARGEST_OFFSET = 2**31 - 1  # bytes from the first element that one kernel counts in 32 bits


@dataclass(frozen=True)
class _Axis:
    """Some neighbouring dimensions as one."""

    size: int
    stride: int
    reduced: bool


def scratch(x: torch.Tensor, dims: Sequence[int], model: DeviceModel) -> list[int]:
    """Bytes that a sum of ``x`` over ``dims`` (all of them if empty) takes while it runs; empty for most.

    Args:
        x: the input.
        dims: as the operation gets them.
        model: the device; the number of its multiprocessors decides.
    """
    if x.layout is not torch.strided or not x.numel():
        return []
    axes = _coalesced(x, {d % max(1, x.ndim) for d in dims} or set(range(x.ndim)))
    while sum((axis.size - 1) * axis.stride for axis in axes) * x.itemsize > _LARGEST_OFFSET:  # halves, one by one
        at = max(range(len(axes)), key=lambda i: (axes[i].size - 1) * axes[i].stride)
        axes[at] = replace(axes[at], size=-(-axes[at].size // 2))
    inputs = math.prod(axis.size for axis in axes if axis.reduced)
    outputs = math.prod(axis.size for axis in axes if not axis.reduced)
    if inputs <= 1:
        return []
    fastest = min(axes, key=lambda axis: axis.stride)
    vector = 1
    if not fastest.reduced and fastest.stride == 1:
        vector = next(n for n in (_WIDEST_VECTOR, 2, 1) if _divides(n, axes, fastest))
    width, height = (inputs, outputs) if fastest.reduced else (outputs // vector, inputs)
    if fastest.reduced and len(axes) == 1 and inputs > 128 and fastest.stride == 1:
        width //= _WIDEST_VECTOR
    width, height = _block(width, height, _MOST_THREADS // vector)
    step = width if fastest.reduced else 1
    step_output = 1 if fastest.reduced else width
    values = -(-inputs // step)
    if values < min(height * 16, _MOST_VALUES):
        return []  # each warp has outputs of its own
    values = -(-values // height)
    target = model.architecture.num_sms * (model.architecture.threads_per_sm // (width * height))
    grid = -(-(outputs // vector) // step_output)
    if values < _MOST_VALUES or grid > target:
        return []
    blocks = max(min(-(-target // grid), -(-values // _LEAST_VALUES)), -(-values // _MOST_VALUES))
    if blocks <= 1:
        return []
    partial = _itemsize(x.dtype) * outputs * blocks * (1 if fastest.reduced else width * vector)
    return [partial, _SEMAPHORE * grid]


def _itemsize(dtype: torch.dtype) -> int:
    """Bytes of a sum while it is made: of floats in float32 at the least, of integers in int64."""
    return max(dtype.itemsize, 4 if dtype.is_floating_point else 8)


def _coalesced(x: torch.Tensor, dims: set[int]) -> list[_Axis]:
    """The dimensions of ``x``, innermost first, those that lie in memory as one and go the same way joined."""
    found: list[_Axis] = []
    order = sorted((d for d in range(x.ndim) if x.shape[d] != 1), key=lambda d: (x.stride(d), -d))
    for d in order:
        axis = _Axis(x.shape[d], x.stride(d), d in dims)
        last = found[-1] if found else None
        if last and last.reduced == axis.reduced and axis.stride == last.size * last.stride:
            found[-1] = _Axis(last.size * axis.size, last.stride, axis.reduced)
        else:
            found.append(axis)
    return found or [_Axis(1, 1, True)]


def _divides(vector: int, axes: Sequence[_Axis], fastest: _Axis) -> bool:
    """Whether ``vector`` neighbours can be read at once wherever a row begins."""
    return fastest.size % vector == 0 and all(a.stride % vector == 0 for a in axes if a is not fastest)


def _block(width: int, height: int, threads: int) -> tuple[int, int]:
    """Threads of a block in both directions: powers of two."""
    wide, high = (1 << (min(max(1, n), threads).bit_length() - 1) for n in (width, height))
    height = min(high, threads // min(wide, _WARP))
    return min(wide, threads // height), height


def of_sum(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """``sum`` and ``mean``, over all dimensions or some: ``(x, dims, ...)``."""
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    return scratch(args[0], [dims] if isinstance(dims, int) else list(dims or ()), model)


FORMULAS = {
    _aten.sum.dim_IntList: of_sum,
    _aten.sum.default: of_sum,
    _aten.mean.dim: of_sum,
    _aten.mean.default: of_sum,
}
