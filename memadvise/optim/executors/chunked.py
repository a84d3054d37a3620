"""Boxes of bounded size through one scratch buffer: no temporary of a parameter's size, and good use of the cache.

Where the blocks of a method lie whole within a box (row means, element-wise methods), each box is finished at once:
statistics, new state and update in one visit. Otherwise a first visit sums the statistics over all boxes and a second
applies the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from memadvise.optim.executors import inplace
from memadvise.optim.executors.work import Cuts, Work, box_shape, boxes
from memadvise.optim.method import Hyper, Method, Shape, Tensors, compute_dtype, device_type

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
    cut = box_shape(next(boxes(shape, limit))) if _is_local(method, options, shape, limit) else shape
    factors = sum(math.prod(s) for s in method.sums_spec(cut, options, 0).values()) if method.rounds(options) else 0
    return (_buffers(dtype) * part + 6 * factors) * itemsize


def _is_local(method: Method, options: Any, shape: Shape, limit: int) -> bool:
    """Whether a box holds all that its update depends on."""
    axes = method.reduced_axes(shape, options)
    if axes is None or method.rounds(options) > 1:
        return False
    first = next(boxes(shape, limit))
    return all(first[a].stop - first[a].start == shape[a] for a in axes)


@lru_cache(maxsize=4096)
def _layout(method: Method, options: Any, shape: Shape, limit: int) -> tuple[bool, Cuts]:
    """The same at every step, so made once: for small tensors this costs more than the arithmetic."""
    return _is_local(method, options, shape, limit), Cuts(shape, limit)


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
        """Box-shaped views of the buffer: a temporary, and copies of g and p where those are narrower."""
        flat = self._flat[(work.p.device, compute_dtype(work.p.dtype))]
        size = math.prod(shape)
        return [flat[i * size : (i + 1) * size].view(shape) for i in range(_buffers(work.p.dtype))]


def step(works: Sequence[Work], h: Hyper) -> None:
    """One step of every parameter, one after the other."""
    scratch = _Scratch(works)
    for work in works:
        _Stepper(work, h, scratch).run()


class _Stepper:
    """One parameter cut in boxes: its parts by box, and temporaries by box shape (all the same but the last)."""

    def __init__(self, work: Work, h: Hyper, scratch: _Scratch) -> None:
        self.work, self.h, self.scratch = work, h, scratch
        self.local, self.cuts = _layout(work.method, work.options, work.shape, box_limit(device_type(work.p)))
        self.p, self.g = self.cuts.parts(work.p), self.cuts.parts(work.g)
        self.elementwise = {name: self.cuts.parts(value) for name, value in work.elementwise().items()}
        self.narrow = compute_dtype(work.p.dtype) != work.p.dtype
        self.kernel = inplace.APPLY.get(work.method.name)
        self._temps: dict[Shape, list[Tensor]] = {}

    def run(self) -> None:
        if self.local:
            self._box_by_box()
        else:
            self._in_rounds()

    def _temporaries(self, i: int) -> list[Tensor]:
        shape = self.cuts.shapes[i]
        if shape not in self._temps:
            self._temps[shape] = self.scratch.cut(self.work, shape)
        return self._temps[shape]

    def _gradient(self, i: int, temps: list[Tensor]) -> Tensor:
        return temps[1].copy_(self.g[i]) if self.narrow else self.g[i]

    def _taken(self, tensors: Tensors) -> dict[str, Sequence[Tensor]]:
        """Factor-sized tensors, cut to the boxes they belong to."""
        method = self.work.method
        if type(method).take is Method.take:
            return {name: self.cuts.parts(value) for name, value in tensors.items()}
        return {name: [method.take(name, value, box) for box in self.cuts.boxes] for name, value in tensors.items()}

    def _box_by_box(self) -> None:
        work, h = self.work, self.h
        method, options = work.method, work.options
        rounds, scalars, factors = method.rounds(options), work.scalars, self._taken(work.factors())
        for i, shape in enumerate(self.cuts.shapes):
            temps = self._temporaries(i)
            g = self._gradient(i, temps)
            sums = inplace.stats(method, g, options, scalars, 0, temps[0]) if rounds else {}
            state = {name: parts[i] for name, parts in factors.items()}
            small, new = method.finish(sums, state, scalars, h, shape, options, 0)
            for name, value in new.items():
                state[name].copy_(value)
            self._apply(i, g, small, temps)

    def _in_rounds(self) -> None:
        work = self.work
        method, options, small, factors = work.method, work.options, work.scalars, work.factors()
        rounds, dtype = method.rounds(options), compute_dtype(work.p.dtype)
        for round_ in range(max(rounds, 1)):
            spec = method.sums_spec(work.shape, options, round_) if rounds else {}
            totals = {name: torch.zeros(size, device=work.p.device, dtype=dtype) for name, size in spec.items()}
            parts, smalls = self._taken(totals), self._taken(small)
            for i in range(len(self.cuts.shapes) if rounds else 0):
                temps = self._temporaries(i)
                box_small = {name: values[i] for name, values in smalls.items()}
                sums = inplace.stats(method, self._gradient(i, temps), options, box_small, round_, temps[0])
                for name, value in sums.items():
                    parts[name][i].add_(value)
            small, new = method.finish(totals, factors, small, self.h, work.shape, options, round_)
            del totals, parts, smalls
            for name, value in new.items():
                factors[name].copy_(value)
        smalls = self._taken(small)
        for i in range(len(self.cuts.shapes)):
            temps = self._temporaries(i)
            self._apply(i, self._gradient(i, temps), {name: values[i] for name, values in smalls.items()}, temps)

    def _apply(self, i: int, g: Tensor, small: Tensors, temps: list[Tensor]) -> None:
        work, target = self.work, self.p[i]
        p = temps[2].copy_(target) if self.narrow else target
        state = {name: parts[i] for name, parts in self.elementwise.items()}
        if self.kernel is not None:
            self.kernel(p, g, state, small, self.h, work.options, temps[0])
        else:
            new, changed = work.method.apply(p, g, state, small, self.h, work.options)
            p.copy_(new)
            for name, value in changed.items():
                state[name].copy_(value)
        if self.narrow:
            target.copy_(p)
