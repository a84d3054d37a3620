"""Boxes of bounded size through one scratch buffer: no temporary of a parameter's size, and good use of the cache.

Where the blocks of a method lie whole within a box (row means, element-wise methods), each box is finished at once:
statistics, new state and update in one visit. Otherwise a first visit sums the statistics over all boxes and a second
applies the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memadvise.optim.executors import inplace
from memadvise.optim.executors.work import Work, box_shape, boxes
from memadvise.optim.method import Box, Hyper, Method, Shape, Tensors, compute_dtype, device_type

CPU_ELEMENTS = 256 * 1024  # 1 MiB of float32: a few of these lie in a core's L2 cache
CUDA_ELEMENTS = 16 * 1024 * 1024  # enough work to hide the launches, 64 MiB of float32


def box_limit(kind: str) -> int:
    """Elements a box on a device of ``kind``."""
    return CUDA_ELEMENTS if kind == "cuda" else CPU_ELEMENTS


def _buffers(dtype: torch.dtype) -> int:
    """One temporary, and float32 copies of p and g where those are narrower."""
    return 1 if compute_dtype(dtype) == dtype else 3


def scratch_bytes(method: Method, options: Any, shape: Shape, dtype: torch.dtype, kind: str) -> int:
    """Upper bound of what a step on a parameter allocates: the scratch, and a handful of factor-sized tensors."""
    limit, itemsize = box_limit(kind), compute_dtype(dtype).itemsize
    part = min(limit, math.prod(shape))
    if method.name not in inplace.APPLY:
        return (_buffers(dtype) + 6) * part * itemsize
    whole = _is_local(method, options, shape, limit)
    cut = shape if whole is None or not whole else box_shape(next(boxes(shape, limit)))
    factors = sum(math.prod(s) for s in method.sums_spec(cut, options, 0).values()) if method.rounds(options) else 0
    return (_buffers(dtype) * part + 6 * factors) * itemsize


def _is_local(method: Method, options: Any, shape: Shape, limit: int) -> bool:
    axes = method.reduced_axes(shape, options)
    if axes is None:
        return False
    first = next(boxes(shape, limit))
    return all(first[a].stop - first[a].start == shape[a] for a in axes)


class _Scratch:
    """One flat buffer for each (device, dtype) of a step, cut into box-shaped temporaries; freed after the step."""

    def __init__(self, works: Sequence[Work]) -> None:
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        for work in works:
            key = (work.p.device, compute_dtype(work.p.dtype))
            part = min(box_limit(device_type(work.p)), work.p.numel())
            sizes[key] = max(sizes.get(key, 0), _buffers(work.p.dtype) * part)
        self._flat = {key: torch.empty(size, device=key[0], dtype=key[1]) for key, size in sizes.items()}

    def cut(self, work: Work, shape: Shape) -> list[Tensor]:
        flat = self._flat[(work.p.device, compute_dtype(work.p.dtype))]
        size = math.prod(shape)
        return [flat[i * size : (i + 1) * size].view(shape) for i in range(_buffers(work.p.dtype))]


def step(works: Sequence[Work], h: Hyper) -> None:
    """One step of every parameter, one after the other."""
    scratch = _Scratch(works)
    for work in works:
        _step_one(work, h, scratch)


def _step_one(work: Work, h: Hyper, scratch: _Scratch) -> None:
    method, options, shape = work.method, work.options, work.shape
    limit = box_limit(device_type(work.p))
    small, factors = work.scalars, work.factors()
    rounds = method.rounds(options)
    if _is_local(method, options, shape, limit) and rounds <= 1:
        for box in boxes(shape, limit):
            cut = box_shape(box)
            temp, *copies = scratch.cut(work, cut)
            g = _load(work.g[box], copies[:1])
            part = {name: method.take(name, value, box) for name, value in factors.items()}
            sums = inplace.stats(method, g, options, small, 0, temp) if rounds else {}
            box_small, new = method.finish(sums, part, small, h, cut, options, 0)
            for name, value in new.items():
                part[name].copy_(value)
            _apply(work, box, g, box_small, h, temp, copies[1:])
        return
    for round_ in range(max(rounds, 1)):
        totals = {
            name: torch.zeros(size, device=work.p.device, dtype=compute_dtype(work.p.dtype))
            for name, size in (method.sums_spec(shape, options, round_) if rounds else {}).items()
        }
        for box in boxes(shape, limit) if rounds else ():
            temp, *copies = scratch.cut(work, box_shape(box))
            g = _load(work.g[box], copies[:1])
            box_small = {name: method.take(name, value, box) for name, value in small.items()}
            for name, value in inplace.stats(method, g, options, box_small, round_, temp).items():
                method.take(name, totals[name], box).add_(value)
        small, new = method.finish(totals, factors, small, h, shape, options, round_)
        del totals
        for name, value in new.items():
            factors[name].copy_(value)
    for box in boxes(shape, limit):
        temp, *copies = scratch.cut(work, box_shape(box))
        g = _load(work.g[box], copies[:1])
        box_small = {name: method.take(name, value, box) for name, value in small.items()}
        _apply(work, box, g, box_small, h, temp, copies[1:])


def _load(part: Tensor, copy: list[Tensor]) -> Tensor:
    return copy[0].copy_(part) if copy else part


def _apply(work: Work, box: Box, g: Tensor, small: Tensors, h: Hyper, temp: Tensor, copy: list[Tensor]) -> None:
    target = work.p[box]
    p = _load(target, copy)
    state = {name: value[box] for name, value in work.elementwise().items()}
    kernel = inplace.APPLY.get(work.method.name)
    if kernel is not None:
        kernel(p, g, state, small, h, work.options, temp)
    else:
        new, changed = work.method.apply(p, g, state, small, h, work.options)
        p.copy_(new)
        for name, value in changed.items():
            state[name].copy_(value)
    if copy:
        target.copy_(p)
