"""What APOLLO and GaLore share: a matrix seen through a projection of its smaller side.

A matrix ``[rows, columns]`` (a convolution as ``[out, in * k]``, ``[E, rows, columns]`` as E matrices) has a larger
side of n channels and a smaller one of m coordinates. ``P`` is ``[m, r]``, and the gradient, channels first, gives
``R = G P``, ``[n, r]``. Where rows are the channels a box of rows holds some of them whole; where columns are, boxes
add up parts of all. The state is ``[n, r]`` either way, so that the blocks of a codec lie along r.

Tensors that belong to one side of the matrix go by the name of that side, ``left`` (rows) or ``right`` (columns): so
the engine cuts them to a box without asking which side is the larger. ``across`` is R with columns last.

Where the smaller side is 1 there is nothing to project: such a matrix keeps dense AdamW state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memadvise.optim.method import (
    STEP,
    Box,
    Context,
    Hyper,
    Method,
    OptionProblem,
    Part,
    Shape,
    StateSpec,
    Tensors,
    Visit,
    broadcast_part,
    device_type,
    is_int,
)
from memadvise.optim.methods.adamw import AdamW
from memadvise.optim.methods.blockmean import CompatOptions, adam_scalars

DENSE = AdamW()
Moments = Callable[[Tensor, Tensors, Hyper], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ProjectedOptions(CompatOptions):
    """``update_every``: steps between two projections."""

    update_every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_int(self.update_every) or self.update_every < 1:
            raise OptionProblem("update_every", f"update_every should be at least 1, found {self.update_every!r}")


def check_rank(rank: Any) -> None:
    """Raises OptionProblem for anything but None and a positive integer."""
    if rank is not None and (not is_int(rank) or rank < 1):
        raise OptionProblem("rank", f"rank should be an integer of at least 1, found {rank!r}")


@dataclass(frozen=True)
class Sides:
    """The sides of a (viewed) shape: ``n`` channels, the larger (rows if equal), and ``m`` coordinates."""

    batch: Shape
    rows: int
    columns: int
    rank: int

    @property
    def by_rows(self) -> bool:
        """Whether the channels are the rows."""
        return self.rows >= self.columns

    @property
    def n(self) -> int:
        return max(self.rows, self.columns)

    @property
    def m(self) -> int:
        return min(self.rows, self.columns)

    @property
    def channels(self) -> str:
        """The name of tensors that belong to the larger side."""
        return "left" if self.by_rows else "right"

    @property
    def coordinates(self) -> str:
        """The name of tensors that belong to the smaller side."""
        return "right" if self.by_rows else "left"

    @property
    def projected(self) -> Shape:
        """The shape of R."""
        return (*self.batch, self.n, self.rank)


class Projected(Method):
    """A method whose state is that of a projected gradient."""

    default_lr = 1e-2
    default_eps = 1e-6
    default_weight_decay = 0.0
    matrix_only = True
    hidden_only = True
    sharded = False

    # ------------------------------------------------------------ shapes

    def view(self, shape: Shape, options: Any) -> Shape:
        return (shape[0], math.prod(shape[1:])) if len(shape) > 3 else shape

    @staticmethod
    def dense(shape: Shape) -> bool:
        """Whether a (viewed) shape has nothing to project and keeps AdamW's state."""
        return len(shape) < 2 or min(shape[-2:]) < 2

    def sides(self, shape: Shape, options: Any) -> Sides:
        """The sides of a (viewed) shape that is not :meth:`dense`."""
        rows, columns = shape[-2:]
        return Sides(shape[:-2], rows, columns, options.rank or max(min(rows, columns) // 4, 1))

    def check(self, shape: Shape, options: Any) -> None:
        if len(shape) < 2:
            raise OptionProblem(
                None, f"{self.name} projects matrices, not a tensor of shape {list(shape)}", "use method: adamw for it"
            )
        view = self.view(shape, options)
        if not self.dense(view) and options.rank is not None and options.rank > min(view[-2:]):
            raise OptionProblem(
                "rank",
                f"rank {options.rank} is above the smaller side of a matrix of {view[-2]} x {view[-1]}",
                f"leave rank out (a quarter of the smaller side), or use at most {min(view[-2:])}",
            )

    def reduced_axes(self, shape: Shape, options: Any) -> tuple[int, ...] | None:
        return () if self.dense(shape) else None

    def take(self, key: str, tensor: Tensor, box: Box) -> Tensor:
        if key == "across":
            return tensor[(*box[:-2], slice(None), box[-1])]
        if key not in ("left", "right"):
            return broadcast_part(tensor, box)
        side = box[-2 if key == "left" else -1]
        return tensor[side] if tensor.ndim == 2 else tensor[(*box[:-2], side)]

    # ------------------------------------------------------------ state and steps

    def spec(self, shape: Shape, options: Any, dtype: torch.dtype) -> dict[str, StateSpec]:
        if self.dense(shape):
            return DENSE.spec(shape, options, dtype)
        projected = self.sides(shape, options).projected
        return {
            "step": STEP,
            "exp_avg": StateSpec(projected, dtype, moment="first"),
            "exp_avg_sq": StateSpec(projected, dtype, moment="second"),
            **self.extra_spec(shape, options, dtype),
        }

    def extra_spec(self, shape: Shape, options: Any, dtype: torch.dtype) -> dict[str, StateSpec]:
        """The state beside the moments."""
        return {}

    def scalars(self, step: Tensor, h: Hyper, options: Any) -> Tensors:
        return adam_scalars(step, h)

    def decays(self, shape: Shape, options: Any) -> str:
        return "after" if options.compat else "before"

    def prepare(self, visit: Visit, state: Tensors, ctx: Context) -> tuple[Tensors, Tensors]:
        if self.dense(ctx.shape):
            return dict(ctx.scalars), {}
        return self.project(visit, state, ctx)

    def prepare_in_place(self, visit: Visit, state: Tensors, ctx: Context) -> tuple[Tensors, Tensors]:
        """:meth:`prepare`, but the moments in ``state`` become the new ones."""
        if self.dense(ctx.shape):
            return dict(ctx.scalars), {}
        return self.project(visit, state, ctx, update=update_moments)

    def project(
        self, visit: Visit, state: Tensors, ctx: Context, update: Moments | None = None
    ) -> tuple[Tensors, Tensors]:
        """:meth:`prepare` where there is something to project; ``update``: :func:`moments` unless given."""
        raise NotImplementedError

    def update(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        if self.dense(ctx.shape):
            return DENSE.update(part, ctx)
        return self.projected_update(part, ctx), {}

    def projected_update(self, part: Part, ctx: Context) -> Tensor:
        """:meth:`update` where there is something to project."""
        raise NotImplementedError

    def scratch_bytes(self, shape: Shape, options: Any) -> int:
        return 0 if self.dense(shape) else self.projected_scratch(self.sides(shape, options), options)

    def projected_scratch(self, sides: Sides, options: Any) -> int:
        """:meth:`scratch_bytes` where there is something to project."""
        raise NotImplementedError


_AT_ONCE = 65536  # values of a moment that are worked on at once, in the cache


def update_moments(r: Tensor, state: Tensors, h: Hyper) -> tuple[Tensor, Tensor]:
    """:func:`moments` in place of the old ones; R is left as it is."""
    m, v = state["exp_avg"], state["exp_avg_sq"]
    if r.numel() <= _AT_ONCE or device_type(r) == "cuda":
        return m.lerp_(r, 1 - h.beta1), v.mul_(h.beta2).addcmul_(r, r, value=1 - h.beta2)
    for m_part, v_part, part in zip(*(x.view(-1).split(_AT_ONCE) for x in (m, v, r)), strict=True):
        m_part.lerp_(part, 1 - h.beta1)
        v_part.mul_(h.beta2).addcmul_(part, part, value=1 - h.beta2)
    return m, v


def moments(r: Tensor, state: Tensors, h: Hyper) -> tuple[Tensor, Tensor]:
    """The new moments of R; the second one takes R's memory."""
    m = torch.lerp(state["exp_avg"], r, 1 - h.beta1)
    return m, r.square_().mul_(1 - h.beta2).add_(state["exp_avg_sq"], alpha=h.beta2)
