"""Adam with one second moment a block: the shared core of SlimAdam and Adam-mini.

``v`` is the EMA of the mean of ``g^2`` over a block; only the partition into blocks differs. A partition is given as
axes that are averaged whole, and optionally groups of neighbours along one kept axis (heads: blocks of rows).
``g^2`` is first summed over the axes (these sums are what chunks and shards add up), then over the groups.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from memadvise.optim.method import STEP, Context, Hyper, Method, OptionProblem, Options, Part, Shape, StateSpec, Tensors
from memadvise.optim.methods.sums import column_sums
from memadvise.optim.tracing import in_kernel

COMPAT_HELP = "official: as the official code does it, where that differs (see the method's documentation)"


@dataclass(frozen=True)
class CompatOptions(Options):
    """``compat``: None, or "official" for what the official code does where it deviates."""

    compat: str | None = None

    def __post_init__(self) -> None:
        check_compat(self.compat)


def check_compat(value: Any) -> None:
    """Raises OptionProblem for anything but None and "official"."""
    if value not in (None, "official"):
        raise OptionProblem("compat", f"compat should be official, or be left out, found {value!r}")


@dataclass(frozen=True)
class Blocks:
    """A partition of a tensor: sums over ``axes``, then over ``groups`` along ``axis``.

    Args:
        axes: axes summed whole.
        axis: the kept axis that ``groups`` divide.
        groups: ``(start, stop, blocks)``: entries ``start:stop`` of ``axis`` in that many equal blocks, covering
            the axis in order. Empty: every entry is a block of its own.
    """

    axes: tuple[int, ...]
    axis: int = 0
    groups: tuple[tuple[int, int, int], ...] = ()

    def sums_shape(self, shape: Shape) -> Shape:
        """The shape of ``g^2`` summed over ``axes``, kept as size 1."""
        return tuple(1 if a in self.axes else size for a, size in enumerate(shape))

    def state_shape(self, shape: Shape) -> Shape:
        """The shape of one value a block."""
        reduced = list(self.sums_shape(shape))
        if self.groups:
            reduced[self.axis] = sum(blocks for _, _, blocks in self.groups)
        return tuple(reduced)

    def sum_squares(self, g: Tensor, out: Tensor | None = None) -> Tensor:
        """``g^2`` summed over ``axes``; the squares go to ``out`` if given."""
        squares = g * g if out is None else torch.mul(g, g, out=out)
        if self.axes == (squares.ndim - 2,):
            return column_sums(squares)
        return squares.sum(self.axes, keepdim=True) if self.axes else squares

    def pool(self, sums: Tensor, shape: Shape) -> Tensor:
        """Means over the blocks of a tensor of ``shape``, from its sums over ``axes``."""
        count = max(math.prod(shape[a] for a in self.axes), 1)
        if not self.groups:
            return sums / count
        parts = []
        for start, stop, blocks in self.groups:
            rows = (stop - start) // blocks
            part = sums.narrow(self.axis, start, stop - start).unflatten(self.axis, (blocks, rows))
            parts.append(part.sum(self.axis + 1) / (count * rows))
        return torch.cat(parts, self.axis)

    def expand(self, values: Tensor) -> Tensor:
        """One value a block -> the shape of the sums, which broadcasts against the parameter."""
        if not self.groups:
            return values
        parts, first = [], 0
        for start, stop, blocks in self.groups:
            part = values.narrow(self.axis, first, blocks).unsqueeze(self.axis + 1)
            size = [-1] * part.ndim
            size[self.axis + 1] = (stop - start) // blocks
            parts.append(part.expand(size).flatten(self.axis, self.axis + 1))
            first += blocks
        return torch.cat(parts, self.axis)


class BlockMeanAdam(Method):
    """AdamW whose second moment is one value a block.

    With v_b the EMA of mean(g_b^2)::

        m <- b1 m + (1 - b1) g;  p <- p (1 - lr wd)
        p <- p - lr / (1 - b1^t) * m / (sqrt(v_b) / sqrt(1 - b2^t) + eps)

    that is ``torch.optim.AdamW`` to the letter, with v broadcast.
    """

    matrix_only = True

    def traceable(self, shape: Shape, options: Any) -> bool:
        return True

    def partition(self, shape: Shape, options: Any) -> Blocks:
        """:meth:`blocks`, remembered; ``shape`` may be symbolic."""
        if in_kernel():
            return self.blocks(shape, options)
        return self._remembered(shape, options)

    @lru_cache(maxsize=4096)  # noqa: B019 - methods are few and live as long as the process
    def _remembered(self, shape: Shape, options: Any) -> Blocks:
        return self.blocks(shape, options)

    @abstractmethod
    def blocks(self, shape: Shape, options: Any) -> Blocks:
        """The partition of a parameter of ``shape``."""

    def spec(self, shape: Shape, options: Any, dtype: torch.dtype) -> dict[str, StateSpec]:
        return {
            "step": STEP,
            "exp_avg": StateSpec(shape, dtype, elementwise=True, moment="first"),
            "exp_avg_sq": StateSpec(self.partition(shape, options).state_shape(shape), dtype),
        }

    def scalars(self, step: Tensor, h: Hyper, options: Any) -> Tensors:
        return adam_scalars(step, h)

    def rounds(self, options: Any) -> int:
        return 1

    def sums_spec(self, shape: Shape, options: Any, round_: int) -> dict[str, Shape]:
        return {"sum_squares": self.partition(shape, options).sums_shape(shape)}

    def reduced_axes(self, shape: Shape, options: Any) -> tuple[int, ...] | None:
        blocks = self.partition(shape, options)
        return None if blocks.groups else blocks.axes

    def groups_rows(self, shape: Shape, options: Any) -> bool:
        return bool(self.partition(shape, options).groups)

    def stats(self, part: Part, ctx: Context, round_: Any) -> Tensors:
        return {"sum_squares": self.partition(tuple(part.g.shape), ctx.options).sum_squares(part.g)}

    def finish(
        self, sums: Tensors, state: Tensors, small: Tensors, ctx: Context, round_: int
    ) -> tuple[Tensors, Tensors]:
        blocks, h = self.partition(ctx.shape, ctx.options), ctx.h
        v = torch.lerp(state["exp_avg_sq"], blocks.pool(sums["sum_squares"], ctx.shape), 1 - h.beta2)
        scale = small["step_size"] / (v.sqrt().div_(small["bias2_sqrt"]).add_(h.eps))  # in place on its own tensor
        return {"scale": blocks.expand(scale).to(v.dtype)}, {"exp_avg_sq": v}

    def direction(self, part: Part, ctx: Context) -> Tensor:
        return torch.lerp(part.state["exp_avg"], part.g, 1 - ctx.h.beta1)  # divided by something positive

    def update(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        m = torch.lerp(part.state["exp_avg"], part.g, 1 - ctx.h.beta1)
        return m * part.small["scale"], {"exp_avg": m}

    def second_moment(self, v: Tensor, options: Any) -> Tensor | None:
        shape = tuple(v.shape)
        blocks = self.partition(shape, options)
        sums = v.sum(blocks.axes, keepdim=True) if blocks.axes else v
        return blocks.expand(blocks.pool(sums, shape)).expand(shape)


def update_bound(beta1: float, beta2: float) -> float:
    """The largest ``|m| / sqrt(v)`` that averages of any gradients can have (Cauchy and Schwarz); inf if b1^2 >= b2.

    7.27 for (0.9, 0.999). With bias corrections it is no larger. What exceeds it is an error of state in fewer bits.
    """
    if beta1 * beta1 >= beta2:
        return math.inf
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1 * beta1 / beta2))


def adam_scalars(step: Tensor, h: Hyper) -> Tensors:
    """``1 - b1^t``, ``lr / (1 - b1^t)`` and ``sqrt(1 - b2^t)``, in float64 as torch's Python floats."""
    bias1 = 1 - torch.pow(h.beta1, step)
    return {
        "bias1": bias1,
        "step_size": h.lr / bias1,
        "bias2_sqrt": (1 - torch.pow(h.beta2, step)).sqrt(),
    }
