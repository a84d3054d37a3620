"""A second moment kept as row and column means (arXiv 1804.04235, section 3): the shared core of Adafactor and CAME.

For a matrix, with ``w`` the weight of the newest gradient::

    R_i <- (1 - w) R_i + w mean_j(g_ij^2 + eps1)          C_j <- (1 - w) C_j + w mean_i(g_ij^2 + eps1)
    v_ij = R_i C_j / mean(R);   u = g / sqrt(v);   u <- u / max(1, RMS(u) / clip)

A vector or scalar keeps v in full. Convolutions are matrices ``[out, in * prod(kernel)]`` (factoring the last two axes
of a 3x3 window would keep 6/9 of v); ``[E, out, in]`` is a stack of matrices, each with its own means and its own RMS.
The root is taken of ``R / mean(R)`` and of ``C`` apart, so that the product of two tiny means cannot underflow.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from memadvise.optim.method import (
    STEP,
    Context,
    Method,
    OptionProblem,
    Part,
    Shape,
    StateSpec,
    Tensors,
    Visit,
    is_number,
)  # fmt: skip
from memadvise.optim.methods.sums import column_sums

SQUARES, SIZE = "squares", "size"  # the visits


def as_matrices(shape: Shape) -> Shape:
    """A convolution as a matrix ``[out, in * prod(kernel)]``; matrices, stacks of matrices and vectors as they are."""
    return shape if len(shape) < 4 else (shape[0], math.prod(shape[1:]))


def check_positive(name: str, value: Any) -> None:
    """Raises OptionProblem for anything but a finite number above 0."""
    if not is_number(value) or value <= 0:
        raise OptionProblem(name, f"{name} should be a number above 0, found {value!r}")


def check_fraction(name: str, value: Any) -> None:
    """Raises OptionProblem for anything but a number in [0, 1)."""
    if not is_number(value) or not 0 <= value < 1:
        raise OptionProblem(name, f"{name} should be a number in [0, 1), found {value!r}")


def row_shape(shape: Shape) -> Shape:
    """One entry a row, broadcasting with the matrices of ``shape``."""
    return (*shape[:-1], 1)


def column_shape(shape: Shape) -> Shape:
    """One entry a column."""
    return (*shape[:-2], 1, shape[-1])


def ema(old: Tensor, sums: Tensor, count: int, weight: float | Tensor, floor: float) -> Tensor:
    """``(1 - weight) old + weight (sums / count + floor)``."""
    return mixed(old, sums / max(count, 1) + floor, weight)


def mixed(old: Tensor, new: Tensor, weight: float | Tensor) -> Tensor:
    """``torch.lerp``, which wants a weight of the tensors' own dtype and device."""
    return (old + (new - old) * weight).to(old.dtype)  # 0-dim values would take the weight's dtype


def row_scale(rows: Tensor) -> Tensor:
    """``1 / sqrt(R_i / mean(R))``; a row of nothing but zeros beside huge ones keeps a finite scale."""
    relative = rows / rows.mean(-2, keepdim=True)
    return relative.clamp_(min=torch.finfo(rows.dtype).tiny).rsqrt_()


class Factored(Method):
    """Gives a method ``small["row"]`` and ``small["column"]`` (matrices) and ``small["clip"]``, and their visits."""

    sharded = False

    def traceable(self, shape: Shape, options: Any) -> bool:
        return True

    def newest(self, ctx: Context) -> float | Tensor:
        """The weight w of this step's squared gradient."""
        raise NotImplementedError

    def unit(self, shape: Shape, options: Any) -> tuple[int, ...]:
        """The axes of what is clipped as one: a matrix of a stack, a vector."""
        return tuple(range(max(len(shape) - 2, 0), len(shape)))

    def view(self, shape: Shape, options: Any) -> Shape:
        return as_matrices(shape)

    def reduced_axes(self, shape: Shape, options: Any) -> tuple[int, ...] | None:
        return self.unit(shape, options)

    def second_spec(self, shape: Shape, dtype: torch.dtype) -> dict[str, StateSpec]:
        """The state of the second moment, and the step."""
        if len(shape) < 2:
            return {"step": STEP, "exp_avg_sq": StateSpec(shape, dtype, elementwise=True, moment="second")}
        return {
            "step": STEP,
            "exp_avg_sq_row": StateSpec(row_shape(shape), dtype),
            "exp_avg_sq_col": StateSpec(column_shape(shape), dtype),
        }

    def unit_shape(self, ctx: Context) -> Shape:
        """One entry for each unit that is clipped."""
        axes = self.unit(ctx.shape, ctx.options)
        return tuple(1 if a in axes else size for a, size in enumerate(ctx.shape))

    def unit_numel(self, ctx: Context) -> int:
        """The elements of such a unit."""
        return max(math.prod(ctx.shape[a] for a in self.unit(ctx.shape, ctx.options)), 1)

    # ------------------------------------------------------------ visits

    def second_moment_scales(self, visit: Visit, state: Tensors, ctx: Context) -> tuple[Tensors, Tensors]:
        """What :meth:`normalised` needs for matrices, and the new means; nothing for a vector. One visit."""
        shape = ctx.shape
        if len(shape) < 2:
            return {}, {}
        sums = visit(SQUARES, {}, {"rows": row_shape(shape), "columns": column_shape(shape)})
        weight, floor = self.newest(ctx), ctx.options.eps1
        rows = ema(state["exp_avg_sq_row"], sums["rows"], shape[-1], weight, floor)
        columns = ema(state["exp_avg_sq_col"], sums["columns"], shape[-2], weight, floor)
        small = {"row": row_scale(rows), "column": columns.rsqrt()}
        return small, {"exp_avg_sq_row": rows, "exp_avg_sq_col": columns}

    def clip(self, squares: Tensor, ctx: Context) -> Tensor:
        """``1 / max(1, RMS(u) / clip)`` from the sum of u^2."""
        rms = (squares / self.unit_numel(ctx)).sqrt_()
        return rms.div_(ctx.options.clip).clamp_(min=1.0).reciprocal_()

    def stats(self, part: Part, ctx: Context, round_: Any) -> Tensors:
        if round_ == SQUARES:
            squares = part.g * part.g
            return {"rows": squares.sum(-1, keepdim=True), "columns": column_sums(squares)}
        u, _ = self.normalised(part, ctx)
        return {"updates": self.unit_sum(u.mul_(u), ctx)}

    def unit_sum(self, values: Tensor, ctx: Context) -> Tensor:
        """Sums over the units that are clipped."""
        axes = self.unit(tuple(values.shape), ctx.options)
        return values.sum(axes, keepdim=True) if axes else values.clone()

    def normalised(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        """``g / sqrt(v)`` before it is clipped, a new tensor, and the new v of a vector."""
        if "row" in part.small:
            return (part.g * part.small["row"]).mul_(part.small["column"]), {}
        v = mixed(part.state["exp_avg_sq"], part.g * part.g + ctx.options.eps1, self.newest(ctx))
        return part.g * v.rsqrt(), {"exp_avg_sq": v}

    def scratch_bytes(self, shape: Shape, options: Any) -> int:
        if len(shape) < 2:
            return 64
        return 8 * 8 * (math.prod(row_shape(shape)) + math.prod(column_shape(shape)))

    def second_moment(self, v: Tensor, options: Any) -> Tensor | None:
        seen = v.reshape(self.view(tuple(v.shape), options))
        if seen.ndim < 2:
            return v
        rows, columns = seen.mean(-1, keepdim=True), seen.mean(-2, keepdim=True)
        mean = rows.mean(-2, keepdim=True)
        return torch.where(mean > 0, rows / mean * columns, 0.0).reshape(v.shape)
