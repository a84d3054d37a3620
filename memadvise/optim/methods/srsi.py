"""Low-rank factors of a matrix that is never held: S-RSI and its adaptive rank AS-RSI (arXiv 2403.14958).

S-RSI, streamlined randomised subspace iteration, of ``A [M, N]`` with rank k and l power iterations::

    U <- Gaussian [N, k];  l times:  Q <- orthonormal columns of A U,  U <- A^T Q;      A ~ Q U^T = Q Q^T A

It needs only the products ``A U`` and ``A^T Q``, which add up over chunks of rows: whoever calls it gives these two
(:class:`Operator`) and may rebuild ``A`` piece by piece. Leading axes are stacks of independent matrices.

What is known of it, and used here:

- ``||A - Q U^T||^2 = ||A||^2 - ||U||^2`` (Frobenius): the error costs nothing, and the columns' norms give it for every
  smaller rank. The norms are summed in float64; what float32 factors leave is an error of about 1e-4.
- Column j of the result depends on columns 1 to j of the start alone. So oversampling (p more columns, dropped at the
  end) changes nothing unless the columns are sorted before the cut: ``truncation="svd"`` rotates them to the singular
  vectors of the small factor first (optimal within the subspace, 2 N r^2 more work); ``"columns"`` is the paper's cut,
  and does not compute what it would drop.
- Between iterations U is scaled by column, which changes no span: products of factors as small as squared gradients
  would leave float32's range.

AS-RSI starts at rank ``init`` and grows until the relative error is at most ``threshold``, by ``f(error)`` columns a
time; see :data:`INCREMENTS`. The start is a hash of seed, name and step (:mod:`memadvise.optim.noise`): the same for
every chunking, device and process, and in every call of one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from memadvise.optim import noise
from memadvise.optim.method import Shape, read

_NOISE = 2**16  # random numbers made at a time; at most 32 bytes of temporaries each
_PIECES = 8  # in which float64 copies are made


class Operator(Protocol):
    """A (stack of) matrices ``[*lead, M, N]`` known by its products."""

    def times(self, right: Tensor) -> Tensor:
        """``A @ right``: ``[*lead, N, r]`` -> ``[*lead, M, r]``."""
        ...

    def transposed(self, left: Tensor) -> Tensor:
        """``A^T @ left``: ``[*lead, M, r]`` -> ``[*lead, N, r]``."""
        ...

    def square(self) -> Tensor:
        """``||A||_F^2`` of each matrix, ``[*lead, 1, 1]``, float64."""
        ...


@dataclass(frozen=True)
class Dense:
    """An operator that is held."""

    a: Tensor

    def times(self, right: Tensor) -> Tensor:
        return self.a @ right

    def transposed(self, left: Tensor) -> Tensor:
        return self.a.mT @ left

    def square(self) -> Tensor:
        return square(self.a)


# ---------------------------------------------------------------- how the rank grows


def logistic(error: float) -> float:
    """Columns to add at relative ``error``: a shifted logistic, 6 at 0, 27 at 0.1, 175 at 0.5, 190 at 1."""
    return 200 / (1 + math.exp(2.5 - 10 * error)) - 9


@dataclass(frozen=True)
class Growth:
    """A user's ``f(relative error) -> columns to add`` under a name that is the same in every process."""

    f: Callable[[float], float]

    def __call__(self, error: float) -> float:
        return self.f(error)

    def __str__(self) -> str:
        return f"{getattr(self.f, '__module__', '')}.{getattr(self.f, '__qualname__', type(self.f).__name__)}"


INCREMENTS = ("logistic", "double", "one_shot")  # f of the paper; k; one call at the largest rank, then cut


@dataclass(frozen=True)
class Ranks:
    """How one matrix is factored, everything resolved: ``1 <= minimum <= init <= rank <= min(M, N)``.

    Args:
        rank: the columns that are reserved, the largest rank.
        init: the rank an adaptation starts from.
        minimum: the smallest rank ``one_shot`` may choose.
        iterations: power iterations l, at least 1; with l = 1 the columns are badly sorted.
        oversampling: columns beside, used with ``truncation="svd"`` only.
        truncation: "columns" or "svd".
        warm: start from the last factor where there is one.
        every: adapt every that many steps; 0: the rank is ``rank`` for good.
        refresh: factor anew every that many steps, each parameter at steps of its own; 1: at each.
        stagger: parameters adapt at different steps.
        threshold: the relative Frobenius error that is good enough.
        increment: one of :data:`INCREMENTS`, or f.
    """

    rank: int
    init: int = 1
    minimum: int = 1
    iterations: int = 5
    oversampling: int = 0
    truncation: str = "columns"
    warm: bool = False
    every: int = 0
    refresh: int = 1
    stagger: bool = False
    threshold: float = 0.01
    increment: str | Growth = "logistic"

    @property
    def adaptive(self) -> bool:
        """Whether there is a rank to choose."""
        return self.every > 0 and self.init < self.rank

    def columns(self, rank: int, shape: Shape) -> int:
        """The columns that are iterated for ``rank``."""
        extra = self.oversampling if self.truncation == "svd" else 0
        return min(rank + extra, *shape[-2:])

    def refreshes(self, step: int, key: int) -> bool:
        """Whether the factors are made anew at ``step`` (1, 2, ...): at the first, and then every so often."""
        return step <= 1 or (step - 1 + key) % self.refresh == 0

    def since(self, step: int, key: int) -> int:
        """How many steps, ``step`` included, the factors have not seen before it: 1 to ``refresh``."""
        return min((step - 2 + key) % self.refresh + 1, step - 1) if step > 1 else 1

    def due(self, step: int, key: int, since: int = 1) -> bool:
        """Whether the rank is chosen anew at ``step``, where the factors are: at the first, and then every so often;
        a day that fell among the last ``since`` steps, in which they were not, is made up for.
        """
        past = step - 1 + (key if self.stagger else 0)
        return self.adaptive and (step <= 1 or past // self.every > (past - since) // self.every)

    def grown(self, rank: int, error: float) -> int:
        """The rank to try after ``rank`` left ``error``."""
        if math.isinf(error):  # nothing can be read in a trace: the largest it may be
            return self.rank
        add = rank if self.increment == "double" else _rule(self.increment)(error)
        return min(rank + max(math.floor(add), 1), self.rank)


def _rule(increment: str | Growth) -> Callable[[float], float]:
    return increment if isinstance(increment, Growth) else logistic


# ---------------------------------------------------------------- the iteration


def start(key: int, shape: Shape, columns: int, like: Tensor, warm: Tensor | None) -> Tensor:
    """The first U, ``[*lead, N, columns]``: standard normal, its first columns ``warm`` where that is not zero.

    A start with more columns has the same first ones.
    """
    *lead, _, inputs = shape
    flat = like.new_empty(columns * math.prod(lead) * inputs)
    for first in range(0, flat.numel(), _NOISE):
        part = flat[first : first + _NOISE]
        part.copy_(noise.gaussian(key, first, part.numel(), like.device))
    u = flat.view(columns, *lead, inputs).movedim(0, -1)
    if warm is not None and warm.shape[-1]:
        kept = u[..., : min(columns, warm.shape[-1])]
        old = warm[..., : kept.shape[-1]]
        kept.copy_(torch.where(torch.linalg.vector_norm(old, math.inf, dim=-2, keepdim=True) > 0, old, kept))
    return u


def iterate(a: Operator, u: Tensor, rank: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """S-RSI from the start ``u``, which it uses up: ``Q [*lead, M, rank]``, orthonormal, and ``U [*lead, N, rank]``."""
    for _ in range(ranks.iterations):
        q = a.times(_scale_(u))
        del u
        q = torch.linalg.qr(q).Q
        u = a.transposed(q)
    if ranks.truncation == "svd":
        # an SVD of NaN would raise; such factors are refused by whoever asked, not here
        x, s, yh = torch.linalg.svd(u.nan_to_num(0.0, 0.0, 0.0), full_matrices=False)
        poison = (u - u).sum((-2, -1), keepdim=True)  # 0, or NaN
        q, u = q @ yh.mT[..., :rank], x[..., :rank] * s[..., None, :rank] + poison
    return q[..., :rank], u[..., :rank]


def _scale_(u: Tensor) -> Tensor:
    largest = torch.linalg.vector_norm(u, math.inf, dim=-2, keepdim=True)
    return u.div_(torch.where(largest > 0, largest, 1.0))


def square(a: Tensor) -> Tensor:
    """The squared Frobenius norm of each matrix in float64, ``[*lead, 1, 1]``, by pieces of rows."""
    rows = max(a.shape[-2] // _PIECES, 1)
    parts = [part.to(torch.float64).square().sum((-2, -1), keepdim=True) for part in a.split(rows, dim=-2)]
    return torch.stack(parts).sum(0)


def errors(u: Tensor, total: Tensor) -> Tensor:
    """The relative Frobenius errors ``[*lead, k]`` of ranks 1 to k, from ``U`` and ``||A||^2``; 0 where A is 0."""
    some = max(u.shape[-1] // _PIECES, 1)
    energy = torch.cat([part.to(torch.float64).square().sum(-2) for part in u.split(some, dim=-1)], -1).cumsum(-1)
    total = total[..., 0]
    return torch.where(total > 0, (1 - energy / total).clamp_(min=0), (energy - energy) + (total - total)).sqrt_()


def relative_error(u: Tensor, total: Tensor) -> Tensor:
    """The largest relative Frobenius error of a stack, 0-dim; NaN where anything is not finite."""
    return errors(u, total)[..., -1].amax()


def factor(
    a: Operator, shape: Shape, ranks: Ranks, begin: Callable[[int], Tensor], held: int, adapt: bool
) -> tuple[Tensor, Tensor, int]:
    """S-RSI at rank ``held``, or AS-RSI with ``adapt``.

    ``begin(columns)`` gives the start. Returns Q, U and the rank. Where ``a`` is not finite the factors are not, and
    the rank stays ``held``: it is for the caller to keep the old ones.
    """

    def attempt(rank: int) -> tuple[Tensor, Tensor]:
        return iterate(a, begin(ranks.columns(rank, shape)), rank, ranks)

    if not adapt:
        return *attempt(held), held
    total = a.square()
    if ranks.increment == "one_shot":
        q, u = attempt(ranks.rank)
        found = errors(u, total).reshape(-1, ranks.rank).amax(0)
        count = read(torch.where(found.isnan().any(), math.nan, (found > ranks.threshold).sum() + 1.0), math.inf)
        rank = held if math.isnan(count) else max(int(min(count, ranks.rank)), ranks.minimum)
        return q[..., :rank], u[..., :rank], rank
    rank = ranks.init
    while True:
        q, u = attempt(rank)
        if rank == ranks.rank:
            return q, u, rank
        error = read(relative_error(u, total), math.inf)
        if math.isnan(error):
            return (q, u, rank) if rank == held else (*attempt(held), held)
        if error <= ranks.threshold:
            return q, u, rank
        del q, u
        rank = ranks.grown(rank, error)


def approximate(a: Tensor, ranks: Ranks, key: int = 0) -> Tensor:
    """What the factors of the non-negative ``a [*lead, M, N]`` say it is: ``max(Q U^T, 0)``, held whole."""
    shape = tuple(a.shape)
    held = ranks.init if ranks.adaptive else ranks.rank
    begin: Callable[[int], Tensor] = lambda columns: start(key, shape, columns, a, None)  # noqa: E731
    q, u, _ = factor(Dense(a), shape, ranks, begin, held, ranks.adaptive)
    return (q @ u.mT).clamp_(min=0)


def scratch_elements(shape: Shape, ranks: Ranks) -> int:
    """Upper bound of the factor-sized values that live at once in a step with these factors (see the tests)."""
    *lead, rows, inputs = shape
    wide = ranks.columns(ranks.rank, shape)
    noise_values = 8 * min(_NOISE, wide * inputs * math.prod(lead))
    products = 2 * (rows + inputs) + min(rows, inputs)  # two pairs of factors, and a product of one box
    return math.prod(lead) * (wide * products + 3 * wide * wide) + noise_values


def check_increment(value: Any) -> str | Growth | None:
    """``increment`` as :class:`Ranks` takes it; None if it is none."""
    if isinstance(value, Growth) or (isinstance(value, str) and value in INCREMENTS):
        return value
    return Growth(value) if callable(value) else None
