"""A method whose second moment lies in one of the stores: its options, and which store a parameter gets."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memadvise.optim.method import (
    STEP,
    Box,
    Context,
    Hyper,
    Method,
    OptionProblem,
    Options,
    Part,
    Round,
    Shape,
    StateSpec,
    Tensors,
    Visit,
    broadcast_part,
    is_int,
)
from memadvise.optim.methods.factored import as_matrices
from memadvise.optim.methods.slimadam import SlimAdam, SlimAdamOptions
from memadvise.optim.methods.srsi import Ranks
from memadvise.optim.methods.stores import (
    BY_COLUMNS,
    BY_ROWS,
    DenseStore,
    FactoredStore,
    LowRankStore,
    MeanStore,
    Mix,
    Store,
)

KINDS = ("dense", "mean", "factored", "lowrank")
RANK_SHARE = 0.25  # of the smaller side, the default rank


def is_matrix(shape: Shape) -> bool:
    """Whether a (viewed) shape is one of matrices that can be compressed at all."""
    return len(shape) >= 2 and min(shape[-2:]) >= 2 and math.prod(shape) > 0


def resolve_rank(rank: Any, shape: Shape) -> int:
    """Columns for ``rank``: a number of them, a share of the smaller side, "full", or None for a quarter of it."""
    small = min(shape[-2:])
    if is_int(rank):
        return min(int(rank), small)
    share = {None: RANK_SHARE, "full": 1.0}.get(rank, rank)
    return max(int(share * small), 1)


def check_rank(rank: Any) -> None:
    """Raises OptionProblem for what is neither a positive int, a share in (0, 1), "full" nor None."""
    # not 1.0: it is equal to 1, and whatever remembers by options would take one for the other
    if rank in (None, "full") or (is_int(rank) and rank > 0) or (isinstance(rank, float) and 0 < rank < 1):
        return
    hint = "a positive integer, a share of the smaller side such as 0.25, or full"
    raise OptionProblem("rank", f"rank should be a number of columns or a share of them, found {rank!r}", hint)


def check_rank_fits(rank: Any, shape: Shape) -> None:
    """Raises OptionProblem for a rank above the smaller side of ``shape`` (viewed)."""
    if is_int(rank) and is_matrix(shape) and rank > min(shape[-2:]):
        raise OptionProblem(
            "rank",
            f"rank {rank} is above the smaller side of a matrix of shape {list(shape[-2:])}",
            f"at most {min(shape[-2:])}, or a share of the smaller side such as 0.25",
        )


@dataclass(frozen=True)
class StoreOptions(Options):
    """``store``: one of :data:`KINDS`; ``axes`` of mean, ``rank`` of lowrank."""

    store: str = "dense"
    axes: tuple[int, ...] | None = None
    rank: int | float | str | None = None

    def __post_init__(self) -> None:
        if self.store not in KINDS:
            raise OptionProblem("store", f"store '{self.store}' is none of {', '.join(KINDS)}")
        for option, store in (("axes", "mean"), ("rank", "lowrank")):
            if getattr(self, option) is not None and self.store != store:
                raise OptionProblem(
                    option, f"{option} would do nothing with store: {self.store}", f"it belongs to store: {store}"
                )
        if self.store == "mean":
            axes = (1,) if self.axes is None else self.axes
            object.__setattr__(self, "axes", SlimAdamOptions(axes).axes)
        check_rank(self.rank)


STORE_HELP: dict[str, str] = {
    "store": f"how the second moment of matrices is held: {', '.join(KINDS)}",
    "axes": "store: mean: the axes averaged, [1] unless given",
    "rank": "store: lowrank: columns of the factors, their share of the smaller side, or full; 0.25 unless given",
}


class StoredMethod(Method):
    """A method with a second moment in a :class:`Store`."""

    options_type: ClassVar[type[Options]] = StoreOptions
    sharded = False  # sums over a matrix, and its factors, would need the other shards

    @abstractmethod
    def mix(self, h: Hyper) -> Mix:
        """How the second moment takes up a gradient."""

    def mix_of(self, ctx: Context) -> Mix:
        """:meth:`mix` at this step, for this parameter."""
        return self.mix(ctx.h)

    def store(self, shape: Shape, options: Any) -> Store:
        """The store for a (viewed) shape, or for a box of one that is independent of the others."""
        if len(shape) < 2 or options.store == "dense":
            return DenseStore(shape)
        if options.store == "mean":
            return MeanStore(shape, options.axes)
        if not is_matrix(shape):
            return DenseStore(shape)
        if options.store == "factored":
            return FactoredStore(shape)
        return LowRankStore(shape, Ranks(resolve_rank(options.rank, shape), iterations=2, warm=True))

    def check(self, shape: Shape, options: Any) -> None:
        if options.store == "mean" and len(shape) >= 2:
            SlimAdam().check(shape, SlimAdamOptions(options.axes))
        check_rank_fits(options.rank, as_matrices(shape))

    def view(self, shape: Shape, options: Any) -> Shape:
        return shape if options.store in ("dense", "mean") else as_matrices(shape)

    def spec(self, shape: Shape, options: Any, dtype: torch.dtype) -> dict[str, StateSpec]:
        store = self.store(shape, options)
        step = {"step": STEP} if isinstance(store, LowRankStore) else {}
        return {**step, **store.spec(dtype)}

    def traceable(self, shape: Shape, options: Any) -> bool:
        return not isinstance(self.store(shape, options), LowRankStore)

    def visits(self, shape: Shape, options: Any) -> int:
        return 0 if isinstance(self.store(shape, options), DenseStore) else 1

    def reduced_axes(self, shape: Shape, options: Any) -> tuple[int, ...] | None:
        return self.store(shape, options).reduced_axes

    def prepare(self, visit: Visit, state: Tensors, ctx: Context) -> tuple[Tensors, Tensors]:
        small, new = self.store(ctx.shape, ctx.options).prepare(visit, state, ctx, self.mix_of(ctx))
        return {**ctx.scalars, **small}, new

    def stats(self, part: Part, ctx: Context, round_: Round) -> Tensors:
        return self.store(ctx.shape, ctx.options).stats(part, self.mix_of(ctx), round_)

    def second(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        """The v of this step on a box, and its new element-wise state."""
        return self.store(ctx.shape, ctx.options).second(part, self.mix_of(ctx))

    def take(self, key: str, tensor: Tensor, box: Box) -> Tensor:
        if len(box) < 2 or key not in BY_ROWS + BY_COLUMNS:
            return broadcast_part(tensor, box)
        return tensor[(*box[:-2], box[-2] if key in BY_ROWS else box[-1])]

    def scratch_bytes(self, shape: Shape, options: Any) -> int:
        return self.store(shape, options).scratch_bytes()

    def second_moment(self, v: Tensor, options: Any) -> Tensor | None:
        shape = tuple(v.shape)
        view = self.view(shape, options)
        return self.store(view, options).held(v.reshape(view)).reshape(shape)
