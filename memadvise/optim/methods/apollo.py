"""APOLLO (arXiv 2412.05270): Adam's step sizes, one a channel, from a randomly projected copy of the gradient.

With channels on the larger side (n) of a matrix and a random P, [m, r], drawn anew every ``update_every`` steps T::

    R = G P;  M <- b1 M + (1 - b1) R;  V <- b2 V + (1 - b2) R^2;  N = M / (sqrt(V) + sqrt(1 - b2^t) eps)
    s_j = |N_j| / |R_j|  of each channel j, or |N| / |R|  of the whole matrix;  S = G s
    rho = max(1, |S| / (limiter |S_before|));  S <- S / rho
    p <- p (1 - lr wd) - lr sqrt(1 - b2^t) / (1 - b1^t) sqrt(scale) S

The gradient itself is applied, of full rank and without momentum: only its norm is Adam's. |S| is computed from the
channels' norms, S is never made. P is a hash of (seed, the parameter's name, (t - 1) // T): never stored, the same
whatever the order of parameters, chunks or processes; M and V are kept when it changes, as in the paper. One P serves
all matrices of a stack.

``projection: sketch`` is a count sketch in place of the Gaussian P: its norms are right on average, too, and it costs
one pass over G. The paper has no results with it.

``scaling: tensor`` makes one factor for the matrix; with rank 1 that is :mod:`APOLLO-Mini <.apollo_mini>`.

State: of a matrix, in float32, 8 n r bytes, 4 for the step, and 8 for the limiter (4 if ``limiter_floor`` is 0, none
without a limiter), these for each matrix of a stack. A step takes 4 (m r + 2 n r) bytes beside. Matrices with a side
of 1 have nothing to project and keep AdamW's state.

Defaults are the paper's: lr 0.01 with warm-up, betas (0.9, 0.999), eps 1e-6, no weight decay; a rank of a quarter of
the smaller side. The size of an update is about sqrt(scale r / m) of Adam's. Single channels need r of 8 or more: a
channel's |R_j| may be tiny by chance. Embeddings, heads and vectors are meant to stay with AdamW.

The limiter lets |S| grow by 1 % a step. Two of its effects are mended, or can be: after a gradient of exactly zero
(every layer before one initialised with zeros has it at first) nothing could be learnt for some 2000 steps: a norm
below ``limiter_floor`` times the largest is no norm to grow from. And since norms without bias correction grow of
themselves at first, the first 50 steps are throttled by up to a half, as in the paper: ``limiter_on: corrected``
compares norms with it.

Deviations from the official code: eps as above instead of M / (sqrt(V) + eps), 0 instead of G |N_j| / 1e-8 where R_j is
zero, weight decay before the update, float32 state for every parameter dtype, rank at most m, and no ``scale_front``
(whether scale is applied before the limiter cannot matter to ratios of norms). ``compat: official`` puts eps, 1e-8,
decay and the limiter's memory of zeros back; P is still ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memadvise.optim.method import (
    Context,
    Hyper,
    OptionProblem,
    Options,
    Part,
    Shape,
    StateSpec,
    Tensors,
    Visit,
    device_type,
    is_number,
)
from memadvise.optim.methods.blockmean import COMPAT_HELP, update_bound
from memadvise.optim.methods.projected import Moments, Projected, ProjectedOptions, Sides, check_rank, moments
from memadvise.optim.methods.sketch import KINDS, draw, draw_bytes, project

SCALINGS = ("channel", "tensor")
LIMITED = ("raw", "corrected")
_AT_ONCE, _CUDA_AT_ONCE = 65536, 2**22  # elements of N formed at once, to be squared and summed


@dataclass(frozen=True)
class ScaledOptions(ProjectedOptions):
    """The options that APOLLO and APOLLO-Mini share; see :data:`SCALED_HELP`."""

    scale: float = 1.0
    projection: str = "gaussian"
    limiter: float | None = 1.01
    limiter_floor: float = 1e-6
    limiter_on: str = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.scale) or self.scale <= 0:
            raise OptionProblem("scale", f"scale should be a number above 0, found {self.scale!r}")
        if self.projection not in KINDS:
            raise OptionProblem("projection", f"projection '{self.projection}' is none of {', '.join(KINDS)}")
        if self.limiter is not None and (not is_number(self.limiter) or self.limiter < 1):
            raise OptionProblem(
                "limiter", f"limiter should be a factor of at least 1, found {self.limiter!r}", "null for no limiter"
            )
        if not is_number(self.limiter_floor) or not 0 <= self.limiter_floor < 1:
            raise OptionProblem(
                "limiter_floor", f"limiter_floor should be from 0 up to, not including, 1, found {self.limiter_floor!r}"
            )
        if self.limiter_on not in LIMITED:
            raise OptionProblem("limiter_on", f"limiter_on '{self.limiter_on}' is none of {', '.join(LIMITED)}")
        if self.limiter is None:
            for option in ("limiter_floor", "limiter_on"):
                if getattr(self, option) != getattr(ScaledOptions, option):
                    raise OptionProblem(
                        option, f"{option} would do nothing: there is no limiter", f"remove {option}, or limiter: null"
                    )
        if self.compat and self.limiter_floor != ScaledOptions.limiter_floor:
            raise OptionProblem(
                "limiter_floor",
                "limiter_floor would do nothing: the official limiter grows from any norm, zero included",
                "remove limiter_floor, or compat",
            )
        if self.compat and self.limiter_on != "raw":
            raise OptionProblem("limiter_on", "the official limiter is on raw norms", "remove limiter_on, or compat")


@dataclass(frozen=True)
class ApolloOptions(ScaledOptions):
    """``rank``: None for a quarter of the smaller side; ``scaling``: one factor a channel or one a matrix."""

    rank: int | None = None
    scaling: str = "channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)
        if self.scaling not in SCALINGS:
            raise OptionProblem("scaling", f"scaling '{self.scaling}' is none of {', '.join(SCALINGS)}")


SCALED_HELP = {
    "scale": "the update is scaled by its square root",
    "projection": "gaussian, or sketch: one random sign a coordinate, a pass over the gradient instead of a product",
    "update_every": "steps after which another projection is drawn",
    "limiter": "factor by which an update's norm may grow from one step to the next; null for no limit",
    "limiter_floor": "a norm below this share of the largest is not one to grow from",
    "limiter_on": "raw: limit norms before bias correction, as the paper; corrected: after it, without a slow start",
    "compat": COMPAT_HELP,
}


class Apollo(Projected):
    """Adam's step sizes, one a channel, from a projected copy of the gradient."""

    name = "apollo"
    summary = "Adam's step size for each channel, from a randomly projected gradient"
    source = "arXiv 2412.05270"
    options_type: ClassVar[type[Options]] = ApolloOptions
    options_help: ClassVar[dict[str, str]] = {
        "rank": "of the projection; by default a quarter of the smaller side",
        "scaling": "one factor a channel, or one a tensor",
        **SCALED_HELP,
    }
    bytes_help = "2 bytes a parameter of a square matrix at the default rank; 8 n r for n channels"
    lr_factor = 10.0

    def momentum(self, options: Any) -> bool:
        return False  # the gradient times something positive

    def extra_spec(self, shape: Shape, options: Any, dtype: torch.dtype) -> dict[str, StateSpec]:
        one = StateSpec((*shape[:-2], 1, 1), dtype)
        if options.limiter is None:
            return {}
        return {"norm": one} if options.compat or not options.limiter_floor else {"norm": one, "largest_norm": one}

    def scalars(self, step: Tensor, h: Hyper, options: Any) -> Tensors:
        found = super().scalars(step, h, options)
        return {**found, "correction": found["bias2_sqrt"] / found["bias1"]}

    def projected_scratch(self, sides: Sides, options: Any) -> int:
        return self._scratch("cpu", sides, options)

    def scratch_bytes_on(self, device: str, shape: Shape, options: Any) -> int:
        return 0 if self.dense(shape) else self._scratch(device, self.sides(shape, options), options)

    @staticmethod
    def _scratch(device: str, sides: Sides, options: Any) -> int:
        batch, n, r = math.prod(sides.batch), sides.n, sides.rank
        some = 16 * (_CUDA_AT_ONCE if device == "cuda" else _AT_ONCE)
        return draw_bytes(options.projection, sides.m, r, device) + 8 * batch * n * r + 24 * batch * n + some

    def projection_key(self, ctx: Context) -> int:
        """The key of the P of this step."""
        return ctx.key_for("projection", (max(ctx.step, 1) - 1) // ctx.options.update_every)

    def stats(self, part: Part, ctx: Context, round_: Any) -> Tensors:
        sides, options = self.sides(ctx.shape, ctx.options), ctx.options
        side = sides.coordinates
        first = part.box[-1 if sides.by_rows else -2].start
        r = project(
            part.g, part.small[side], options.projection, self.projection_key(ctx), sides.m, sides.rank, first,
            by_rows=sides.by_rows,
        )  # fmt: skip
        found = {"left" if sides.by_rows else "across": r}
        if options.limiter is not None:
            found["squares"] = squares(part.g, sides, options)
        return found

    def project(
        self, visit: Visit, state: Tensors, ctx: Context, update: Moments | None = None
    ) -> tuple[Tensors, Tensors]:
        sides, options, small = self.sides(ctx.shape, ctx.options), ctx.options, ctx.scalars
        n, rank = sides.n, sides.rank  # by columns R is summed as it comes, and turned once
        shapes = {"left": sides.projected} if sides.by_rows else {"across": (*sides.batch, rank, n)}
        if options.limiter is not None:
            per = (sides.rows, 1) if sides.by_rows else (1, sides.columns)
            shapes["squares"] = (*sides.batch, *(per if options.scaling == "channel" else (1, 1)))
        drawn = draw(options.projection, self.projection_key(ctx), sides.m, sides.rank, state["exp_avg"])
        sums = visit(0, {sides.coordinates: drawn}, shapes)
        del drawn

        r = sums.pop("left") if sides.by_rows else sums.pop("across").mT.contiguous()
        axes = (-1,) if options.scaling == "channel" else (-2, -1)
        norm = torch.linalg.vector_norm(r, dim=axes, keepdim=True)
        m, v = (update or moments)(r, state, ctx.h)
        del r
        eps = ctx.h.eps if options.compat else small["bias2_sqrt"] * ctx.h.eps
        adam = adam_norm(m, v, eps, axes, ctx)
        adam, norm = (adam, norm) if sides.by_rows else (adam.mT, norm.mT)
        scale, norms = self.scale(adam, norm, sums.get("squares"), state, ctx)
        return {"scale": scale}, {"exp_avg": m, "exp_avg_sq": v, **norms}

    def scale(
        self, adam: Tensor, norm: Tensor, squares: Tensor | None, state: Tensors, ctx: Context
    ) -> tuple[Tensor, Tensors]:
        """What the gradient is multiplied by, and what the limiter remembers. ``adam`` and ``norm``: ``|N|`` and
        ``|R|`` of the channels or the matrix, shaped to broadcast with it; ``squares``: ``|G|^2`` of the same.
        """
        options, new = ctx.options, dict[str, Tensor]()
        s = adam / (norm + 1e-8) if options.compat else torch.where(norm > 0, adam / norm, 0.0)
        step_size = ctx.scalars["step_size"] * ctx.scalars["bias2_sqrt"]
        if squares is not None:
            sizes = torch.where(s > 0, s * squares.sqrt_(), s)  # of channels; not 0 * inf where they overflow
            size = torch.linalg.vector_norm(sizes, dim=(-2, -1), keepdim=True)
            rho, new = self._limit(size, state, ctx)
            s = s / rho
        return (s * (step_size * math.sqrt(options.scale))).to(adam.dtype), new

    def _limit(self, size: Tensor, state: Tensors, ctx: Context) -> tuple[Tensor, Tensors]:
        """By what an update of norm ``size`` is divided, and what the limiter remembers."""
        options, before = ctx.options, state["norm"]
        if options.compat:
            if ctx.step <= 1:
                return torch.ones_like(size), {"norm": size}
            rho = (size / (before + 1e-8)).clamp_(min=options.limiter).div_(options.limiter)
            return rho, {"norm": size / rho}
        if options.limiter_on == "corrected":
            size = size * ctx.scalars["correction"]
        largest = state["largest_norm"] if options.limiter_floor else before
        known = before > torch.maximum(largest, size) * options.limiter_floor
        rho = torch.where(known, (size / (before * options.limiter)).clamp_(min=1.0), torch.ones_like(size))
        norm = torch.where(size > 0, size / rho, before)
        norms = {"norm": norm}
        if options.limiter_floor:
            norms["largest_norm"] = torch.maximum(largest, norm)
        return rho, norms

    def projected_update(self, part: Part, ctx: Context) -> Tensor:
        return part.g * part.small["scale"]


def _at_once(like: Tensor) -> int:
    return _CUDA_AT_ONCE if device_type(like) == "cuda" else _AT_ONCE


def squares(g: Tensor, sides: Sides, options: Any) -> Tensor:
    """The squared norms of a box's channels, or its own."""
    if options.scaling == "tensor" and g.ndim == 2 and g.is_contiguous() and device_type(g) != "cuda":
        flat = g.view(-1)
        return torch.dot(flat, flat).view(1, 1)  # twice as fast as a norm
    if options.scaling == "tensor" or sides.by_rows:
        axes = (-2, -1) if options.scaling == "tensor" else -1
        return torch.linalg.vector_norm(g, dim=axes, keepdim=True).square_()
    # norms of columns are twenty times slower than sums of squares, which take a temporary: a few rows at once
    sums = g.new_zeros(*g.shape[:-2], 1, g.shape[-1])
    for rows in g.split(max(_at_once(g) * g.shape[-2] // max(g.numel(), 1), 1), dim=-2):
        sums += rows.square().sum(-2, keepdim=True)
    return sums


def adam_norm(m: Tensor, v: Tensor, eps: float | Tensor, axes: tuple[int, ...], ctx: Context) -> Tensor:
    """The norms of ``m / (sqrt(v) + eps)`` over ``axes``, kept, without forming all of it at once."""
    rank, bound = m.shape[-1], math.inf
    if ctx.coded:  # moments held in fewer bits may not fit each other: no gradients give more than this
        bound = update_bound(ctx.h.beta1, ctx.h.beta2) * (1 - ctx.h.beta1**ctx.step)
        bound /= math.sqrt(1 - ctx.h.beta2**ctx.step)
    norms = m.new_empty(m.shape[:-1])
    rows = max(_at_once(m) // max(rank, 1), 1)
    whole = (norms.view(-1), m.view(-1, rank), v.view(-1, rank))
    pieces = [whole] if len(whole[0]) <= rows else zip(*(x.split(rows) for x in whole), strict=True)
    for norm, m_part, v_part in pieces:
        torch.linalg.vector_norm(_direction(m_part, v_part, eps, bound, ctx), dim=-1, out=norm)
    return norms.unsqueeze(-1) if axes == (-1,) else torch.linalg.vector_norm(norms, dim=-1).view(*m.shape[:-2], 1, 1)


def _direction(m: Tensor, v: Tensor, eps: float | Tensor, bound: float, ctx: Context) -> Tensor:
    part = v.sqrt().add_(eps)
    if not ctx.h.eps:  # where all that was added up in a sketch cancelled out: 0, as with any eps
        part.masked_fill_(part == 0, 1.0)
    torch.div(m, part, out=part)
    return part.clamp_(-bound, bound) if bound < math.inf else part
