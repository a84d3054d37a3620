"""Steps of low-rank methods on a whole parameter, in place, on the CPU and with nothing composed.

These methods do not fit "see the gradient box by box, then move box by box": the state is that of a projection, or of
few coordinates, and belongs to other pieces of the parameter than a box. Here each cuts the parameter as its own state
is cut, keeps what belongs to a piece in the cache until it is done with it, and makes no copy of the state.

Each must agree with the pure functions it stands for, as the forms in :mod:`.inplace` must; the same test compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memadvise.optim.executors.work import Work, kind_of
from memadvise.optim.method import Context, Hyper, Round, Shape, Tensors, compute_dtype, device_type, read
from memadvise.optim.methods import micro_adam, srsi
from memadvise.optim.methods.adapprox import Adapprox
from memadvise.optim.methods.apollo import Apollo, adam_norm, squares
from memadvise.optim.methods.galore import GaLore, block_of
from memadvise.optim.methods.projected import Projected, update_moments
from memadvise.optim.methods.sketch import draw, draw_bytes, project
from memadvise.optim.methods.stores import LowRankStore, Mix
from memadvise.optim.recipe import Recipe
from memadvise.optim.tracing import alike

_ELEMENTS = 384 * 1024  # of a piece with what belongs to it: half of a core's L2 cache
_FEW = 8  # columns of a product that are made as rows
_LARGEST_RATE = 1e6  # of decay to step size; above, the sum of gradient and weights would lose the gradient


@lru_cache(maxsize=8192)
def supports(recipe: Recipe, device: str) -> bool:
    """Whether :func:`step` has a form for it."""
    return (
        device == "cpu"
        and recipe.compose.plain
        and not getattr(recipe.options, "compat", None)
        and recipe.method.name in _STEPS
        and compute_dtype(recipe.dtype) == recipe.dtype
        and math.prod(recipe.view) > 0
        and _STEPS[recipe.method.name][0](recipe)
    )


def step(work: Work, h: Hyper) -> bool:
    """Step ``work`` if there is a form for it; whether there was."""
    if not supports(work.recipe, device_type(work.p)) or work.p.dtype != work.recipe.dtype:
        return False
    alike(partial(kind_of, work, h), partial(_STEPS[work.recipe.method.name][1], work, work.context(h)))
    return True


def scratch_bytes(recipe: Recipe) -> int:
    """Upper bound of what :func:`step` allocates."""
    return _STEPS[recipe.method.name][2](recipe)


def _runs(count: int, each: int) -> Iterator[slice]:
    """Neighbours among ``count`` of ``each`` elements, as many as make a piece."""
    some = max(_ELEMENTS // max(each, 1), 1)
    for first in range(0, count, some):
        yield slice(first, min(first + some, count))


def _move(p: Tensor, g: Tensor, scale: Tensor, ctx: Context) -> None:
    """``p <- p decay - scale g`` for one factor, or one for each row or column."""
    h = ctx.h
    plain = p.is_contiguous() and g.is_contiguous() and not isinstance(p, FakeTensor)
    if scale.numel() == 1 and h.weight_decay and plain:
        size = float(scale)
        rate = float(h.lr) * h.weight_decay / size if size else math.inf
        if rate < _LARGEST_RATE:  # in one pass: p - size (g + rate p)
            torch._fused_sgd_(
                [p], [g], [], weight_decay=rate, momentum=0.0, lr=size, dampening=0.0, nesterov=False, maximize=False,
                is_first_step=False,
            )  # fmt: skip
            return
    for rows in _runs(p.shape[0], p.shape[1]):
        part = p[rows]
        if h.weight_decay:
            part.mul_(h.decay)
        part.addcmul_(g[rows], scale[rows] if scale.shape[0] > 1 else scale, value=-1)


# ---------------------------------------------------------------- APOLLO


def _is_matrix(recipe: Recipe) -> bool:
    return len(recipe.view) == 2 and not Projected.dense(recipe.view)


def _apollo(work: Work, ctx: Context) -> None:
    """A piece is a number of channels: projected, moments, norms, and its squares, before the next is looked at. Where
    columns are the channels, R is summed over pieces of rows first.
    """
    method, options, p, g, state = work.recipe.method, ctx.options, work.p, work.g, work.state
    assert isinstance(method, Apollo)
    sides = method.sides(ctx.shape, options)
    kind, key, rank, by_rows = options.projection, method.projection_key(ctx), sides.rank, sides.by_rows
    drawn = draw(kind, key, sides.m, rank, p)
    norm, adam, square = p.new_zeros(3, sides.n, 1).unbind()
    eps = ctx.scalars["bias2_sqrt"] * ctx.h.eps
    limited, small = options.limiter is not None, sides.n * rank <= _ELEMENTS // 4
    r = None
    if small or not by_rows:
        r = p.new_zeros((sides.n, rank) if by_rows else (rank, sides.n))
        runs = list(_runs(sides.rows, sides.columns + (0 if by_rows else rank)))
        each = runs[0].stop
        ours, theirs = (r.split(each), [drawn] * len(runs)) if by_rows else ([r] * len(runs), drawn.split(each))
        for rows, part, out, here in zip(runs, g.split(each), ours, theirs, strict=True):
            first = 0 if by_rows else rows.start
            project(part, here, kind, key, sides.m, rank, first, by_rows=by_rows, out=out)
            if limited:
                found = squares(part, sides, options).view(-1)
                square[rows.start if by_rows else 0 :][: found.numel(), 0] += found
    for some in _runs(sides.n, 4 * rank + (sides.m if r is None else 0)):
        if r is None:
            part = g[some]
            r_part = project(part, drawn, kind, key, sides.m, rank, 0, by_rows=True)
            if limited:
                found = squares(part, sides, options)
                square[some][: found.numel()] = found
        else:
            r_part = r[some] if by_rows else r[:, some].mT.contiguous()
        moments = {name: state[name][some] for name in ("exp_avg", "exp_avg_sq")}
        m, v = update_moments(r_part, moments, ctx.h)
        torch.linalg.vector_norm(r_part, dim=-1, keepdim=True, out=norm[some])
        adam[some] = adam_norm(m, v, eps, (-1,), ctx)
    if options.scaling == "tensor":
        norm, adam = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (norm, adam))
        square = square.sum((-2, -1), keepdim=True)
    if not by_rows:
        norm, adam, square = norm.mT, adam.mT, square.mT
    scale, norms = method.scale(adam, norm, None if not limited else square, state, ctx)
    for name, value in norms.items():
        state[name].copy_(value)
    _move(p, g, scale, ctx)


def _apollo_bytes(recipe: Recipe) -> int:
    method, options = recipe.method, recipe.options
    assert isinstance(method, Apollo)
    sides = method.sides(recipe.view, options)
    small, n, r = sides.n * sides.rank <= _ELEMENTS // 4, sides.n, sides.rank
    whole = n * r if small or not sides.by_rows else 0
    piece = min(max(_ELEMENTS // (4 * r + (0 if whole else sides.m)), 1), n) * r
    columns = (
        0 if sides.by_rows or options.scaling == "tensor" else min(65536, sides.m * n) + 2 * n
    )  # what the squares of columns are summed from
    values = whole + max(3 * piece, columns) + 8 * n
    drawn = recipe.dtype.itemsize * sides.m * r
    drawing = draw_bytes(options.projection, sides.m, r)  # is over before the rest begins
    return drawn + max(drawing, recipe.dtype.itemsize * values) + 4096


# ---------------------------------------------------------------- Adapprox


def _is_factored(recipe: Recipe) -> bool:
    method, options = recipe.method, recipe.options
    assert isinstance(method, Adapprox)
    native = not options.adam and not options.guidance
    return native and len(recipe.view) == 2 and isinstance(method.store(recipe.view, options), LowRankStore)


class _Seconds:
    """The second moment of a matrix, rebuilt piece by piece in one buffer of the cache's size."""

    def __init__(self, work: Work, mix: Mix) -> None:
        self.g, self.mix, self.state = work.g, mix, work.state
        rows, columns = work.shape
        self.runs = list(_runs(rows, 3 * columns))
        self.buffer = work.p.new_empty(self.runs[0].stop, columns)

    def pieces(self, small: Tensors) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, their gradient, and ``decay max(Q U^T, 0) + weight G^2``, which may be written to."""
        left, right = small["q"] * self.mix.decay, small["u"].mT.contiguous()
        self.runs.reverse()  # begin with what the pass before has left in the cache
        for rows in self.runs:
            g, v = self.g[rows], self.buffer[: rows.stop - rows.start]
            torch.mm(left[rows], right, out=v)
            yield rows, g, v.clamp_(min=0).addcmul_(g, g, value=self.mix.weight)

    def ratios(self, small: Tensors, eps: float) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and their ``G / (sqrt(V) + eps)``, which may be written to."""
        for rows, g, v in self.pieces(small):
            v.sqrt_()
            if eps:
                v.add_(eps)
            yield rows, torch.div(g, v, out=v)

    def visit(self, round_: Round, small: Tensors, shapes: dict[str, Shape]) -> Tensors:
        """A pass of the factorisation; products are formed with the long side last, as gemm likes it."""
        if round_ == "square":
            return {"total": torch.stack([srsi.square(v) for _, _, v in self.pieces(small)]).sum(0)}
        if round_ == "times":
            right = small["right"]
            if right.shape[-1] > _FEW:
                product = torch.empty(shapes["rows"], dtype=right.dtype, device=right.device)
                for rows, _, v in self.pieces(small):
                    torch.mm(v, right, out=product[rows])
                return {"rows": product}
            turned = right.mT.contiguous()
            product = turned.new_empty(shapes["rows"][::-1])
            for rows, _, v in self.pieces(small):
                product[:, rows] = turned @ v.mT
            return {"rows": product.mT}
        turned = small["left"].mT.contiguous()
        product = turned.new_zeros(shapes["columns"][::-1])
        for rows, _, v in self.pieces(small):
            product.addmm_(turned[:, rows], v)
        return {"columns": product.mT}


def _adapprox(work: Work, ctx: Context) -> None:
    """As many passes over pieces of V as the factorisation asks for, one for the clip, and one that moves."""
    method, options, h, p, g = work.recipe.method, ctx.options, ctx.h, work.p, work.g
    assert isinstance(method, Adapprox)
    store, mix = method.store(ctx.shape, options), method.mix_of(ctx)
    seconds = _Seconds(work, mix)
    small, new = store.prepare(seconds.visit, work.factors(), ctx, mix)
    clip = 1.0
    if options.clip:
        flat = [torch.dot(x.view(-1), x.view(-1)) for _, x in seconds.ratios(small, h.eps)]
        total = read(torch.stack(flat).to(torch.float64).sum(), 0.0)
        if not math.isfinite(total):
            flat = [x.nan_to_num_(0.0, 0.0, 0.0).square_().sum() for _, x in seconds.ratios(small, h.eps)]
            total = read(torch.stack(flat).to(torch.float64).sum(), 0.0)
        clip = 1 / max(math.sqrt(total / g.numel()) / options.clip, 1.0)
    lr, size = h.lr, 1 - (1 - h.beta1) * clip
    step_size = float(lr) if not isinstance(lr, Tensor) else read(lr, 0.0)
    m = work.state.get("exp_avg")
    plain = p.is_contiguous() and (m is None or m.is_contiguous()) and not isinstance(p, FakeTensor)
    for rows, x in seconds.ratios(small, h.eps):
        part = p[rows]
        if h.weight_decay:
            part.mul_(h.decay)
        if m is None:
            part.sub_(x, alpha=step_size * clip)
        elif plain:  # m <- b1 m + (1 - b1) clip x;  p <- p - lr m
            torch._fused_sgd_(
                [part], [x], [m[rows]], weight_decay=0.0, momentum=h.beta1, lr=step_size, dampening=size,
                nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip
        else:
            part.sub_(m[rows].lerp_(x.mul_(clip), 1 - h.beta1), alpha=step_size)
    work.store_factors(new)  # last: the update divides by the old ones


def _adapprox_bytes(recipe: Recipe) -> int:
    rows, columns = recipe.view
    piece = min(max(_ELEMENTS // (3 * columns), 1), rows) * columns
    once = 0 if recipe.options.adapt_every == 0 else 3 * 8 * piece // 8 + 4096  # float64 copies of parts of a piece
    ranks = recipe.options.ranks(recipe.view)
    factors = 2 * ranks.columns(ranks.rank, recipe.view) * (rows + columns)
    prepared = recipe.method.scratch_bytes(recipe.view, recipe.options) * recipe.dtype.itemsize // 4
    return recipe.dtype.itemsize * (piece + factors) + once + prepared


# ---------------------------------------------------------------- GaLore


def _galore(work: Work, ctx: Context) -> None:
    """The gradient is projected whole, and what comes back is subtracted where it is made."""
    method, h, p, g = work.recipe.method, ctx.h, work.p, work.g
    assert isinstance(method, GaLore)
    sides = method.sides(ctx.shape, ctx.options)

    def visit(round_: Round, small: Tensors, shapes: dict[str, Shape]) -> Tensors:
        if isinstance(round_, str):
            first, rows = block_of(round_, sides)
            return {round_: g[first : first + rows]}
        return {sides.channels: (g if sides.by_rows else g.mT) @ small[sides.coordinates]}

    small, new = method.project(visit, work.factors(), ctx, update=update_moments)
    decay = h.decay if isinstance(h.decay, int | float) else read(h.decay, 1.0)
    if not decay:  # 0 times NaN would be lost
        p.mul_(decay)
        decay = 1.0
    torch.addmm(p, small["left"], small["right"].mT, beta=decay, alpha=-1, out=p)
    work.store_factors(new)


def _galore_bytes(recipe: Recipe) -> int:
    sides = recipe.method.sides(recipe.view, recipe.options)  # type: ignore[attr-defined]
    wide = (recipe.dtype.itemsize - 4) * 3 * sides.n * sides.rank
    return wide + recipe.method.scratch_bytes(recipe.view, recipe.options)


# ---------------------------------------------------------------- MicroAdam


def _is_sparse(recipe: Recipe) -> bool:
    return not recipe.options.alpha and recipe.options.block % recipe.options.bucket == 0


def _micro_adam(work: Work, ctx: Context) -> None:
    """A piece is a number of blocks. One row of the ring is written, and only weights in the window are moved."""
    options, h, p, g, state = ctx.options, ctx.h, work.p, work.g, work.state
    row, each = (ctx.step - 1) % options.window, micro_adam.selected(options.block, options.density)
    blocks = -(-p.numel() // options.block)
    m, s = p.new_empty(2, min(blocks, _micro_blocks(options)) * options.block).unbind()
    for some in _runs(blocks, 3 * options.block):
        low, high = some.start * options.block, min(some.stop * options.block, p.numel())
        first_bucket, last_bucket = low // options.bucket, -(-high // options.bucket)
        error = state["error"][low // 2 : -(-high // 2)]
        bounds = [state[name][first_bucket:last_bucket] for name in ("low", "high")]
        a = micro_adam.dequantize(error, bounds[0], bounds[1], high - low, options.bucket, g.dtype).add_(g[low:high])
        places = micro_adam.select(a, options)
        first = micro_adam.starts(places.numel(), options, a.device)
        ring = slice(some.start * each, some.start * each + places.numel())
        indices, values = state["indices"][:, ring], state["values"][:, ring]
        indices[row] = places
        places += first
        values[row] = a.index_select(0, places)
        a.index_fill_(0, places, 0.0)
        for target, value in zip((error, *bounds), micro_adam.quantize_finite(a, options.bucket), strict=True):
            target.copy_(value)
        del a, places
        sums = m[: high - low].zero_(), s[: high - low].zero_()
        places, moves = micro_adam.window_sums(indices, values, first, *sums, ctx)
        part = p[low:high]
        if h.weight_decay:
            part.mul_(h.decay)
        part.index_copy_(0, places, part.index_select(0, places).sub_(moves.mul_(h.lr)))


def _micro_blocks(options: Any) -> int:
    return max(_ELEMENTS // (3 * options.block), 1)


def _micro_adam_bytes(recipe: Recipe) -> int:
    options, count = recipe.options, math.prod(recipe.view)
    size = min(_micro_blocks(options) * options.block, -(-count // options.block) * options.block)
    kept = micro_adam.selected_in_all(min(size, count), options)
    itemsize, width = recipe.dtype.itemsize, 24 + 3 * recipe.dtype.itemsize  # of a place with all that belongs to it
    return max(6 * itemsize * size, 2 * itemsize * size + kept * width * options.window) + kept * 96 + 4096


_STEPS: dict[str, tuple[Callable[[Recipe], bool], Callable[[Work, Context], None], Callable[[Recipe], int]]] = {
    "apollo": (_is_matrix, _apollo, _apollo_bytes),
    "apollo_mini": (_is_matrix, _apollo, _apollo_bytes),
    "galore": (_is_matrix, _galore, _galore_bytes),
    "micro_adam": (_is_sparse, _micro_adam, _micro_adam_bytes),
    "adapprox": (_is_factored, _adapprox, _adapprox_bytes),
}
