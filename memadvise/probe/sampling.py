"""Which part of a large tensor stands for all of it in the shadows, so that watching costs little beside training.

Up to :data:`LIMIT` elements (:data:`TABLE_LIMIT` of a table) a tensor is watched whole. Of a larger one every
so-many-th row and column is kept, one drawn from each run of neighbours: a smaller matrix of the same kind, with every
attention head in it. Rows of token tables are no equals: a few tokens get most of the gradient. Half of the rows kept
there are those of the largest first gradient, for themselves; the other half stands for all other rows, drawn evenly
over their order by size. What keeps its state by row is then seen as it is, factors nearly so; a mean over the tokens,
which a hard rule forbids, is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memadvise.advise.rules import TOKEN_ROLES, token_axis
from memadvise.errors import OptimizerError
from memadvise.ledger import Parameter
from memadvise.optim.registry import validate
from memadvise.plan.schema import Setting

LIMIT = 5 * 2**14  # elements: some 300 KB of float32 for each tensor of state
TABLE_LIMIT = 5 * 2**15  # of tables and heads: some two hundred tokens of usual widths


@dataclass(frozen=True, eq=False)
class Sample:
    """The kept indices of every axis (None: all), and how many elements of the whole each kept one stands for."""

    index: tuple[Tensor | None, ...]
    weight: Tensor | float

    def take(self, tensor: Tensor) -> Tensor:
        """The kept part of a tensor of the parameter's shape; the tensor itself if that is all of it."""
        for axis, index in enumerate(self.index):
            if index is not None:
                tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor


def limit_of(parameter: Parameter) -> int:
    """The most elements of a tensor that are watched."""
    return TABLE_LIMIT if parameter.role in TOKEN_ROLES else LIMIT


def strides_of(parameter: Parameter, settings: Sequence[Setting]) -> tuple[int, ...]:
    """One of how many neighbours is kept along each axis: powers of two, 1 where nothing is left out.

    The longest axis is halved until :func:`limit_of` elements are left, but never so that rows of a head (or of a
    segment of a fused matrix) would be counted to another, and not at all where a candidate would not fit what is left.
    """
    strides, limit = [1] * len(parameter.shape), limit_of(parameter)
    units = {axis: _unit(parameter, settings, axis) for axis in range(len(strides))}

    def kept(axis: int) -> int:
        return parameter.shape[axis] // strides[axis]

    while len(strides) > 1 and math.prod(map(kept, range(len(strides)))) > limit:
        free = [a for a in range(len(strides)) if kept(a) >= 4 and units[a] % (2 * strides[a]) == 0]
        if not free:
            break
        strides[max(free, key=kept)] *= 2
    shape = kept_shape(parameter.shape, strides)
    try:
        for setting in settings:
            validate(fitted_to(setting, strides), shape, name=parameter.name)
    except OptimizerError:
        return (1,) * len(strides)
    return tuple(strides)


def kept_shape(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The shape of what :func:`strides_of` leaves."""
    return tuple(size // stride for size, stride in zip(shape, strides, strict=True))


def _unit(parameter: Parameter, settings: Sequence[Setting], axis: int) -> int:
    """Rows of a head along ``axis``, which a stride must divide; 0 (divisible by all) where there are no heads."""
    units = []
    for setting in settings:
        if setting.options.get("partition") == "head" and setting.options.get("axis", 0) == axis:
            segments = setting.options.get("segments") or [[0, parameter.shape[axis], setting.options.get("heads")]]
            for start, stop, heads in segments:
                units += [start, stop, (stop - start) // (heads or 1) if heads else 0]
    return math.gcd(*units)


def fitted_to(setting: Setting, strides: Sequence[int]) -> Setting:
    """``setting`` for the kept part: segments begin and end earlier there."""
    segments = setting.options.get("segments")
    if not segments:
        return setting
    stride = strides[setting.options.get("axis", 0)]
    fewer = [[start // stride, stop // stride, heads] for start, stop, heads in segments]
    return Setting(setting.method, {**setting.options, "segments": fewer})


def draw(parameter: Parameter, strides: Sequence[int], first: Tensor, seed: int) -> Sample:
    """Choose the indices.

    Args:
        parameter: what is to be sampled.
        strides: of :func:`strides_of`.
        first: its first gradient or second moment, of the whole shape; says which tokens are frequent.
        seed: of the choice; the same for every pass of a probe.
    """
    generator = torch.Generator().manual_seed(seed)
    table = token_axis(parameter) if parameter.role in TOKEN_ROLES else None
    index: list[Tensor | None] = []
    weight: Tensor | float = 1.0
    for axis, (size, stride) in enumerate(zip(parameter.shape, strides, strict=True)):
        if stride == 1:
            index.append(None)
        elif axis == table:
            rows, counts = _heavy_first(first, axis, size // stride, generator)
            index.append(rows)
            weight = weight * counts.to(first.device).view([-1 if a == axis else 1 for a in range(len(strides))])
        else:
            runs = torch.arange(size // stride) * stride
            index.append(runs + torch.randint(0, stride, runs.shape, generator=generator))
            weight = weight * (size / len(runs))
    return Sample(tuple(index), weight)


def _heavy_first(first: Tensor, axis: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` rows, in order, and how many rows of the table each stands for."""
    others = [a for a in range(first.ndim) if a != axis]
    sizes = torch.linalg.vector_norm(first.detach(), dim=others, dtype=torch.float32).cpu()
    shuffled = torch.randperm(len(sizes), generator=generator)  # untouched rows are all alike: not the first of them
    order = shuffled[sizes[shuffled].argsort(descending=True, stable=True)]
    certain, rest = order[: count // 2], order[count // 2 :]
    drawn = count - len(certain)
    start = torch.rand((), generator=generator)
    places = ((torch.arange(drawn) + start) * (len(rest) / drawn)).long().clamp(max=len(rest) - 1)
    rows = torch.cat([certain, rest[places]])
    counts = torch.cat([torch.ones(len(certain)), torch.full((drawn,), len(rest) / drawn)])
    by_number = rows.argsort()
    return rows[by_number], counts[by_number]
