"""Boxes of bounded size through one scratch buffer: no temporary of a parameter's size, and good use of the cache.

Where the blocks of a method lie whole within a box (row means, element-wise methods), each box is finished at once:
statistics, new state and update in one visit. Otherwise a first visit sums the statistics over all boxes and a second
applies the update. Caution needs the whole tensor's agreement first: one visit more, in which updates are computed
only to be counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from memadvise.optim.executors import inplace, whole
from memadvise.optim.executors.cuts import Cuts
from memadvise.optim.executors.work import (
    CodedParts,
    Segments,
    Work,
    agreeing,
    agreement,
    aligned,
    caution_scale,
    coded_factor_bytes,
    composed_bytes,
    granule,
    kind_of,
    moved,
)  # fmt: skip
from memadvise.optim.method import Context, Hyper, Method, Part, Round, Shape, Tensors, compute_dtype, device_type
from memadvise.optim.recipe import Recipe
from memadvise.optim.tracing import alike, valueless

_Prepare = Callable[[], tuple[Tensors, Tensors]]
CPU_ELEMENTS = 256 * 1024  # 1 MiB of float32: a few of these lie in a core's L2 cache
CUDA_ELEMENTS = 16 * 1024 * 1024  # enough work to hide the launches, 64 MiB of float32


def box_limit(recipe: Recipe, kind: str) -> int:
    """Elements a box on a device of ``kind``: fewer where decoding and encoding take ten times a box beside it."""
    if kind != "cuda":
        return CPU_ELEMENTS
    return max(CUDA_ELEMENTS // 8, 1) if recipe.coded or recipe.compose.weights != "nearest" else CUDA_ELEMENTS


def _buffers(dtype: torch.dtype) -> int:
    """One temporary, and float32 copies of p and g where those are narrower."""
    return 1 if compute_dtype(dtype) == dtype else 3


def scratch_bytes(recipe: Recipe, kind: str) -> int:
    """Upper bound of what a step on a parameter allocates: the scratch, and a handful of factor-sized tensors."""
    if whole.supports(recipe, kind):
        return whole.scratch_bytes(recipe)
    local, cuts = _layout(recipe, box_limit(recipe, kind))
    itemsize = compute_dtype(recipe.dtype).itemsize
    part = max((math.prod(shape) for shape in cuts.shapes), default=0)
    method, view = recipe.method, recipe.view
    factors = method.scratch_bytes_on(kind, cuts.shapes[0] if local and cuts.shapes else view, recipe.options)
    factors += coded_factor_bytes(recipe)
    if _kernel(recipe) is not None:
        return _buffers(recipe.dtype) * part * itemsize + factors
    return ((_buffers(recipe.dtype) + 6) * itemsize + composed_bytes(recipe)) * part + factors


def _kernel(recipe: Recipe) -> inplace.Apply | None:
    compat = getattr(recipe.options, "compat", None)
    return inplace.APPLY.get(recipe.method.name) if recipe.compose.plain and not compat else None


@lru_cache(maxsize=8192)
def _layout(recipe: Recipe, limit: int) -> tuple[bool, Cuts]:
    """Whether boxes are independent, and the boxes. The same at every step, so made once: for small tensors this
    costs more than the arithmetic.
    """
    method, options, view = recipe.method, recipe.options, recipe.view
    whole = method.whole_axes(view, options)
    runs = [spec.runs.length for spec in recipe.logical.values() if spec.runs is not None]
    if _kernel(recipe) is None:  # pure functions make a few temporaries of a box's size
        limit = max(limit // 2, 1)
    coded = [recipe.coded[name] for name in recipe.elementwise if name in recipe.coded]
    blocks = [(c.rows, c.codec.block) for c in coded] + ([recipe.blocks] if recipe.blocks else [])
    cuts = Cuts(view, limit, whole, math.lcm(*runs))
    if not all(aligned(*block, cuts) for block in blocks):  # blocks that do not end with a box of this size
        cuts = Cuts(view, limit, whole, math.lcm(granule(view, blocks), *runs))
    if not all(aligned(*block, cuts) for block in blocks):
        cuts = Cuts(view, max(math.prod(view), 1))
    axes = method.reduced_axes(view, options)
    local = axes is not None and method.rounds(options) <= 1 and bool(cuts.boxes)
    if local and axes:
        local = all(shape[a] == view[a] for a in axes for shape in cuts.shapes[:1])
    return local, cuts


class _Scratch:
    """One flat buffer for each (device, dtype) of a step, cut into box-shaped temporaries; freed after the step."""

    def __init__(self, works: Sequence[Work]) -> None:
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        for work in works:
            key = (work.p.device, compute_dtype(work.p.dtype))
            cuts = _layout(work.recipe, box_limit(work.recipe, device_type(work.p)))[1]
            part = max((math.prod(shape) for shape in cuts.shapes), default=0)
            sizes[key] = max(sizes.get(key, 0), _buffers(work.p.dtype) * part)
        self._flat = {key: torch.empty(size, device=key[0], dtype=key[1]) for key, size in sizes.items()}

    def cut(self, work: Work, shape: Shape) -> list[Tensor]:
        """Box-shaped views of the buffer: a temporary, and copies of g and p where those are narrower."""
        flat = self._flat[(work.p.device, compute_dtype(work.p.dtype))]
        size = math.prod(shape)
        return [flat[i * size : (i + 1) * size].view(shape) for i in range(_buffers(work.p.dtype))]


def step(works: Sequence[Work], h: Hyper) -> None:
    """One step of every parameter, one after the other."""
    rest = [work for work in works if not whole.step(work, h)]
    scratch = _Scratch(rest)
    for work in rest:
        alike(partial(kind_of, work, h), lambda work=work: _Stepper(work, h, scratch).run())  # type: ignore[misc]


class _Stepper:
    """One parameter cut in boxes: its parts by box, and temporaries by box shape (all the same but the last)."""

    def __init__(self, work: Work, h: Hyper, scratch: _Scratch) -> None:
        self.work, self.h, self.scratch = work, h, scratch
        self.recipe, self.method, self.ctx = work.recipe, work.recipe.method, work.context(h)
        self.local, cuts = _layout(work.recipe, box_limit(work.recipe, device_type(work.p)))
        self.cuts = cuts.sample() if valueless() else cuts
        self.p, self.g = work.weight_parts(self.cuts), self.cuts.parts(work.g)
        names = self.recipe.elementwise
        self.coded = {name: CodedParts(work, name, self.cuts) for name in names if name in self.recipe.coded}
        self.plain = {name: self.cuts.parts(work.state[name]) for name in names if name not in self.coded}
        self.narrow = compute_dtype(work.p.dtype) != work.p.dtype
        self.kernel = _kernel(self.recipe)
        self._temps: dict[Shape, list[Tensor]] = {}

    def run(self) -> None:
        count = len(self.cuts.shapes)
        scale = None
        if self.local:
            factors = self._taken(self.work.factors())
            if self.recipe.compose.cautious:
                scale = self._caution([self._prepare_box(i, factors) for i in range(count)])
            for i in range(count):
                small, new = self._prepare_box(i, factors)()
                for name, value in new.items():
                    factors[name][i].copy_(value)
                self._apply(i, small, scale)
                del small, new  # before the next box needs as much
            return
        prepare = inplace.prepare(self.method) if self.kernel is not None else self.method.prepare
        small, new = prepare(self._visit, self.work.factors(), self.ctx)
        smalls = self._taken(small)
        if self.recipe.compose.cautious:
            scale = self._caution([partial(self._prepared, smalls, i) for i in range(count)])
        for i in range(count):
            self._apply(i, self._box(smalls, i), scale)
        self.work.store_factors(new)  # last: an update may divide by the old ones

    def _prepared(self, smalls: dict[str, Sequence[Tensor]], i: int) -> tuple[Tensors, Tensors]:
        return self._box(smalls, i), {}

    # ------------------------------------------------------------ parts

    def _temporaries(self, i: int) -> list[Tensor]:
        shape = self.cuts.shapes[i]
        if shape not in self._temps:
            self._temps[shape] = self.scratch.cut(self.work, shape)
        return self._temps[shape]

    def _part(self, i: int, small: Tensors) -> Part:
        temps = self._temporaries(i)
        g = temps[1].copy_(self.g[i]) if self.narrow else self.g[i]
        return Part(
            g,
            small,
            self.cuts.boxes[i],
            lambda: self.p[i].load(temps[2] if self.narrow else None),
            lambda: {
                **{name: parts[i] for name, parts in self.plain.items()},
                **{name: parts.load(i) for name, parts in self.coded.items()},
            },
        )

    def _taken(self, tensors: Tensors) -> dict[str, Sequence[Tensor]]:
        """Factor-sized tensors, cut to the boxes they belong to."""
        return {name: self._take(name, value) for name, value in tensors.items()}

    def _take(self, name: str, tensor: Tensor) -> Sequence[Tensor]:
        spec = self.recipe.logical.get(name)
        if spec is not None and spec.runs is not None:
            return self.cuts.runs(tensor, spec.runs)
        if type(self.method).take is Method.take:
            return self.cuts.parts(tensor)
        return [self.method.take(name, tensor, box) for box in self.cuts.boxes]

    @staticmethod
    def _box(tensors: dict[str, Sequence[Tensor]], i: int) -> Tensors:
        return {name: parts[i] for name, parts in tensors.items()}

    # ------------------------------------------------------------ passes

    def _prepare_box(self, i: int, factors: dict[str, Sequence[Tensor]]) -> _Prepare:
        """Prepare box ``i`` as if it were a parameter of its own; nothing is stored."""
        ctx = Context(
            self.h, self.ctx.options, self.cuts.shapes[i], self.ctx.scalars, self.ctx.key, self.ctx.step,
            self.cuts.starts[i], self.ctx.coded,
        )  # fmt: skip

        def prepare() -> tuple[Tensors, Tensors]:
            def visit(round_: Round, small: Tensors, shapes: dict[str, Shape]) -> Tensors:
                return inplace.stats(self.method, self._part(i, small), ctx, round_, self._temporaries(i)[0])

            return self.method.prepare(visit, self._box(factors, i), ctx)

        return prepare

    def _visit(self, round_: Round, small: Tensors, shapes: dict[str, Shape]) -> Tensors:
        dtype, device = compute_dtype(self.work.p.dtype), self.work.p.device
        totals: Tensors = {}
        parts: dict[str, Sequence[Tensor]] = {}
        smalls = self._taken(small)
        for i in range(len(self.cuts.shapes)):
            part = self._part(i, self._box(smalls, i))
            for name, value in inplace.stats(self.method, part, self.ctx, round_, self._temporaries(i)[0]).items():
                if name not in totals:  # sums given in float64 are summed in float64
                    wide = torch.promote_types(dtype, value.dtype)
                    totals[name] = torch.zeros(shapes[name], device=device, dtype=wide)
                    parts.update(self._taken({name: totals[name]}))
                parts[name][i].add_(value)
        for name in shapes.keys() - totals.keys():  # a parameter without elements
            totals[name] = torch.zeros(shapes[name], device=device, dtype=dtype)
        return totals

    def _caution(self, prepares: Sequence[_Prepare]) -> Tensor:
        """The factor of the parameter, or of each of those that are stepped as one."""
        segments = self.work.segments
        dtype, device, mode = compute_dtype(self.work.p.dtype), self.work.p.device, str(self.recipe.compose.cautious)
        if segments is not None:
            sums = torch.zeros(2, len(segments.sizes), device=device, dtype=dtype)
            for i, prepare in enumerate(prepares):
                part, ids = self._part(i, prepare()[0]), self._ids(segments, i)
                for row, flags in zip(
                    sums, agreeing(self.method.direction(part, self._context(i)), part.g), strict=True
                ):
                    row.index_add_(0, ids, flags.to(dtype))  # whole numbers: exact in any order
            return caution_scale(mode, sums, segments.sizes)
        sums = torch.zeros(2, device=device, dtype=dtype)
        for i, prepare in enumerate(prepares):
            part = self._part(i, prepare()[0])
            sums += agreement(self.method.direction(part, self._context(i)), part.g)
        return caution_scale(mode, sums, math.prod(self.recipe.view))

    def _ids(self, segments: Segments, i: int) -> Tensor:
        start = self.cuts.starts[i]
        return segments.ids[start : start + math.prod(self.cuts.shapes[i])]

    def _context(self, i: int) -> Context:
        if len(self.cuts.shapes) == 1:
            return self.ctx
        ctx = self.ctx
        shape = self.cuts.shapes[i] if self.local else ctx.shape
        return Context(self.h, ctx.options, shape, ctx.scalars, ctx.key, ctx.step, self.cuts.starts[i], ctx.coded)

    def _apply(self, i: int, small: Tensors, scale: Tensor | None) -> None:
        work, part = self.work, self._part(i, small)
        if self.kernel is not None:
            temps = self._temporaries(i)
            self.kernel(part.p, part.g, part.state, small, self.h, self.ctx.options, temps[0])
            self.p[i].store(part.p, None)
            return
        u, changed = self.method.update(part, self._context(i))
        if scale is not None and work.segments is not None:
            scale = scale.index_select(0, self._ids(work.segments, i))
        new = moved(part.p, part.g, u, scale, self.h, self.recipe)
        del u
        for name, value in changed.items():
            if name in self.coded:
                self.coded[name].store(i, value)
            else:
                self.plain[name][i].copy_(value)
        self.p[i].store(new, work.weight_noise(self.cuts.starts[i], new))
