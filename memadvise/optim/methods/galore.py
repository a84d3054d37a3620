"""GaLore (arXiv 2403.03507): Adam in the leading singular subspace of the gradient.

With channels on the larger side (n) of a matrix and P, [m, r], the top r singular vectors of G on the smaller side,
computed anew every ``update_every`` steps T::

    R = G P;  M <- b1 M + (1 - b1) R;  V <- b2 V + (1 - b2) R^2
    N = M / (1 - b1^t) / (sqrt(V) / sqrt(1 - b2^t) + eps)
    p <- p (1 - lr wd) - lr scale N P^T

M and V are not rotated into the new subspace, as in the paper (V could not be); a new singular vector has the sign that
agrees with the old one in its place.

P is made of the top eigenvectors of the Gram matrix of the smaller side, m x m, summed in float64 over blocks of the
gradient. The factors of an SVD, n x m and m x m, are never made, let alone kept: a stored slice of one keeps all of it
in memory. float64 because the Gram matrix squares singular values: in float32 those below 3e-4 of the largest
would be noise. Such a step takes some 40 m^2 bytes beside, once in T steps, for one matrix at a time. With ``stagger``
(the default) each matrix has its turn at a step of its own, by a hash of the parameter's name: no step pays for all.
The first step makes P for every matrix.

A gradient of zeros gives a valid P (unit vectors), kept until the next turn. Where it holds NaN or inf (or overflows
when squared) the old P stays; R, the moments and the weights then take NaN on, as in torch. Caution works on N P^T.

State: of a matrix, in float32, 4 (2 n r + m r) bytes, and 4 for the step: more than AdamW's where r is above 2 m / 3 of
a square matrix. Other steps take 4 (3 n r) bytes beside. Matrices with a side of 1 keep AdamW's state.

Defaults are the paper's: lr 0.01, scale 0.25, betas (0.9, 0.999), eps 1e-6, no weight decay; a rank of a quarter of the
smaller side (the paper: 128 to 1024). Embeddings, heads and vectors are meant to stay with AdamW.

Deviations from the official code: P by eigenvectors, signs and turns as above, weight decay before the update, eps
added after bias correction, float32 state for every parameter dtype. ``compat: official`` puts eps and decay back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memadvise.optim.method import (
    Box,
    Context,
    OptionProblem,
    Part,
    Shape,
    StateSpec,
    Tensors,
    Visit,
    is_number,
)
from memadvise.optim.methods.blockmean import COMPAT_HELP, update_bound
from memadvise.optim.methods.projected import Moments, Projected, ProjectedOptions, Sides, check_rank, moments

_BLOCKS = 8  # the gradient is seen in so many blocks of rows for its Gram matrix
_LEAST_ROWS = 32


@dataclass(frozen=True)
class GaLoreOptions(ProjectedOptions):
    """``rank``: None for a quarter of the smaller side; ``stagger``: each matrix has its own turn."""

    rank: int | None = None
    scale: float = 0.25
    stagger: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)
        if not is_number(self.scale) or self.scale <= 0:
            raise OptionProblem("scale", f"scale should be a number above 0, found {self.scale!r}")
        if not isinstance(self.stagger, bool):
            raise OptionProblem("stagger", f"stagger should be true or false, found {self.stagger!r}")


class GaLore(Projected):
    """Adam in the leading singular subspace of the gradient."""

    name = "galore"
    summary = "Adam in the leading singular subspace of the gradient"
    source = "arXiv 2403.03507"
    options_type = GaLoreOptions
    options_help: ClassVar[dict[str, str]] = {
        "rank": "of the subspace; by default a quarter of the smaller side",
        "scale": "factor of the update",
        "update_every": "steps after which the subspace is computed anew",
        "stagger": "false: all matrices at the same step",
        "compat": COMPAT_HELP,
    }
    bytes_help = "3 bytes a parameter of a square matrix at the default rank; 4 (2 n r + m r) for n x m, m the smaller"
    slow = True
    lr_factor = 10.0

    def extra_spec(self, shape: Shape, options: Any, dtype: torch.dtype) -> dict[str, StateSpec]:
        sides = self.sides(shape, options)
        return {"projection": StateSpec((*sides.batch, sides.m, sides.rank), dtype)}

    def projected_scratch(self, sides: Sides, options: Any) -> int:
        batch, n, m, r = math.prod(sides.batch), sides.n, sides.m, sides.rank
        block = batch * _block_rows(sides) * sides.columns
        refresh = 8 * (batch + 5) * m * m + 2 * 12 * block + 4 * batch * m * r
        return max(refresh, 12 * batch * n * r) + 4 * batch * m * r

    def turn(self, ctx: Context) -> bool:
        """Whether P is made anew in this step."""
        every = ctx.options.update_every
        offset = ctx.key_for("turn") % every if ctx.options.stagger else 0
        return ctx.step <= 1 or (ctx.step - 1 + offset) % every == 0

    def take(self, key: str, tensor: Tensor, box: Box) -> Tensor:
        if not key.startswith(_ROWS_FROM):
            return super().take(key, tensor, box)
        first = int(key.removeprefix(_ROWS_FROM))  # ``tensor`` is a block of rows: those that the box holds
        low, high = _overlap(box, first, tensor.shape[-2])
        return tensor[(*box[:-2], slice(low - first, high - first), box[-1])]

    def stats(self, part: Part, ctx: Context, round_: Any) -> Tensors:
        sides = self.sides(ctx.shape, ctx.options)
        if isinstance(round_, str):
            start, (low, high) = part.box[-2].start, _overlap(part.box, *block_of(round_, sides))
            return {round_: part.g[..., low - start : high - start, :]} if low < high else {}
        g = part.g if sides.by_rows else part.g.mT
        return {sides.channels: g @ part.small[sides.coordinates]}

    def project(
        self, visit: Visit, state: Tensors, ctx: Context, update: Moments | None = None
    ) -> tuple[Tensors, Tensors]:
        sides, options, small = self.sides(ctx.shape, ctx.options), ctx.options, ctx.scalars
        p, new = state["projection"], dict[str, Tensor]()
        if self.turn(ctx):
            p = new["projection"] = leading(_gram(visit, sides), p)
        r = visit(0, {sides.coordinates: p}, {sides.channels: sides.projected}).pop(sides.channels)
        m, v = (update or moments)(r, state, ctx.h)
        del r
        new.update(exp_avg=m, exp_avg_sq=v)
        direction = v.sqrt()
        if options.compat:
            direction.add_(ctx.h.eps).div_(small["bias2_sqrt"])
        else:
            direction.div_(small["bias2_sqrt"]).add_(ctx.h.eps)
        torch.div(m, direction, out=direction)
        if ctx.coded:  # moments held in fewer bits may not fit each other; no gradients give more
            bound = update_bound(ctx.h.beta1, ctx.h.beta2) * (1 - ctx.h.beta1**ctx.step)
            direction.clamp_(-bound, bound)
        direction.mul_(small["step_size"]).mul_(options.scale)
        return {sides.channels: direction, sides.coordinates: p}, new

    def projected_update(self, part: Part, ctx: Context) -> Tensor:
        return part.small["left"] @ part.small["right"].mT


# ---------------------------------------------------------------- the subspace

_ROWS_FROM = "rows from "


def _block_rows(sides: Sides) -> int:
    return min(max(-(-sides.rows // _BLOCKS), _LEAST_ROWS), sides.rows)


def block_of(round_: str, sides: Sides) -> tuple[int, int]:
    """The first row, and the number of rows, of the block a round asks for."""
    first = int(round_.removeprefix(_ROWS_FROM))
    return first, min(_block_rows(sides), sides.rows - first)


def _overlap(box: Box, first: int, rows: int) -> tuple[int, int]:
    """The rows that ``box`` has in common with a block of rows."""
    low = min(max(box[-2].start, first), first + rows)
    return low, max(min(box[-2].stop, first + rows), low)


def _blocks(visit: Visit, sides: Sides, stop: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of the gradient before ``stop``, block by block, [..., rows, columns], in float64."""
    for first in range(0, stop, _block_rows(sides)):
        name = f"{_ROWS_FROM}{first}"
        rows = block_of(name, sides)[1]
        shape = (*sides.batch, rows, sides.columns)
        yield slice(first, first + rows), visit(name, {}, {name: shape})[name].to(torch.float64)


def _gram(visit: Visit, sides: Sides) -> Tensor:
    """``G^T G`` of the smaller side, [..., m, m], in float64."""
    gram: Tensor | None = None
    for rows, block in _blocks(visit, sides, sides.rows):
        if gram is None:
            gram = block.new_zeros(*sides.batch, sides.m, sides.m)
        if sides.by_rows:
            gram += block.mT @ block
            continue
        for others, other in _blocks(visit, sides, rows.stop):
            product = gram[..., rows, others] = block @ other.mT
            gram[..., others, rows] = product.mT
    assert gram is not None  # a matrix has rows
    return gram


def leading(gram: Tensor, old: Tensor) -> Tensor:
    """The top eigenvectors of each of ``gram``, [..., m, m], in the place, number and sign of ``old``, [..., m, r].

    Where ``gram`` is not finite ``old`` stays (unit vectors if there is none yet: it is zero).
    """
    finite = gram.isfinite().all(-1).all(-1)[..., None, None]
    gram = torch.where(finite, gram, 0.0)
    new, (m, rank) = torch.empty_like(old), old.shape[-2:]
    for found, matrix in zip(new.view(-1, m, rank), gram.view(-1, m, m), strict=True):
        found.copy_(torch.linalg.eigh(matrix)[1][:, m - rank :].flip(-1))  # eigenvalues ascend
    agreement = (new * old).sum(-2, keepdim=True)
    new.mul_(torch.where(agreement < 0, -1.0, 1.0))
    some = (old != 0).any(-1).any(-1)[..., None, None]
    return torch.where(finite | ~some, new, old)
