"""Ways to hold a second moment ``v <- decay v + weight g^2`` in less than a value an element, for any base algorithm.

========== =================================== ==============================================================
store      state beside ``[*lead, M, N]``       the v of this step that the update divides by
========== =================================== ==============================================================
dense      ``[*lead, M, N]``                    v itself
mean       size 1 on ``axes``                   the EMA (or sum) of the mean of g^2 over ``axes``
factored   ``[*lead, M, 1]`` + ``[*lead, 1, N]``  row means x column means / mean (arXiv 1804.04235)
lowrank    ``[*lead, M, k]`` + ``[*lead, N, k]``  ``decay max(Q U^T, 0) + weight g^2`` with the factors of the last step
========== =================================== ==============================================================

``decay`` and ``weight`` are the algorithm's: b2 and 1 - b2 for Adam and RMSprop, 1 and 1 for Adagrad (:class:`Mix`).
Leading axes are stacks of independent matrices. Vectors, scalars and matrices with a side of 1 are always dense.

The low-rank v contains the whole ``weight g^2`` of this step, so ``|g| / sqrt(v) <= 1 / sqrt(weight)`` whatever was
lost. No v is held: every pass over the gradient rebuilds it box by box from the factors.

A gradient with NaN or inf: dense and low-rank v meet it as ``torch.optim`` does, in the entries it has (the low-rank
factors of that matrix are not replaced in that step); mean and factored v spread it to what is averaged with it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memadvise.optim.method import Context, Part, Round, Shape, StateSpec, Tensors, Visit, read
from memadvise.optim.methods import srsi
from memadvise.optim.methods.blockmean import Blocks
from memadvise.optim.methods.factored import column_shape, row_shape
from memadvise.optim.methods.sums import column_sums

BY_ROWS, BY_COLUMNS = ("q", "left", "rows"), ("u", "right", "columns")  # factors that lie along one axis of the matrix


class Mix(NamedTuple):
    """``v <- decay v + weight g^2``."""

    decay: float
    weight: float


@dataclass(frozen=True)
class Store(ABC):
    """How the second moment of a parameter of (viewed) ``shape`` is held. Stateless."""

    shape: Shape

    @property
    def reduced_axes(self) -> tuple[int, ...] | None:
        """As :meth:`memadvise.optim.method.Method.reduced_axes`."""
        return None

    @abstractmethod
    def spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        """The state."""

    def prepare(self, visit: Visit, state: Tensors, ctx: Context, mix: Mix) -> tuple[Tensors, Tensors]:
        """What :meth:`second` needs, and the new factor-sized state."""
        return {}, {}

    def stats(self, part: Part, mix: Mix, round_: Round) -> Tensors:
        """The sums of a pass that :meth:`prepare` asked for."""
        return {}

    @abstractmethod
    def second(self, part: Part, mix: Mix) -> tuple[Tensor, Tensors]:
        """The v of this step on a box (or what broadcasts with it), and its new element-wise state."""

    def scratch_bytes(self) -> int:
        """Upper bound of what :meth:`prepare` allocates beside boxes."""
        return 0

    @abstractmethod
    def held(self, v: Tensor) -> Tensor:
        """What would be held in place of a dense ``v``, expanded."""


class DenseStore(Store):
    """Every element its own."""

    @property
    def reduced_axes(self) -> tuple[int, ...] | None:
        return ()

    def spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        return {"exp_avg_sq": StateSpec(self.shape, dtype, elementwise=True, moment="second")}

    def second(self, part: Part, mix: Mix) -> tuple[Tensor, Tensors]:
        v = (part.state["exp_avg_sq"] * mix.decay).addcmul_(part.g, part.g, value=mix.weight)
        return v, {"exp_avg_sq": v}

    def held(self, v: Tensor) -> Tensor:
        return v


@dataclass(frozen=True)
class MeanStore(Store):
    """One value for all elements along ``axes``."""

    axes: tuple[int, ...]

    @property
    def reduced_axes(self) -> tuple[int, ...] | None:
        return self.axes

    def spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        return {"exp_avg_sq": StateSpec(Blocks(self.axes).sums_shape(self.shape), dtype)}

    def prepare(self, visit: Visit, state: Tensors, ctx: Context, mix: Mix) -> tuple[Tensors, Tensors]:
        blocks = Blocks(self.axes)
        sums = visit("mean", {}, {"sum_squares": blocks.sums_shape(self.shape)})
        v = state["exp_avg_sq"] * mix.decay + blocks.pool(sums["sum_squares"], self.shape) * mix.weight
        return {"v": v}, {"exp_avg_sq": v}

    def stats(self, part: Part, mix: Mix, round_: Round) -> Tensors:
        return {"sum_squares": Blocks(self.axes).sum_squares(part.g)}

    def second(self, part: Part, mix: Mix) -> tuple[Tensor, Tensors]:
        return part.small["v"], {}

    def scratch_bytes(self) -> int:
        return 5 * 4 * math.prod(Blocks(self.axes).sums_shape(self.shape))

    def held(self, v: Tensor) -> Tensor:
        return v.mean(self.axes, keepdim=True).expand(v.shape)


class FactoredStore(Store):
    """Row and column means of each matrix; their outer product over the mean."""

    def spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        row, column = StateSpec(row_shape(self.shape), dtype), StateSpec(column_shape(self.shape), dtype)
        return {"exp_avg_sq_row": row, "exp_avg_sq_col": column}

    def prepare(self, visit: Visit, state: Tensors, ctx: Context, mix: Mix) -> tuple[Tensors, Tensors]:
        sums = visit("factored", {}, {"row": row_shape(self.shape), "col": column_shape(self.shape)})
        row = state["exp_avg_sq_row"] * mix.decay + sums["row"] * (mix.weight / self.shape[-1])
        column = state["exp_avg_sq_col"] * mix.decay + sums["col"] * (mix.weight / self.shape[-2])
        small = {"row": _over_mean(row), "col": column}
        return small, {"exp_avg_sq_row": row, "exp_avg_sq_col": column}

    def stats(self, part: Part, mix: Mix, round_: Round) -> Tensors:
        squares = part.g * part.g
        return {"row": squares.sum(-1, keepdim=True), "col": column_sums(squares)}

    def second(self, part: Part, mix: Mix) -> tuple[Tensor, Tensors]:
        return part.small["row"] * part.small["col"], {}

    def scratch_bytes(self) -> int:
        return 5 * 4 * (math.prod(row_shape(self.shape)) + math.prod(column_shape(self.shape)))

    def held(self, v: Tensor) -> Tensor:
        return _over_mean(v.mean(-1, keepdim=True)) * v.mean(-2, keepdim=True)


def _over_mean(row: Tensor) -> Tensor:
    """``row / mean(row)`` of each matrix, 0 where that is 0 / 0."""
    mean = row.mean(-2, keepdim=True)
    return torch.where(mean == 0, 0.0, row / mean)


# ---------------------------------------------------------------- low rank


@dataclass(frozen=True)
class LowRankStore(Store):
    """``Q U^T`` by S-RSI; ``floor``: the share of the rank-1 estimate below which ``Q U^T`` is not trusted, 0: none."""

    ranks: srsi.Ranks
    floor: float = 0.0

    def spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        *lead, rows, columns = self.shape
        k = self.ranks.rank
        rank = {"rank": StateSpec((), torch.int64, host=True)} if self.ranks.adaptive else {}
        return {**rank, "q": StateSpec((*lead, rows, k), dtype), "u": StateSpec((*lead, columns, k), dtype)}

    def prepare(self, visit: Visit, state: Tensors, ctx: Context, mix: Mix) -> tuple[Tensors, Tensors]:
        ranks, turn = self.ranks, ctx.key_for("refresh")
        held = max(int(read(state["rank"], ranks.rank)), ranks.init) if ranks.adaptive else ranks.rank
        old = self._factors(state["q"][..., :held], state["u"][..., :held])
        if not ranks.refreshes(ctx.step, turn):
            return old, {}
        key = ctx.key_for("sketch", ctx.step)

        def begin(columns: int) -> Tensor:
            return srsi.start(key, self.shape, columns, state["u"], old["u"] if ranks.warm else None)

        passes = _Passes(visit, old, self.shape)
        adapt = ranks.due(ctx.step, ctx.key, ranks.since(ctx.step, turn))
        q, u, rank = srsi.factor(passes, self.shape, ranks, begin, held, adapt)
        finite = (q.isfinite().all(-1).all(-1) & u.isfinite().all(-1).all(-1))[..., None, None]
        new = {"q": self._kept(q, state["q"], finite)}
        del q
        new["u"] = self._kept(u, state["u"], finite)
        if ranks.adaptive:
            new["rank"] = torch.full_like(state["rank"], rank)
        return old, new  # every update still divides by the old factors

    def _kept(self, new: Tensor, old: Tensor, finite: Tensor) -> Tensor:
        """A new factor with all its columns; of a matrix where that is not finite, the old one."""
        if new.shape != old.shape:
            new = torch.nn.functional.pad(new, (0, old.shape[-1] - new.shape[-1]))
        return torch.where(finite, new, old, out=new)

    def _factors(self, q: Tensor, u: Tensor) -> Tensors:
        """The factors, and those of the rank-1 estimate if it is wanted (at full rank there is nothing to mend)."""
        if not self.floor or q.shape[-1] == min(self.shape[-2:]):
            return {"q": q, "u": u}
        row = (q @ u.sum(-2).unsqueeze(-1)).div_(self.shape[-1]).clamp_(min=0)
        column = (u @ q.sum(-2).unsqueeze(-1)).div_(self.shape[-2]).clamp_(min=0).mT
        return {"q": q, "u": u, "row": _over_mean(row) * self.floor, "col": column}

    def stats(self, part: Part, mix: Mix, round_: Round) -> Tensors:
        v = self.second(part, mix)[0]
        if round_ == "times":
            return {"rows": v @ part.small["right"]}
        if round_ == "transposed":
            return {"columns": v.mT @ part.small["left"]}
        return {"total": srsi.square(v)}

    def second(self, part: Part, mix: Mix) -> tuple[Tensor, Tensors]:
        small = part.small
        v = small["q"] @ small["u"].mT
        if "row" in small:
            torch.maximum(v, small["row"] * small["col"], out=v)
        else:
            v.clamp_(min=0)
        return v.mul_(mix.decay).addcmul_(part.g, part.g, value=mix.weight), {}

    def scratch_bytes(self) -> int:
        return 4 * srsi.scratch_elements(self.shape, self.ranks)

    def held(self, v: Tensor) -> Tensor:
        return srsi.approximate(v, self.ranks)


@dataclass(frozen=True)
class _Passes:
    """The v of this step as an operator: every product is a pass over the boxes."""

    visit: Visit
    old: Tensors
    shape: Shape

    def _total(self, name: str, size: tuple[int, int], round_: str, **small: Tensor) -> Tensor:
        return self.visit(round_, {**self.old, **small}, {name: (*self.shape[:-2], *size)})[name]

    def times(self, right: Tensor) -> Tensor:
        return self._total("rows", (self.shape[-2], right.shape[-1]), "times", right=right)

    def transposed(self, left: Tensor) -> Tensor:
        return self._total("columns", (self.shape[-1], left.shape[-1]), "transposed", left=left)

    def square(self) -> Tensor:
        return self._total("total", (1, 1), "square")
