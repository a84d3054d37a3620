"""A whole step of one parameter in one compiled kernel: the pure functions, traced, without temporaries of its size.

What is compiled is prepare, update, the move and the write-back of one parameter, decoding and encoding included. The
constants of its group (betas, eps, weight decay) and its options are constants of the kernel; what changes from step to
step (learning rate, bias corrections, keys of random numbers) are 0-dim tensors, so that a schedule compiles nothing
anew. Matrices of one width share a kernel whatever their number of rows, element-wise methods one for all shapes.

What cannot be compiled, or fails to, falls back to chunked, with one warning that says why.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memadvise.optim import noise
from memadvise.optim.executors import chunked
from memadvise.optim.executors.cuts import Cuts
from memadvise.optim.executors.kernel import LARGEST_INT32, Kernel
from memadvise.optim.executors.work import Work, agreement, caution_scale, encode, moved, noise_like
from memadvise.optim.int8_tensor import Int8Weight
from memadvise.optim.method import Context, Hyper, Part, Round, Shape, Tensors, compute_dtype, device_type
from memadvise.optim.methods.sums import ROWS
from memadvise.optim.recipe import CORRECTION, Coded, Recipe
from memadvise.optim.weights import Int8Part, WeightPart

MOST_KERNELS = 32  # of one setting: a model with more shapes than that would compile for minutes
LEAST = {"cpu": 1 << 20, "cuda": 1 << 12}  # elements from which a kernel is made unasked

_Constants = tuple[float, float, float, float]  # betas, eps, weight decay
_WEIGHTS, _GRADIENT, _LR, _SCALE = "p", "g", "lr", "scale"
_AGREEMENT, _MOVE = "agreement", "move"
_WIDEST = 4096  # elements of a block
_ALIGNMENT = 16  # bytes, which a CUDA kernel reads at once


def supports(recipe: Recipe, kind: str) -> bool:
    """Whether a step of this recipe can be one kernel on a device of ``kind``."""
    if kind == "cpu" and not all(coded.codec.arithmetic for coded in recipe.coded.values()):
        return False  # element by element it is slower than the lookups of chunked, and takes a minute to compile
    fits = math.prod(recipe.view) > 0 and block_width(recipe) is not None
    return fits and recipe.method.traceable(recipe.view, recipe.options)


def usable(recipe: Recipe, p: Tensor) -> bool:
    """Whether it can be tried here: nothing has failed yet."""
    kind = device_type(p)
    return not _failed(recipe, kind) and supports(recipe, kind)


def wanted(recipe: Recipe, p: Tensor) -> bool:
    """Whether a parameter is large enough for a kernel to be worth its compilation, and none has failed here."""
    return p.numel() >= LEAST.get(device_type(p), LARGEST_INT32) and usable(recipe, p)


def scratch_bytes(recipe: Recipe) -> int:
    """Upper bound of what a kernel allocates: sums, those of blocks of rows before them, and what is made of them."""
    blocks = 3 * math.prod(recipe.view) // ROWS if recipe.method.visits(recipe.view, recipe.options) else 0
    return blocks * compute_dtype(recipe.dtype).itemsize + recipe.method.scratch_bytes(recipe.view, recipe.options)


def step(works: Sequence[Work], h: Hyper) -> None:
    """One step of every parameter, in one kernel each, or a few where sums over all of it come first."""
    lr = torch.as_tensor(h.lr, dtype=torch.float64)
    rest = [work for work in works if not _step_one(work, h, lr)]
    if rest:
        chunked.step(rest, h)


# ---------------------------------------------------------------- kernels, and what is known of them

_kernels: dict[Any, list[Kernel]] = {}  # several where what tracing assumed of the rows does not hold for all
_counts: dict[Any, int] = {}
_failures: dict[Any, str] = {}


def _family(recipe: Recipe, kind: str) -> Any:
    return recipe.method.name, recipe.options, recipe.compose, recipe.dtype, kind


def _failed(recipe: Recipe, kind: str) -> bool:
    return kind in _failures or _family(recipe, kind) in _failures


def _fail(family: Any, device: str, reason: str) -> None:
    _failures[family] = reason
    warnings.warn(
        f"memadvise: {family[0]} on {device} runs without a compiled kernel (slower, same result): {reason}",
        stacklevel=2,
    )


def number_of_failures() -> int:
    """It grows when an executor that was chosen can no longer be."""
    return len(_failures)


def forget() -> None:
    """Drop every kernel and every failure."""
    _kernels.clear()
    _counts.clear()
    _failures.clear()


def _kernel_for(plan: _Plan, what: int | str, given: Tensors) -> Kernel | None:
    """The kernel for these tensors, made now if there is none; None if there cannot be one."""
    recipe, key, tensors = plan.program.recipe, plan.key(what, given), list(given.values())
    times = [plan.times(t) for t in tensors]
    for kernel in _kernels.get(key, ()):
        if kernel.holds(plan.rows):
            return kernel
    kind = tensors[0].device.type
    family = _family(recipe, kind)
    if _failed(recipe, kind):
        return None
    if _counts.get((what, family), 0) >= MOST_KERNELS:
        _fail(family, kind, f"there are more than {MOST_KERNELS} different shapes")
        return None
    try:
        kernel = Kernel(plan.program.function(what, list(given)), tensors, times)
    except Exception as error:  # whatever a compiler may raise: there is another way, and the reason is told
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        if _no_compiler(error):
            _failures[kind] = reason
        _fail(family, kind, reason)
        return None
    _counts[what, family] = _counts.get((what, family), 0) + 1
    _kernels.setdefault(key, []).append(kernel)
    return kernel


def _no_compiler(error: BaseException) -> bool:
    """Whether no kernel at all can be made on this device."""
    names = ("InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton", "CppCompileError")
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in names:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


# ---------------------------------------------------------------- one parameter


def _step_one(work: Work, h: Hyper, lr: Tensor) -> bool:
    """Whether the step was made."""
    if isinstance(work.p, FakeTensor) or isinstance(work.g, FakeTensor):
        return True  # in a trace: a kernel allocates nothing of its own
    recipe = work.recipe
    plan = _plan(work, h, lr)
    if plan is None:
        return False
    tensors = plan.gather(work, lr)
    visits = recipe.method.visits(recipe.view, recipe.options)
    if visits > 1:  # in one kernel what two visits need would be kept between them: the parameter's size once more
        for number in range(visits):
            sums = plan.run(number, tensors)
            if sums is None:
                return False
            tensors.update({f"sums.{number}.{i}": t for i, t in enumerate(sums)})
    if recipe.compose.cautious:
        signs = plan.run(_AGREEMENT, tensors)
        if signs is None:
            return False
        tensors[_SCALE] = caution_scale(str(recipe.compose.cautious), signs[0], math.prod(recipe.view))
    if plan.run(_MOVE, tensors) is None:
        return False
    if isinstance(work.p, Int8Weight):
        torch.autograd.graph.increment_version(work.p)
    return True


def _plan(work: Work, h: Hyper, lr: Tensor) -> _Plan | None:
    """How this parameter is stepped, remembered while nothing changes that a kernel depends on. None: it cannot be."""
    constants = (h.beta1, h.beta2, h.eps, h.weight_decay)
    tensors = _own_tensors(work)
    if work.p.device.type == "cuda" and any(t.data_ptr() % _ALIGNMENT for t in tensors.values()):
        return None
    contiguous = all(t.is_contiguous() for t in tensors.values())
    memo_key = (*constants, lr.device)
    kept = work.memo.plans.get(memo_key) if contiguous else None
    if kept is not None and kept.dtype == work.g.dtype:
        return kept
    recipe, view = work.recipe, work.recipe.view
    group = work.p.group if isinstance(work.p, Int8Weight) else 0
    plan = _Plan(_Program(recipe, constants, group), work.g.dtype)
    width = block_width(recipe)
    if width:
        if not contiguous:
            return None
        row = math.prod(view[1:])
        plan.rows, plan.blocks = view[0], row // width
        if not recipe.method.visits(view, recipe.options):  # there are no rows, only blocks
            plan.rows, plan.blocks = plan.rows * plan.blocks, 1
        plan.views = {name: (math.prod(view) // width, -1) for name in tensors if _cut(recipe, name)}
    elif contiguous and _shapeless(recipe, tensors):
        plan.rows, plan.views = math.prod(view), dict.fromkeys(tensors, (-1,))
    elif contiguous and _rows_vary(recipe, tensors):
        plan.rows = view[0]
    plan.rows = plan.rows if plan.rows > 1 else 0
    if contiguous:
        work.memo.plans[memo_key] = plan
    return plan


def _own_tensors(work: Work) -> Tensors:
    """Weights, gradient and state by name."""
    p, specs = work.p, work.recipe.specs
    tensors: Tensors = {}
    if isinstance(p, Int8Weight):
        tensors["p.codes"], tensors["p.scale"], tensors["p.zero"] = p.region(0, p.numel())
    else:
        tensors[_WEIGHTS] = p
    tensors[_GRADIENT] = work.g
    for name, tensor in work.state.items():
        if not specs[name].host:
            tensors[f"state.{name}"] = tensor
    return tensors


@dataclass
class _Plan:
    """How one parameter is stepped.

    ``rows``: how many, where their number may vary from call to call, so that parameters share kernels; 0: it is a
    constant. ``blocks``: in a row, where tensors are seen by blocks. ``views``: the shapes in which kernels see them.
    """

    program: _Program
    dtype: torch.dtype
    rows: int = 0
    blocks: int = 1
    views: dict[str, Shape] = field(default_factory=dict)
    kernels: dict[int | str, Kernel] = field(default_factory=dict)

    def gather(self, work: Work, lr: Tensor) -> Tensors:
        """What the kernels of this step are given."""
        tensors = _own_tensors(work)
        for name, shape in self.views.items():
            tensors[name] = tensors[name].view(shape)
        tensors[_LR] = lr
        for name, scalar in work.scalars.items():
            tensors[f"scalar.{name}"] = scalar
        for name in (*work.recipe.coded, _WEIGHTS):
            key = work.weight_key() if name == _WEIGHTS else work.noise_key(name)
            if key is not None:
                tensors[f"key.{name}.low"], tensors[f"key.{name}.high"] = noise.halves(key)
        return tensors

    def times(self, tensor: Tensor) -> int:
        """How often the tensor's first axis holds the rows: 1, by blocks as often as these; 0: it does not."""
        if not self.rows or not tensor.ndim or not tensor.is_contiguous():
            return 0
        return {self.rows: 1, self.rows * self.blocks: self.blocks}.get(tensor.shape[0], 0)

    def run(self, what: int | str, tensors: Tensors) -> tuple[Tensor, ...] | None:
        """One kernel; None if there is none."""
        kernel = self.kernels.get(what)
        if kernel is None:
            kernel = _kernel_for(self, what, tensors)
            if kernel is None:
                return None
            self.kernels[what] = kernel
        return tuple(kernel(*tensors.values()))

    def key(self, what: int | str, tensors: Tensors) -> Any:
        """Of a kernel: parameters with the same may share it."""
        layout = tuple(
            (name, (n, *t.shape[1:]) if (n := self.times(t)) else (tuple(t.shape), t.stride()), t.dtype, t.device)
            for name, t in tensors.items()
        )
        recipe = self.program.recipe
        large = math.prod(recipe.view) > LARGEST_INT32
        setting = recipe.method.name, recipe.options, recipe.compose, self.program.constants, self.program.group
        return what, setting, layout, bool(self.rows), large


def _cut(recipe: Recipe, name: str) -> bool:
    """Whether a tensor is cut like the parameter."""
    name = name.removeprefix("state.")
    held = {held for n in recipe.elementwise if n in recipe.coded for held in recipe.coded[n].names.values()}
    return name in recipe.elementwise or name in held or name.startswith((_WEIGHTS, CORRECTION)) or name == _GRADIENT


def _shapeless(recipe: Recipe, tensors: Tensors) -> bool:
    """Whether shape means nothing: an element-wise method, all of whose tensors are of one size."""
    method, options, view = recipe.method, recipe.options, recipe.view
    if recipe.coded or recipe.blocks or method.visits(view, options) or method.reduced_axes(view, options) != ():
        return False
    return all(t.numel() == math.prod(view) for t in tensors.values())


def _rows_vary(recipe: Recipe, tensors: Tensors) -> bool:
    """Whether the number of rows need not be a constant."""
    view = recipe.view
    if len(view) < 2 or recipe.method.groups_rows(view, recipe.options):
        return False
    return all(t.ndim > 0 and t.shape[0] in (view[0], 1) for t in tensors.values())


class _Program:
    """What is traced for one recipe."""

    def __init__(self, recipe: Recipe, constants: _Constants, group: int) -> None:
        self.recipe, self.constants, self.group = recipe, constants, group

    def function(self, what: int | str, names: list[str]) -> Callable[..., Any]:
        """A function of tensors in the order of ``names``: the sums of a visit by its number, those of
        caution (:data:`_AGREEMENT`), or the step (:data:`_MOVE`).
        """

        def traced(*tensors: Tensor) -> tuple[Tensor, ...]:
            one = _Whole(self, dict(zip(names, tensors, strict=True)))
            if isinstance(what, int):
                return one.sums(what)
            if what == _AGREEMENT:
                return (one.agreement(),)
            one.move()
            return ()

        return traced


def _held_once(small: Tensor) -> Tensor:
    """``small``, computed once before the loop over the parameter: inductor would compute it anew for every element.

    To it this is a view, and what is viewed is held in memory.
    """
    return small if small.ndim == 0 else small.as_strided(small.shape, small.stride())


class _Enough(Exception):
    """The sums that were wanted are there."""

    def __init__(self, sums: Tensors) -> None:
        super().__init__()
        self.sums = sums


class _Whole:
    """A whole parameter in a kernel that is being traced.

    Where state or weights are held in blocks of neighbours, the update sees everything as rows of one block: finding a
    block's largest value and writing its codes are then the same loop, and what lies between never leaves the cache.
    """

    def __init__(self, program: _Program, tensors: Tensors) -> None:
        recipe = self.recipe = program.recipe
        self.tensors, self.group = tensors, program.group
        self.width = block_width(recipe) or 0
        seen = tuple(tensors[_GRADIENT].shape)
        if self.width:  # blocks, from outside: a kernel that turned rows into blocks before writing would write twice
            row = math.prod(recipe.view[1:])
            visits = recipe.method.visits(recipe.view, recipe.options)
            self.shape: Shape = (seen[0] // (row // self.width), *recipe.view[1:]) if visits else seen
        else:
            self.shape = seen
        beta1, beta2, eps, weight_decay = program.constants
        self.h = Hyper(tensors[_LR], beta1, beta2, eps, weight_decay)
        scalars = {name.removeprefix("scalar."): t for name, t in tensors.items() if name.startswith("scalar.")}
        self.ctx = Context(self.h, recipe.options, self.shape, scalars, coded=bool(recipe.coded))

    # ------------------------------------------------------------ what the kernel is given, as the method sees it

    def _key(self, name: str) -> noise.Key | None:
        low = self.tensors.get(f"key.{name}.low")
        return None if low is None else (low, self.tensors[f"key.{name}.high"])

    def _stored(self, coded: Coded, elementwise: bool) -> tuple[Tensors, int]:
        """What is held of a coded tensor, and the length of its rows."""
        length = self.width if elementwise and self.width else coded.rows.length
        return {suffix: self.tensors[f"state.{name}"] for suffix, name in coded.names.items()}, length

    def _held(self, name: str) -> Tensor:
        """A logical state tensor, decoded where it is held in fewer bits; by blocks where it is cut so."""
        coded, spec = self.recipe.coded.get(name), self.recipe.logical[name]
        if coded is None:
            return self.tensors[f"state.{name}"]
        decoded = coded.codec.decode(*self._stored(coded, spec.elementwise), signed=coded.signed).to(spec.dtype)
        if spec.elementwise:
            return decoded if self.width else decoded.view(self.shape)
        return decoded.view(spec.shape)

    def _weights(self, shape: Shape) -> WeightPart:
        tensors, cuts = self.tensors, Cuts.whole(shape)
        if _WEIGHTS not in tensors:
            held = tensors["p.codes"], tensors["p.scale"], tensors["p.zero"]
            return Int8Part(held, self.group, shape, self.recipe.dtype)
        prefix = f"state.{CORRECTION}"
        extra = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        return self.recipe.form.parts(tensors[_WEIGHTS], extra, cuts)[0]

    def _part(self, small: Tensors, *, cut: bool = False) -> tuple[Part, WeightPart]:
        """The parameter in its own shape, or with ``cut`` by blocks where there are any."""
        g = self.tensors[_GRADIENT].to(compute_dtype(self.recipe.dtype))
        weights = self._weights(tuple(g.shape))
        by_blocks = bool(cut and self.width)
        if by_blocks:
            small = {name: self._over_blocks(t, self.width) for name, t in small.items()}
        shape = tuple(g.shape) if by_blocks else self.shape
        small = {name: _held_once(t) for name, t in small.items()}

        def state() -> Tensors:
            return {name: self._held(name).view(shape) for name in self.recipe.elementwise}

        boxes = Cuts.whole(shape).boxes
        return Part(g.view(shape), small, boxes[0], lambda: weights.load().view(shape), state), weights

    def _over_blocks(self, small: Tensor, width: int) -> Tensor:
        """A tensor that broadcasts with the parameter, for the parameter as rows of ``width``."""
        if small.ndim == 0:
            return small
        if math.prod(small.shape[1:]) == 1:
            per_row = math.prod(self.shape[1:]) // width
            return small.reshape(-1, 1).expand(self.shape[0], per_row).reshape(-1, 1)
        return small.expand(self.shape).reshape(-1, width)

    # ------------------------------------------------------------ what it does

    def _prepare(self, until: int | None = None) -> tuple[Tensors, Tensors]:
        """The method's, with the sums of earlier kernels; ends with :class:`_Enough` at visit ``until``."""
        method, numbers = self.recipe.method, itertools.count()

        def visit(round_: Round, small: Tensors, shapes: dict[str, Shape]) -> Tensors:
            number = next(numbers)
            known = [t for name, t in self.tensors.items() if name.startswith(f"sums.{number}.")]
            if known and number != until:
                return dict(zip(shapes, known, strict=True))
            sums = method.stats(self._part(small)[0], self.ctx, round_)
            if number == until:
                raise _Enough({name: sums[name] for name in shapes})
            return sums

        return method.prepare(visit, {name: self._held(name) for name in self.recipe.factors}, self.ctx)

    def sums(self, number: int) -> tuple[Tensor, ...]:
        try:
            self._prepare(number)
        except _Enough as enough:
            return tuple(enough.sums.values())
        raise AssertionError(f"{self.recipe.method.name} has fewer than {number + 1} visits")

    def agreement(self) -> Tensor:
        part, _ = self._part(self._prepare()[0], cut=True)
        return agreement(self.recipe.method.direction(part, self.ctx), part.g)

    def move(self) -> None:
        recipe = self.recipe
        small, new = self._prepare()
        part, weights = self._part(small, cut=True)
        u, changed = recipe.method.update(part, self.ctx)
        p = moved(part.p, part.g, u, self.tensors.get(_SCALE), self.h, recipe)
        for name, value in {**new, **changed}.items():
            coded = recipe.coded.get(name)
            if coded is None:
                self.tensors[f"state.{name}"].copy_(value)
                continue
            stored, length = self._stored(coded, name in changed)
            encode(coded, value.reshape(-1, length), self._key(name), 0, stored)
        weights.store(p, noise_like(self._key(_WEIGHTS), 0, p))


def block_width(recipe: Recipe) -> int | None:
    """The elements of a block that all blocks divide; 0 where there are none, None where rows end within one."""
    coded = [recipe.coded[name] for name in recipe.elementwise if name in recipe.coded]
    blocks = [(c.rows, c.codec.block) for c in coded if c.codec.block] + ([recipe.blocks] if recipe.blocks else [])
    if not blocks:
        return 0
    width = math.lcm(*(block for _, block in blocks))
    row = math.prod(recipe.view[1:])
    fits = all(rows.length % width == 0 for rows, _ in blocks) and row % width == 0
    return width if fits and width <= _WIDEST else None
