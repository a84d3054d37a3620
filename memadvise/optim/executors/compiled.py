"""A whole step of one parameter in one compiled kernel: the pure functions, traced, without temporaries of its size.

What is compiled is prepare, update, the move and the write-back of one parameter, decoding and encoding included. The
constants of its group (betas, eps, weight decay) and its options are constants of the kernel; what changes from step to
step (learning rate, bias corrections, keys of random numbers) are 0-dim tensors, so that a schedule compiles nothing
anew. Matrices of one width share a kernel whatever their number of rows, element-wise methods one for all shapes.

What cannot be compiled, or fails to, falls back to chunked, with one warning that says why.
"""

from __future__ import annotations

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
from memadvise.optim.recipe import CORRECTION, Recipe
from memadvise.optim.weights import Int8Part, WeightPart

MOST_KERNELS = 32  # of one setting: a model with more shapes than that would compile for minutes
LEAST = {"cpu": 1 << 20, "cuda": 1 << 12}  # elements from which a kernel is made unasked

_Constants = tuple[float, float, float, float]  # betas, eps, weight decay
_WEIGHTS, _GRADIENT, _LR, _SCALE = "p", "g", "lr", "scale"


def supports(recipe: Recipe) -> bool:
    """Whether a step of this recipe can be one kernel."""
    return recipe.method.traceable(recipe.view, recipe.options) and math.prod(recipe.view) > 0


def usable(recipe: Recipe, p: Tensor) -> bool:
    """Whether it can be tried here: nothing has failed yet."""
    return not _failed(recipe, device_type(p)) and supports(recipe)


def wanted(recipe: Recipe, p: Tensor) -> bool:
    """Whether a parameter is large enough for a kernel to be worth its compilation, and none has failed here."""
    return p.numel() >= LEAST.get(device_type(p), LARGEST_INT32) and usable(recipe, p)


def scratch_bytes(recipe: Recipe) -> int:
    """Upper bound of what a kernel allocates: sums, and what is made of them."""
    return recipe.method.scratch_bytes(recipe.view, recipe.options)


def step(works: Sequence[Work], h: Hyper) -> None:
    """One step of every parameter, one kernel each (two where caution counts first)."""
    rest = [work for work in works if not _step_one(work, h)]
    if rest:
        chunked.step(rest, h)


# ---------------------------------------------------------------- kernels, and what is known of them

_kernels: dict[Any, Kernel] = {}
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


def forget() -> None:
    """Drop every kernel and every failure."""
    _kernels.clear()
    _counts.clear()
    _failures.clear()


def _kernel_for(key: Any, recipe: Recipe, function: Callable[..., Any], tensors: list[Tensor], rows: int) -> Kernel | None:
    """The kernel ``key``, made now if there is none; None if there cannot be one."""
    kernel = _kernels.get(key)
    if kernel is not None:
        if kernel.holds(rows):
            return kernel
        key = (key, rows)  # it was made for another number of rows than this
        if key in _kernels:
            return _kernels[key]
        varying = [False] * len(tensors)
    else:
        varying = [_varies(t, rows) for t in tensors] if rows else [False] * len(tensors)
    kind = tensors[0].device.type
    family = _family(recipe, kind)
    if _failed(recipe, kind):
        return None
    if _counts.get(family, 0) >= MOST_KERNELS:
        _fail(family, kind, f"there are more than {MOST_KERNELS} different shapes")
        return None
    try:
        kernel = _kernels[key] = Kernel(function, tensors, varying)
    except Exception as error:  # whatever a compiler may raise: there is another way, and the reason is told
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        if _no_compiler(error):
            _failures[kind] = reason
        _fail(family, kind, reason)
        return None
    _counts[family] = _counts.get(family, 0) + 1
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


def _varies(tensor: Tensor, rows: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == rows and tensor.is_contiguous()


# ---------------------------------------------------------------- one parameter


@dataclass
class _Inputs:
    """The tensors of one parameter by name, and the shape in which the method sees it here."""

    tensors: Tensors
    shape: Shape
    flat: bool
    rows: int  # how many, where their number may vary; 0: it is part of the kernel
    noisy: list[str] = field(default_factory=list)


def _step_one(work: Work, h: Hyper) -> bool:
    """Whether the step was made."""
    if isinstance(work.p, FakeTensor) or isinstance(work.g, FakeTensor):
        return True  # in a trace: a kernel allocates nothing of its own
    recipe = work.recipe
    constants = (h.beta1, h.beta2, h.eps, h.weight_decay)
    inputs = _inputs(work, h)
    names = list(inputs.tensors)
    group = work.p.group if isinstance(work.p, Int8Weight) else 0
    key = _key(inputs, recipe, constants, group)
    program = _Program(recipe, constants, names, group)
    scale: Tensor | None = None
    if recipe.compose.cautious:
        counted = _kernel_for((*key, "agreement"), recipe, program.agreement, list(inputs.tensors.values()), inputs.rows)
        if counted is None:
            return False
        (sums,) = counted(*inputs.tensors.values())
        scale = caution_scale(str(recipe.compose.cautious), sums, math.prod(recipe.view))
        inputs.tensors[_SCALE] = scale
    moves = _kernel_for(key, recipe, program.move, list(inputs.tensors.values()), inputs.rows)
    if moves is None:
        return False
    moves(*inputs.tensors.values())
    if isinstance(work.p, Int8Weight):
        torch.autograd.graph.increment_version(work.p)
    return True


def _key(inputs: _Inputs, recipe: Recipe, constants: _Constants, extra: Any) -> Any:
    layout = tuple(
        (
            name,
            tuple(t.shape[1:]) if inputs.rows and _varies(t, inputs.rows) else (tuple(t.shape), t.stride()),
            t.dtype,
            t.device,
        )
        for name, t in inputs.tensors.items()
    )
    large = math.prod(recipe.view) > LARGEST_INT32
    setting = recipe.method.name, recipe.options, recipe.compose, constants
    return setting, layout, inputs.flat, bool(inputs.rows), large, extra


def _inputs(work: Work, h: Hyper) -> _Inputs:
    recipe, p = work.recipe, work.p
    tensors: Tensors = {}
    if isinstance(p, Int8Weight):
        codes, scale, zero = p.region(0, p.numel())
        tensors.update({"p.codes": codes, "p.scale": scale, "p.zero": zero})
    else:
        tensors[_WEIGHTS] = p
    tensors[_GRADIENT] = work.g
    tensors.update({f"state.{name}": t for name, t in work.state.items() if not recipe.specs[name].host})
    shape = recipe.view
    flat = _flat(recipe, tensors)
    if flat:
        tensors = {name: t.view(-1) for name, t in tensors.items()}
        shape = (math.prod(shape),)
    rows = shape[0] if flat or _rows_vary(recipe, tensors) else 0
    found = _Inputs(tensors, shape, flat, rows if rows > 1 else 0)
    lr = h.lr if isinstance(h.lr, Tensor) else torch.tensor(h.lr, dtype=torch.float64)
    tensors[_LR] = lr
    tensors.update({f"scalar.{name}": t for name, t in work.scalars.items()})
    keys = {name: work.noise_key(name) for name in recipe.coded} | {_WEIGHTS: work.weight_key()}
    for name, number in keys.items():
        if number is not None:
            tensors[f"key.{name}.low"], tensors[f"key.{name}.high"] = noise.halves(number)
    return found


def _flat(recipe: Recipe, tensors: Tensors) -> bool:
    """Whether shape means nothing: an element-wise method, and all its tensors in row-major order."""
    method, options, view = recipe.method, recipe.options, recipe.view
    if recipe.coded or recipe.blocks or method.rounds(options) or method.reduced_axes(view, options) != ():
        return False
    return all(t.is_contiguous() and t.numel() == math.prod(view) for t in tensors.values())


def _rows_vary(recipe: Recipe, tensors: Tensors) -> bool:
    """Whether the number of rows need not be part of the kernel."""
    view = recipe.view
    if len(view) < 2 or view[0] < 2 or recipe.method.reduced_axes(view, recipe.options) is None:
        return False
    return all(t.is_contiguous() and t.ndim > 0 and t.shape[0] in (view[0], 1) for t in tensors.values())


class _Program:
    """The functions that are traced: of tensors in the order of ``names``."""

    def __init__(self, recipe: Recipe, constants: _Constants, names: list[str], group: int) -> None:
        self.recipe, self.constants, self.names = recipe, constants, names
        self.group = group

    def agreement(self, *tensors: Tensor) -> tuple[Tensor]:
        """The sums that caution needs."""
        one = _Box(self, dict(zip(self.names, tensors, strict=True)))
        small, _ = one.prepare()
        u = one.direction(small)
        return (agreement(u, one.g),)

    def move(self, *tensors: Tensor) -> tuple[()]:
        """The step."""
        names = [*self.names, _SCALE][: len(tensors)]
        one = _Box(self, dict(zip(names, tensors, strict=True)))
        one.move()
        return ()


class _Box:
    """A whole parameter in a kernel that is being traced."""

    def __init__(self, program: _Program, tensors: Tensors) -> None:
        self.program, self.recipe, self.tensors = program, program.recipe, tensors
        recipe = self.recipe
        self.dtype = compute_dtype(recipe.dtype)
        raw = tensors[_GRADIENT]
        shape = tuple(raw.shape)
        self.cuts = Cuts.whole(shape)
        self.g = raw.to(self.dtype)
        beta1, beta2, eps, weight_decay = program.constants
        self.h = Hyper(tensors[_LR], beta1, beta2, eps, weight_decay)
        scalars = {name.removeprefix("scalar."): t for name, t in tensors.items() if name.startswith("scalar.")}
        self.ctx = Context(self.h, recipe.options, shape, scalars, coded=bool(recipe.coded))
        self.weights = self._weights()
        self._state: Tensors | None = None

    def _weights(self) -> WeightPart:
        tensors, shape = self.tensors, self.cuts.shape
        if _WEIGHTS not in tensors:
            held = tensors["p.codes"], tensors["p.scale"], tensors["p.zero"]
            return Int8Part(held, self.program.group, shape, self.recipe.dtype)
        prefix = f"state.{CORRECTION}"
        extra = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        return self.recipe.form.parts(tensors[_WEIGHTS], extra, self.cuts)[0]

    def _key(self, name: str) -> noise.Key | None:
        low = self.tensors.get(f"key.{name}.low")
        return None if low is None else (low, self.tensors[f"key.{name}.high"])

    def _held(self, name: str) -> Tensor:
        """A logical state tensor, decoded where it is held in fewer bits."""
        recipe, coded = self.recipe, self.recipe.coded.get(name)
        if coded is None:
            return self.tensors[f"state.{name}"]
        spec = recipe.logical[name]
        stored = {suffix: self.tensors[f"state.{held}"] for suffix, held in coded.names.items()}
        decoded = coded.codec.decode(stored, coded.rows.length, signed=coded.signed)
        return decoded.view(self._shape_of(name)).to(spec.dtype)

    def _shape_of(self, name: str) -> Shape:
        spec = self.recipe.logical[name]
        return self.cuts.shape if spec.elementwise else spec.shape

    def _part(self, small: Tensors) -> Part:
        def state() -> Tensors:
            if self._state is None:
                self._state = {name: self._held(name) for name in self.recipe.elementwise}
            return self._state

        return Part(self.g, small, self.cuts.boxes[0], self.weights.load, state)

    def prepare(self) -> tuple[Tensors, Tensors]:
        method = self.recipe.method

        def visit(round_: Round, small: Tensors, shapes: dict[str, Shape]) -> Tensors:
            return method.stats(self._part(small), self.ctx, round_)

        return method.prepare(visit, {name: self._held(name) for name in self.recipe.factors}, self.ctx)

    def direction(self, small: Tensors) -> Tensor:
        return self.recipe.method.direction(self._part(small), self.ctx)

    def move(self) -> None:
        recipe = self.recipe
        small, new = self.prepare()
        part = self._part(small)
        u, changed = recipe.method.update(part, self.ctx)
        p = moved(part.p, part.g, u, self.tensors.get(_SCALE), self.h, recipe)
        for name, value in {**new, **changed}.items():
            coded = recipe.coded.get(name)
            if coded is None:
                self.tensors[f"state.{name}"].copy_(value)
                continue
            targets = {suffix: self.tensors[f"state.{held}"] for suffix, held in coded.names.items()}
            encode(coded, value.reshape(-1, coded.rows.length), self._key(name), 0, targets)
        self.weights.store(p, noise_like(self._key(_WEIGHTS), 0, p))
