"""What a plan means for every parameter: setting, executor, bytes of state and of scratch, with nothing allocated.

The parameters are those of a target, built on fake tensors, or those that the plan's ``model:`` section describes.
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from memadvise.errors import UsageError
from memadvise.names import canonical_name
from memadvise.plan.schema import ModelShape, Plan

if TYPE_CHECKING:
    from torch import Tensor

    from memadvise.optim.optimizer import MemadviseOptimizer
    from memadvise.optim.release import ReleasedOptimizer

_NARROW = ("stochastic", "ecc8", "ecc16")  # forms of weights that float32 cannot have
_PIECE = re.compile(r"\[(.)\]|\*")  # of a pattern: a character that stands for itself, or any number
_WAY_OUT = "give the model: memadvise optimizers --explain PLAN --target model.py"


@dataclass(frozen=True)
class ExplainedParameter:
    """One parameter under a plan; ``scratch_bytes`` is an upper bound of what its step allocates for its time."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    setting: str
    lr_factor: float
    executor: str
    state_bytes: int
    scratch_bytes: int


@dataclass(frozen=True)
class Explanation:
    """A plan, parameter by parameter; ``assumptions`` say where shapes and dtypes are from."""

    device: str
    parameters: tuple[ExplainedParameter, ...]
    assumptions: tuple[str, ...]

    @property
    def state_bytes(self) -> int:
        """The whole state: it stays."""
        return sum(p.state_bytes for p in self.parameters)

    @property
    def largest_scratch_bytes(self) -> int:
        """The most scratch of one parameter: parameters are stepped one after the other."""
        return max((p.scratch_bytes for p in self.parameters), default=0)


def explain(plan: Plan, *, target: str | None = None, device: str = "cuda") -> Explanation:
    """What ``plan`` does to each parameter of ``target``, or of the model it was made for.

    Args:
        plan: read from a file, so that mistakes have places.
        target: as for ``memadvise scan``; None for the shapes in the plan's ``model:`` section.
        device: "cuda" or "cpu", whose executors are chosen; it need not be there.

    Raises:
        PlanError: mistakes of the plan, or a plan for another model. TargetError: as for a scan.
        UsageError: no target, and the plan does not say (or not completely) which model it was made for.
    """
    if target is not None:
        return _of_target(plan, target, device)
    from memadvise.optim.create import bind_plan
    from memadvise.optim.method import assume_device
    from memadvise.optim.optimizer import MemadviseOptimizer

    if plan.model is None or not plan.model.shapes:
        raise UsageError(f"{_named(plan)} has no 'model' section with shapes to explain it on", hint=_WAY_OUT)
    shapes = parameters_of(plan.model, _named(plan))
    settings = bind_plan(replace(plan, model=None), shapes)
    narrow = {name for name, setting in settings.items() if setting.options.get("weights") in _NARROW}
    parameters = {name: _on_meta(shape, name in narrow) for name, shape in shapes.items()}
    for name, setting in settings.items():
        if setting.options.get("weights") == "int8":
            from memadvise.optim.int8_weights import Int8Weight

            parameters[name] = Int8Weight.from_float(parameters[name])
    with assume_device(device):
        optimizer = MemadviseOptimizer(parameters.items(), settings, lr=1e-3)
        rows = _rows(plan, optimizer)
    exception = ", bfloat16 where weights ask for it" if narrow else ""
    said = (
        "shapes are those of the plan's 'model' section, repeated blocks numbered from 0; "
        f"parameters are taken as float32{exception}"
    )
    return Explanation(device, rows, (said,))


def _of_target(plan: Plan, spec: str, device: str) -> Explanation:
    from memadvise.memory.session import fake_session
    from memadvise.optim.create import create_optimizer
    from memadvise.optim.method import assume_device
    from memadvise.target import load_target

    with contextlib.ExitStack() as stack:
        model, _ = stack.enter_context(fake_session(load_target(spec), device, batches=()))
        stack.enter_context(assume_device(device))
        optimizer = create_optimizer(model, plan, lr=1e-3)
        order = {canonical_name(name): number for number, (name, _) in enumerate(model.named_parameters())}
        rows = sorted(_rows(plan, optimizer), key=lambda row: order[row.name])  # not group by group
        return Explanation(device, tuple(rows), (f"parameters are those of {spec}",))


def _rows(plan: Plan, optimizer: MemadviseOptimizer | ReleasedOptimizer) -> tuple[ExplainedParameter, ...]:
    from memadvise.optim.create import deciding_rules

    memory = optimizer.memory()
    rules = deciding_rules(plan, [row.name for row in memory])
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return tuple(
        ExplainedParameter(
            name=row.name,
            shape=row.shape,
            dtype=str(p.dtype).removeprefix("torch."),
            setting=row.setting,
            lr_factor=rules[row.name].lr_factor,
            executor=row.executor,
            state_bytes=row.state_bytes,
            scratch_bytes=row.scratch_bytes,
        )
        for row, p in zip(memory, params, strict=True)
    )


def _on_meta(shape: tuple[int, ...], narrow: bool) -> Tensor:
    import torch

    return torch.empty(shape, dtype=torch.bfloat16 if narrow else torch.float32, device="meta")


def _named(plan: Plan) -> str:
    return plan.path or "the plan"


def parameters_of(model: ModelShape, named: str = "the plan") -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter behind the patterns of ``model``.

    A pattern with a ``*`` stands for repeated blocks; how many there are follows from ``num_parameters`` if all of them
    repeat alike.

    Raises:
        UsageError: it does not follow.
    """
    stars = {name: [m.start() for m in _PIECE.finditer(name) if m[0] == "*"] for name in model.shapes}
    places = {(name[: found[0]], len(found)) for name, found in stars.items() if found}
    rest = model.num_parameters - sum(math.prod(shape) for name, shape in model.shapes.items() if not stars[name])
    block = sum(math.prod(shape) for name, shape in model.shapes.items() if stars[name])
    count, left = divmod(rest, block) if block else (0, rest)
    if len(places) > 1 or any(number > 1 for _, number in places) or left or (block and count < 1):
        raise UsageError(f"{named} does not say how often each of its repeated blocks repeats", hint=_WAY_OUT)
    return {
        _PIECE.sub(lambda piece, number=number: piece[1] or str(number), name): shape  # type: ignore[misc]
        for name, shape in model.shapes.items()
        for number in range(count if stars[name] else 1)
    }
