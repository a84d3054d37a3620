"""Adam with one second moment a block (arXiv 2406.16793 Alg. 1, 2503.01843), AdamW where a block is one element."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Blocks = list[list[int]]  # numbers of elements, in row-major order


def run(
    p: Tensor,
    grads: Sequence[Tensor],
    blocks: Blocks,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> list[Tensor]:
    (b1, b2), shape = betas, p.shape
    x = p.double().flatten().tolist()
    m = [0.0] * len(x)
    v = [0.0] * len(blocks)
    seen = []
    for t, grad in enumerate(grads, start=1):
        g = grad.double().flatten().tolist()
        for number, block in enumerate(blocks):
            mean = math.fsum(g[i] * g[i] for i in block) / len(block)
            v[number] = b2 * v[number] + (1 - b2) * mean
            for i in block:
                m[i] = b1 * m[i] + (1 - b1) * g[i]
                x[i] -= lr * weight_decay * x[i]
                x[i] -= lr * (m[i] / (1 - b1**t)) / (math.sqrt(v[number] / (1 - b2**t)) + eps)
        seen.append(torch.tensor(x, dtype=torch.float64).reshape(shape))
    return seen


def _grouped(shape: Sequence[int], key: Callable[[tuple[int, ...]], object]) -> Blocks:
    groups: dict[object, list[int]] = {}
    for number, index in enumerate(itertools.product(*(range(size) for size in shape))):
        groups.setdefault(key(index), []).append(number)
    return list(groups.values())


def each(shape: Sequence[int]) -> Blocks:
    return _grouped(shape, lambda index: index)


def over_axes(shape: Sequence[int], axes: Sequence[int]) -> Blocks:
    return _grouped(shape, lambda index: tuple(i for a, i in enumerate(index) if a not in axes))


def partition(
    shape: Sequence[int],
    partition: str = "row",
    heads: int | None = None,
    segments: Sequence[Sequence[int]] = (),
    axis: int = 0,
) -> Blocks:
    def key(index: tuple[int, ...]) -> object:
        if partition == "whole":
            return ()
        if len(shape) == 3:  # a stack of matrices [E, out, in]
            return (index[0], index[2]) if partition == "column" else index[:2]
        row = index[axis]
        if partition == "column":
            return index[:axis] + index[axis + 1 :]
        for start, stop, number in segments:
            if start <= row < stop:
                return (start, (row - start) * number // (stop - start) if number else row)
        return row * heads // shape[axis] if heads else row

    return _grouped(shape, key)
