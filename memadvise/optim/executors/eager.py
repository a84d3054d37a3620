"""The oracle: a method's pure functions as they stand, whole tensors, nothing in place until the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from memadvise.optim.executors.work import Work
from memadvise.optim.method import Hyper, Shape, compute_dtype


def step(works: Sequence[Work], h: Hyper) -> None:
    """One step of every parameter, one after the other."""
    for work in works:
        _step_one(work, h)


def _step_one(work: Work, h: Hyper) -> None:
    method, options, dtype = work.method, work.options, compute_dtype(work.p.dtype)
    p, g = work.p.to(dtype), work.g.to(dtype)
    small = work.scalars
    for round_ in range(max(method.rounds(options), 1)):
        sums = method.stats(g, options, small=small, round_=round_) if method.rounds(options) else {}
        small, factors = method.finish(sums, work.factors(), small, h, work.shape, options, round_)
        for name, value in factors.items():
            _store(work.state[name], value)
    p, elementwise = method.apply(p, g, work.elementwise(), small, h, options)
    _store(work.p, p)
    for name, value in elementwise.items():
        _store(work.state[name], value)


def _store(target: Tensor, value: Tensor) -> None:
    placements = getattr(target, "placements", None)
    if placements is not None:  # a DTensor: what it computed may be sharded in another way
        value = value.redistribute(placements=placements)  # type: ignore[attr-defined]
    target.copy_(value)


def scratch_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """An upper bound of the temporaries of one step: copies of p and g, and six of the expressions of a method."""
    return 8 * math.prod(shape) * compute_dtype(dtype).itemsize
