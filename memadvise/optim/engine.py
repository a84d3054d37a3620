"""What one optimizer step does: resolve each parameter's setting, create its state, choose an executor, run.

The decision for a parameter is made once, from its name, shape and setting; the executor from its dtype and device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memadvise.errors import OptimizerError
from memadvise.optim.executors import chunked, compiled, eager, fused, gathered
from memadvise.optim.executors.work import Memo, Work
from memadvise.optim.int8_tensor import Int8Weight
from memadvise.optim.method import Hyper, Shape, StateSpec, Tensors, compute_dtype, device_type, read
from memadvise.optim.noise import key_of
from memadvise.optim.recipe import Recipe, make_recipe
from memadvise.optim.registry import parse_setting, validate
from memadvise.optim.weights import FORMS
from memadvise.plan.schema import Setting

EXECUTORS = ("eager", "chunked", "compiled", "fused")


@dataclass(frozen=True)
class Resolved:
    """What was decided for one parameter."""

    name: str
    shape: Shape
    setting: Setting
    recipe: Recipe
    key: int
    memo: Memo = field(default_factory=Memo, compare=False)

    @property
    def specs(self) -> dict[str, StateSpec]:
        """The state as it is stored."""
        return self.recipe.specs


def resolve(name: str, p: Tensor, setting: Setting) -> Resolved:
    """Check that ``setting`` can be executed on ``p``.

    Raises:
        OptimizerError: the setting does not fit, or ``p`` is complex, an integer or not yet initialised.
    """
    if torch.nn.parameter.is_lazy(p):
        raise OptimizerError(f"{name} has no shape yet", hint="run one forward pass before making the optimizer")
    if not p.is_floating_point():
        hint = "split a complex parameter in its real and imaginary parts" if p.is_complex() else None
        raise OptimizerError(f"{name} has dtype {p.dtype}, which no method here can step", hint=hint)
    shape = tuple(p.shape)
    if isinstance(p, Int8Weight):
        setting = _of_int8(name, setting)
    validate(setting, shape, name=name)
    parsed = parse_setting(setting)
    form = FORMS[parsed.compose.weights]
    if problem := form.problem(p):
        raise OptimizerError(f"{name}: {problem}", hint="leave 'weights' out for it")
    recipe = make_recipe(parsed.method, parsed.options, shape, p.dtype, parsed.compose, form.blocks(p))
    return Resolved(name, shape, setting, recipe, key_of(parsed.compose.seed, name))


def _of_int8(name: str, setting: Setting) -> Setting:
    """``setting`` for int8 weights: there is one way to write them, so it need not be said."""
    weights = setting.options.get("weights", "int8")
    if weights != "int8":
        raise OptimizerError(
            f"{name} holds int8 weights, which weights: {weights} cannot write",
            hint="leave 'weights' out for it, or call dequantize_weights(model) first",
        )
    return Setting(setting.method, {**setting.options, "weights": "int8"})


def choose_executor(resolved: Resolved, p: Tensor, forced: str | None) -> str:
    """``fused`` where it is the same arithmetic, ``compiled`` where that pays, else ``chunked``; ``eager`` for tensor
    subclasses such as DTensor.
    """
    if type(p) is not nn.Parameter:  # fake, sharded, quantized: nothing that is stepped a thousand times a minute
        return _choose_executor(resolved, p, forced)
    key, known = (p.dtype, device_type(p), forced, compiled.number_of_failures()), resolved.memo.executors
    if key not in known:
        known[key] = _choose_executor(resolved, p, forced)
    return known[key]


def _choose_executor(resolved: Resolved, p: Tensor, forced: str | None) -> str:
    if forced == "fused" and not fused.supports(resolved.recipe, p):
        raise OptimizerError(
            f"{resolved.name} ({resolved.setting.key}, {_short(p.dtype)}) cannot use the fused executor",
            hint='it runs adamw on float32 and float64 only: leave executor unset, or use executor="chunked"',
        )
    if forced == "compiled" and (_is_subclass(p) or not compiled.usable(resolved.recipe, p)):
        forced = "eager" if _is_subclass(p) else "chunked"
    if forced is not None:
        return forced
    if _is_subclass(p):
        recipe = resolved.recipe
        if not recipe.method.sharded or recipe.coded or recipe.compose.weights != "nearest":
            raise OptimizerError(
                f"{resolved.name} is a {type(p).__name__}, which {resolved.setting.key} cannot step yet",
                hint="use adamw, slimadam, adam_mini, lion or sgd with full moments for sharded parameters",
            )
        return "eager"  # the pure functions follow the subclass's own rules; boxes and raw memory do not
    if fused.supports(resolved.recipe, p):
        return "fused"
    return "compiled" if compiled.wanted(resolved.recipe, p) else "chunked"


def _is_subclass(p: Tensor) -> bool:
    """Whether ``p`` wraps other tensors (a DTensor, a quantized weight) and is none of ours."""
    return bool(is_traceable_wrapper_subclass(p)) and not isinstance(p, Int8Weight)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_executor(executor: str | None) -> None:
    """Raises OptimizerError for a name that is no executor."""
    if executor is not None and executor not in EXECUTORS:
        raise OptimizerError(f"there is no executor '{executor}'", hint=f"executors: {', '.join(EXECUTORS)}")


def new_state(resolved: Resolved, p: Tensor, executor: str) -> Tensors:
    """All state of one parameter, zeros. Made from the parameter by operations, so that subclasses stay themselves."""
    return {name: _zeros(resolved, p, name, spec, executor) for name, spec in resolved.specs.items()}


def step_device(p: Tensor, executor: str) -> torch.device:
    """Where the step counter lives: with the parameter for the fused op, else on the CPU, as in torch.optim."""
    return p.device if executor == "fused" else torch.device("cpu")


def _zeros(resolved: Resolved, p: Tensor, name: str, spec: StateSpec, executor: str) -> Tensor:
    if spec.host:
        return torch.zeros(spec.shape, dtype=spec.dtype, device=step_device(p, executor))
    if spec.elementwise and spec.shape == tuple(p.shape):
        return torch.zeros_like(p, dtype=spec.dtype, requires_grad=False)
    if not _is_subclass(p):
        return torch.zeros(spec.shape, dtype=spec.dtype, device=p.device)
    axes = tuple(a for a, (size, kept) in enumerate(zip(p.shape, spec.shape, strict=True)) if size != kept)
    if any(spec.shape[a] != 1 for a in axes):
        raise OptimizerError(
            f"{resolved.name} is a {type(p).__name__}: {resolved.setting.key} groups its rows, which shards may cut",
            hint="use partition: row for it",
        )
    like = p.detach().to(spec.dtype)
    zeros = torch.zeros_like(like.mean(axes, keepdim=True) if axes else like)
    placements = getattr(zeros, "placements", ())  # of a DTensor; where an axis was averaged away, every rank holds it
    if any(placement.is_partial() for placement in placements):
        from torch.distributed.tensor import Replicate

        whole = [Replicate() if x.is_partial() else x for x in placements]
        zeros = zeros.redistribute(placements=whole)  # type: ignore[attr-defined]
    return zeros


def state_problem(resolved: Resolved, state: dict[str, Any]) -> str | None:
    """Why ``state`` (of a checkpoint) is not the state of this parameter; None if it is."""
    if set(state) != set(resolved.specs):
        have, want = ", ".join(sorted(map(str, state))) or "nothing", ", ".join(sorted(resolved.specs)) or "nothing"
        return f"it holds {have}, {resolved.setting.key} needs {want}"
    for name, spec in resolved.specs.items():
        value = state[name]
        if not isinstance(value, Tensor | int | float):
            return f"its {name} is of type {type(value).__name__}, not a tensor"
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        if shape != spec.shape and not (name == "step" and math.prod(shape) == 1):
            return f"its {name} has shape {list(shape)}, {resolved.setting.key} needs {list(spec.shape)}"
        if isinstance(value, Tensor) and value.dtype != spec.dtype:
            if not (value.is_floating_point() and spec.dtype.is_floating_point):  # codes are no numbers to be rounded
                return f"its {name} is {_short(value.dtype)}, {resolved.setting.key} needs {_short(spec.dtype)}"
        if not spec.dtype.is_floating_point and value.dtype != spec.dtype:  # codes and indices do not survive a cast
            cast, own = (str(dtype).removeprefix("torch.") for dtype in (value.dtype, spec.dtype))
            return f"its {name} was cast to {cast}, {resolved.setting.key} needs {own}"
    return None


def check_gradient(resolved: Resolved, p: Tensor, g: Tensor) -> None:
    """Raises OptimizerError for what cannot be stepped: a changed shape or precision, a sparse or complex gradient.

    NaN and inf are not looked for: finding them would wait for the device. They go into weights and state, as in torch.
    """
    if tuple(p.shape) != resolved.shape:
        raise OptimizerError(
            f"{resolved.name} had shape {list(resolved.shape)} when the optimizer was made and has {list(p.shape)} now",
            hint="make the optimizer after the model has its final shapes (and after sharding or flattening it)",
        )
    made = resolved.recipe.dtype
    if p.dtype != made and (compute_dtype(p.dtype) != compute_dtype(made) or resolved.recipe.form.problem(p)):
        raise OptimizerError(
            f"{resolved.name} was {_short(made)} when the optimizer was made and is {_short(p.dtype)} now",
            hint="make the optimizer after the model has its final dtype",
        )
    if g.layout != torch.strided:
        raise OptimizerError(
            f"{resolved.name} has a sparse gradient ({g.layout})", hint="use sparse=False in the embedding that owns it"
        )
    if g.is_complex():
        raise OptimizerError(f"{resolved.name} has a complex gradient", hint="split it in its real and imaginary parts")


def run(items: Sequence[tuple[Resolved, Tensor, Tensor, Tensors]], h: Hyper, forced: str | None) -> None:
    """Step the parameters of one group: ``items`` are (resolved, p, g, state), with state already made."""
    buckets: dict[str, list[Work]] = {name: [] for name in EXECUTORS}
    copied: list[tuple[Tensor, Tensor]] = []
    for resolved, p, g, state in items:
        g = g if g.dtype == p.dtype else g.to(p.dtype)  # only with torch's newer grad_dtype can they differ
        executor, recipe = choose_executor(resolved, p, forced), resolved.recipe
        seen = p
        if recipe.view != resolved.shape:
            if p.is_contiguous():
                seen = p.view(recipe.view)
            else:  # a convolution in channels_last that is a matrix here
                seen = p.reshape(recipe.view)
                copied.append((p, seen))
            g = g.reshape(recipe.view)
        work = Work(seen, g, state, recipe, key=resolved.key, memo=resolved.memo)
        if executor == "fused" and not fused.aligned(work):
            executor = "chunked"
        buckets[executor].append(work)
    works = [work for bucket in buckets.values() for work in bucket]
    _advance([work for work in works if "step" in work.recipe.specs])
    _set_scalars(buckets["chunked"] + buckets["compiled"] + buckets["eager"], h)
    if len(buckets["chunked"]) > 1:
        buckets["chunked"] = gathered.step(buckets["chunked"], h)
    for name, module in (("fused", fused), ("compiled", compiled), ("chunked", chunked), ("eager", eager)):
        if buckets[name]:
            module.step(buckets[name], h)
    for p, seen in copied:
        p.copy_(seen.view(p.shape))


def _advance(works: list[Work]) -> None:
    steps: dict[torch.device, list[Tensor]] = {}  # of mixed devices every one would be a call of its own
    for work in works:
        step = work.state["step"]
        steps.setdefault(step.device, []).append(step)
    for alike in steps.values():
        torch._foreach_add_(alike, 1)


def _set_scalars(works: list[Work], h: Hyper) -> None:
    """What depends on the step alone; once for all parameters that have made as many steps, by the same method."""
    found: dict[tuple[str, Any, Any], Tensors] = {}
    for work in works:
        if "step" not in work.recipe.specs:
            continue
        step, method, options = work.state["step"], work.recipe.method, work.recipe.options
        if step.device.type == "cpu":
            work.step = int(read(step, 1))
        known: Any = work.step if step.device.type == "cpu" else id(step)  # elsewhere it would have to be waited for
        key = (method.name, options, known)
        if key not in found:
            at = step.to(torch.float64)
            if isinstance(h.lr, Tensor):  # a learning rate on the device stays there
                at = at.to(h.lr.device, non_blocking=True)
            found[key] = method.scalars(at, h, options)
        work.scalars.update(found[key])


def scratch_bytes(resolved: Resolved, p: Tensor, executor: str) -> int:
    """Upper bound of what stepping this parameter allocates for the time of the step."""
    if executor == "fused":
        return 0
    if executor == "eager":
        return eager.scratch_bytes(resolved.recipe)
    if executor == "compiled":
        return compiled.scratch_bytes(resolved.recipe)
    copy = 0 if resolved.recipe.view == resolved.shape or p.is_contiguous() else 2 * p.numel() * p.itemsize
    return copy + chunked.scratch_bytes(resolved.recipe, device_type(p))
