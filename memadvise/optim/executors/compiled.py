"""A step of a parameter in one compiled kernel: the pure functions, traced, without temporaries of its size.

What is compiled is prepare, update, the move and the write-back of whole parameters, decoding and encoding included
(:mod:`.traced`). The constants of a group (betas, eps, weight decay) and the options are constants of the kernel; what
changes from step to step is a 0-dim tensor, so that a schedule compiles nothing anew. Matrices of one width share a
kernel whatever their number of rows, element-wise methods one for all shapes. On a GPU, parameters that are alike are
stepped a few at a time, in one call.

What cannot be compiled, or fails to, falls back to chunked, with one warning that says why.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memadvise.optim import noise
from memadvise.optim.executors import chunked
from memadvise.optim.executors.gathered import can_gather
from memadvise.optim.executors.kernel import LARGEST_INT32, Kernel
from memadvise.optim.executors.traced import AGREEMENT, GRADIENT, LR, MOVE, SIGNS, WEIGHTS, Pass, Program, block_width
from memadvise.optim.executors.work import Work
from memadvise.optim.method import Hyper, Shape, Tensors, compute_dtype, device_type
from memadvise.optim.methods.sums import ROWS
from memadvise.optim.recipe import Recipe

MOST_CONSTANTS = 4  # different betas, eps and weight decays of one parameter: they are scheduled, not constants
MOST_KERNELS = 32  # of one setting and pass: a model with more shapes than that would compile for minutes
LEAST = {"cpu": 1 << 19, "cuda": 1 << 12}  # elements from which a kernel is made unasked
LEAST_VECTOR = {"cuda": 1 << 8}  # the same of norms and biases that cannot be gathered: chunked takes dozens of calls
# Parameters in one call: there calling takes longer than the step of a small matrix.
AT_ONCE: dict[str, tuple[int, ...]] = {"cuda": (16, 4)}
MOST_OF_SEVERAL = 4  # where a step is several calls: kernels of 16 would compile for three quarters of a minute
_ALIGNMENT = 16  # bytes, which a CUDA kernel reads at once


def supports(recipe: Recipe, kind: str) -> bool:
    """Whether a step of this recipe can be compiled for a device of ``kind``."""
    if kind == "cpu" and not all(coded.codec.arithmetic for coded in recipe.coded.values()):
        return False  # element by element it is slower than the lookups of chunked, and takes a minute to compile
    if recipe.compose.weights not in ("nearest", "stochastic"):
        return False  # of what is written back in parts inductor keeps a copy: the parameter's size once more
    noisy = recipe.coded or recipe.form.noisy
    if noisy and math.prod(recipe.view) > LARGEST_INT32:
        return False  # numbers of elements in 32 bits would repeat the random numbers
    fits = math.prod(recipe.view) > 0 and block_width(recipe) is not None
    return fits and recipe.method.traceable(recipe.view, recipe.options)


def usable(recipe: Recipe, p: Tensor) -> bool:
    """Whether it can be tried here: nothing has failed yet."""
    kind = device_type(p)
    return not _failed(recipe, kind) and supports(recipe, kind)


def wanted(recipe: Recipe, p: Tensor) -> bool:
    """Whether a parameter is large enough for a kernel to be worth its compilation, and none has failed here."""
    kind = device_type(p)
    least = LEAST.get(kind, LARGEST_INT32)
    if len(recipe.view) == 1 and not can_gather(recipe):
        least = LEAST_VECTOR.get(kind, least)
    return p.numel() >= least and usable(recipe, p)


def scratch_bytes(recipe: Recipe) -> int:
    """Upper bound of what a kernel allocates: sums, those of blocks of rows before them, and what is made of them."""
    method, view = recipe.method, recipe.view
    blocks = 3 * math.prod(view) // ROWS if method.visits(view, recipe.options) else 0
    moments = [recipe.coded[name] for name in recipe.elementwise if name in recipe.coded]
    ends = sum(2 * math.prod(view) // c.codec.block for c in moments if c.codec.block)  # least and greatest of a block
    return (blocks + ends) * compute_dtype(recipe.dtype).itemsize + method.scratch_bytes(view, recipe.options)


def step(works: Sequence[Work], h: Hyper) -> None:
    """One step of every parameter, in one kernel each, or a few where sums over all of it come first."""
    lr = h.lr.to(torch.float64) if isinstance(h.lr, Tensor) else torch.tensor(h.lr, dtype=torch.float64, device="cpu")
    rest: list[Work] = []
    for plan, members in _buckets(works, h, lr):
        if plan is None or not _step_some(plan, members, lr):
            rest += members
    if rest:
        chunked.step(rest, h)


# ---------------------------------------------------------------- kernels, and what is known of them

_kernels: dict[Any, list[Kernel]] = {}  # several where what tracing assumed of the rows does not hold for all
_counts: dict[Any, int] = {}
_failures: dict[Any, str] = {}
_making = threading.RLock()


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


def _kernel_for(plan: _Plan, what: Pass, shared: Tensors, own: list[Tensors]) -> Kernel | None:
    """The kernel for these tensors, made now if there is none; None if there cannot be one."""
    recipe, first = plan.program.recipe, own[0]
    layout = tuple(
        (name, (n, *t.shape[1:]) if (n := plan.times(t)) else (tuple(t.shape), t.stride()), t.dtype, t.device)
        for name, t in (shared | first).items()
    )
    large = math.prod(recipe.view) > LARGEST_INT32
    key = (what, plan.program.key, layout, bool(plan.rows), large, len(own))
    with _making:  # compilers change settings of the whole process while they work
        return _found_or_made(plan, what, shared, own, key)


def _found_or_made(plan: _Plan, what: Pass, shared: Tensors, own: list[Tensors], key: Any) -> Kernel | None:
    recipe, first = plan.program.recipe, own[0]
    tensors = [*shared.values(), *(t for mine in own for t in mine.values())]
    for kernel in _kernels.get(key, ()):
        if kernel.holds(plan.rows):
            return kernel
    kind = first[GRADIENT].device.type
    family = _family(recipe, kind)
    if _failed(recipe, kind):
        return None
    if _counts.get((what, plan.program.key), 0) >= MOST_KERNELS:
        _fail(family, kind, f"there are more than {MOST_KERNELS} different shapes")
        return None
    function = plan.program.function(what, list(shared), list(first), len(own))
    try:
        kernel = Kernel(function, tensors, [plan.times(t) for t in tensors])
    except Exception as error:  # whatever a compiler may raise: there is another way, and the reason is told
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        if _no_compiler(error):
            _failures[kind] = reason
        _fail(family, kind, reason)
        return None
    _counts[what, plan.program.key] = _counts.get((what, plan.program.key), 0) + 1
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


# ---------------------------------------------------------------- a few parameters


def _buckets(works: Sequence[Work], h: Hyper, lr: Tensor) -> Iterator[tuple[_Plan | None, list[Work]]]:
    """Parameters that can be stepped by one call, never in other numbers than those of :data:`AT_ONCE` or one: for
    each number there is a kernel of its own.
    """
    alike: dict[Any, tuple[_Plan, list[Work]]] = {}
    for work in works:
        if isinstance(work.p, FakeTensor) or isinstance(work.g, FakeTensor):
            continue  # in a trace: a kernel allocates nothing of its own
        plan = _plan(work, h, lr)
        if plan is None or work.p.device.type not in AT_ONCE:
            yield plan, [work]
        else:
            alike.setdefault((plan.identity, work.moment), (plan, []))[1].append(work)
    for plan, members in alike.values():
        start = 0
        recipe, sizes = plan.program.recipe, AT_ONCE[members[0].p.device.type]
        if recipe.method.visits(recipe.view, recipe.options) > 1 or recipe.compose.cautious:
            sizes = tuple(size for size in sizes if size <= MOST_OF_SEVERAL)
        for size in (*sizes, 1):
            while start + size <= len(members):
                yield plan, members[start : start + size]
                start += size


def _step_some(plan: _Plan, works: list[Work], lr: Tensor) -> bool:
    """Whether the step was made."""
    recipe = plan.program.recipe
    shared: Tensors = {LR: lr, **{f"scalar.{name}": t for name, t in works[0].scalars.items()}}
    own = [plan.gather(work) for work in works]
    _add_keys(works, own)
    visits = recipe.method.visits(recipe.view, recipe.options)
    if visits > 1:  # in one kernel what two visits need would be kept between them: the parameter's size once more
        for number in range(visits):
            sums = plan.run(number, shared, own)
            if sums is None:
                return False
            each = len(sums) // len(works)
            for i, mine in enumerate(own):
                mine.update({f"sums.{number}.{k}": t for k, t in enumerate(sums[i * each : (i + 1) * each])})
    if recipe.compose.cautious:
        signs = plan.run(AGREEMENT, shared, own)
        if signs is None:
            return False
        for mine, counted in zip(own, signs, strict=True):
            mine[SIGNS] = counted
    return plan.run(MOVE, shared, own) is not None


def _add_keys(works: Sequence[Work], own: Sequence[Tensors]) -> None:
    """The keys of random numbers, as tensors: a number would be a constant of a kernel, compiled anew at every step."""
    found: list[tuple[Tensors, str]] = []
    numbers: list[int] = []
    for work, mine in zip(works, own, strict=True):
        for name in (*work.recipe.coded, WEIGHTS):
            key = work.weight_key() if name == WEIGHTS else work.noise_key(name)
            if key is not None:
                found.append((mine, name))
                numbers += noise.halves(key)
    halves = torch.tensor(numbers, dtype=torch.int32, device="cpu").unbind() if numbers else ()
    for (mine, name), low, high in zip(found, halves[::2], halves[1::2], strict=True):
        mine[f"key.{name}.low"], mine[f"key.{name}.high"] = low, high


def _plan(work: Work, h: Hyper, lr: Tensor) -> _Plan | None:
    """How this parameter is stepped, remembered while nothing changes that a kernel depends on. None: it cannot be."""
    p, g, recipe = work.p, work.g, work.recipe
    constants = (h.beta1, h.beta2, h.eps, h.weight_decay)
    memo_key = (*constants, lr.device, g.dtype, p.dtype, p.device)
    kept = work.memo.plans.get(memo_key)
    tensors = kept.tensors(work) if kept is not None else list(_own_tensors(work).values())
    if p.device.type == "cuda" and any(t.data_ptr() % _ALIGNMENT for t in tensors):
        return None
    contiguous = all(t.is_contiguous() for t in tensors)
    if kept is not None and contiguous:
        return kept
    if len(work.memo.plans) >= MOST_CONSTANTS:
        kind = p.device.type
        if not _failed(recipe, kind):
            _fail(_family(recipe, kind), kind, "its betas, eps or weight decay change from step to step")
        return None
    view, named, width = recipe.view, _own_tensors(work), block_width(recipe)
    plan = _Plan(Program(recipe, constants), list(named))
    if width:
        if not contiguous:
            return None
        row = math.prod(view[1:])
        plan.rows, plan.blocks = view[0], row // width
        if not recipe.method.visits(view, recipe.options):  # there are no rows, only blocks
            plan.rows, plan.blocks = plan.rows * plan.blocks, 1
        plan.views = {name: (math.prod(view) // width, -1) for name in named if _cut(recipe, name)}
    elif contiguous and _shapeless(recipe, named):
        plan.rows, plan.views = math.prod(view), dict.fromkeys(named, (-1,))
    elif contiguous and _rows_vary(recipe, named):
        plan.rows = view[0]
    seen = [named[name].view(plan.views[name]) if name in plan.views else t for name, t in named.items()]
    if plan.rows < 2 or all(plan.times(t) != 1 for t in seen):  # a compiler has to find the number somewhere
        plan.rows = 0
    layout = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in named.values())
    plan.identity = (plan.program.key, view, layout, tuple(named))
    if contiguous:
        work.memo.plans[memo_key] = plan
    return plan


def _own_tensors(work: Work) -> Tensors:
    """Weights, gradient and state by name."""
    held = {f"state.{name}": work.state[name] for name, spec in work.recipe.specs.items() if not spec.host}
    return {WEIGHTS: work.p, GRADIENT: work.g, **held}


@dataclass
class _Plan:
    """How one parameter is stepped.

    ``names``: of its own tensors, in order. ``rows``: how many, where their number may vary from call to call, so that
    parameters share kernels; 0: it is a constant. ``blocks``: in a row, where tensors are seen by blocks. ``views``:
    the shapes in which kernels see them. ``identity``: parameters with the same can be stepped by one call.
    """

    program: Program
    names: list[str]
    rows: int = 0
    blocks: int = 1
    views: dict[str, Shape] = field(default_factory=dict)
    identity: Any = None
    kernels: dict[tuple[Pass, int], Kernel] = field(default_factory=dict)

    def tensors(self, work: Work) -> list[Tensor]:
        """The parameter's own, in the order of ``names``."""
        return [work.p, work.g, *(work.state[name[6:]] for name in self.names[2:])]  # without "state."

    def gather(self, work: Work) -> Tensors:
        """What kernels are given of one parameter, but for the keys of its random numbers."""
        tensors = dict(zip(self.names, self.tensors(work), strict=True))
        for name, shape in self.views.items():
            tensors[name] = tensors[name].view(shape)
        return tensors

    def times(self, tensor: Tensor) -> int:
        """How often the tensor's first axis holds the rows: 1, by blocks as often as these; 0: it does not."""
        if not self.rows or not tensor.ndim or not tensor.is_contiguous():
            return 0
        return {self.rows: 1, self.rows * self.blocks: self.blocks}.get(tensor.shape[0], 0)

    def run(self, what: Pass, shared: Tensors, own: list[Tensors]) -> tuple[Tensor, ...] | None:
        """One kernel; None if there is none."""
        kernel = self.kernels.get((what, len(own)))
        if kernel is None:
            kernel = _kernel_for(self, what, shared, own)
            if kernel is None:
                return None
            self.kernels[what, len(own)] = kernel
        return tuple(kernel(*shared.values(), *(t for mine in own for t in mine.values())))


def _cut(recipe: Recipe, name: str) -> bool:
    """Whether a tensor is cut like the parameter."""
    name = name.removeprefix("state.")
    held = {held for n in recipe.elementwise if n in recipe.coded for held in recipe.coded[n].names.values()}
    return name in recipe.elementwise or name in held or name in (WEIGHTS, GRADIENT)


def _shapeless(recipe: Recipe, tensors: Tensors) -> bool:
    """Whether shape means nothing: an element-wise method, all of whose tensors are of one size."""
    method, options, view = recipe.method, recipe.options, recipe.view
    if recipe.coded or method.visits(view, options) or method.reduced_axes(view, options) != ():
        return False
    return all(t.numel() == math.prod(view) for t in tensors.values())


def _rows_vary(recipe: Recipe, tensors: Tensors) -> bool:
    """Whether the number of rows need not be a constant."""
    view = recipe.view
    if not view or recipe.method.groups_rows(view, recipe.options):
        return False
    return all(t.ndim > 0 and t.shape[0] in (view[0], 1) for t in tensors.values())
