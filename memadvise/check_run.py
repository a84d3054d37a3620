"""From a target to what ``memadvise check`` compares: traced without a device, or measured on one."""

from __future__ import annotations

import hashlib
import inspect
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memadvise.baseline import Observation, observe
from memadvise.ledger import ESTIMATOR_VERSION, MemoryLedger
from memadvise.memory.architecture import DeviceModel, device_model
from memadvise.plan.load import load_plan
from memadvise.plan.schema import Plan
from memadvise.target import Target, load_target
from memadvise.whatif import trace_setting

_LIBRARIES = ("transformers", "diffusers", "timm", "torchvision")  # whose models a target may be made of


@dataclass(frozen=True)
class Lane:
    """How numbers are made: ``device`` whose memory it is, ``plan`` a file, ``measure`` on a device, else traced.

    ``options`` are those of ``hf:`` targets.
    """

    device: DeviceModel = field(default_factory=lambda: device_model("cuda"))
    plan: str | None = None
    measure: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def check_target(spec: str, lane: Lane, *, root: Path) -> tuple[Observation, tuple[str, int] | None]:
    """Load and trace (or measure) one target; file and line that stand for it.

    Args:
        spec: as the user named it; ``lane.options`` are for ``hf:`` targets.
        lane: how.
        root: the baseline's folder: files are named relative to it, so that every machine names them alike.

    Raises:
        TargetError, TargetRaised, PlanError, UsageError: what is wrong with the target or the plan.
    """
    target = load_target(spec, options=lane.options)
    plan = load_plan(lane.plan) if lane.plan is not None else None
    ledger = take_ledger(target, plan, lane)
    observation = observe(
        ledger,
        target=_relative_spec(spec, root),
        plan=_relative(lane.plan, root) if lane.plan is not None else None,
        options=lane.options,
        environment=_environment(lane),
        information=_information(target, lane, ledger),
    )
    return observation, _place(target)


def take_ledger(target: Target, plan: Plan | None, lane: Lane) -> MemoryLedger:
    """One ledger of a steady step: seeds are set, so that random lengths and routes are the same in every process.

    Raises:
        TargetError, TargetRaised, PlanError: what is wrong with the target or the plan.
        EnvironmentProblem: ``lane.measure`` without such a device, or with one on which the step does not fit.
    """
    from memadvise.memory.estimate import estimate

    with _seeded():
        if lane.measure:
            return _measured(target, plan, lane.device.device)
        if plan is not None:
            return trace_setting(target, plan, device=lane.device, label="as the plan says")
        return estimate(target, device=lane.device)


def _measured(target: Target, plan: Plan | None, device: str) -> MemoryLedger:
    from memadvise.memory.measure import measure
    from memadvise.optim.create import create_optimizer, hold_weights

    if plan is None:
        return measure(target, device=device)

    chosen = plan.switches
    return measure(
        target,
        device=device,
        prepare=lambda model: hold_weights(model, plan, switches=chosen),
        optimizer=lambda model: create_optimizer(model, plan, lr=1e-3, switches=chosen),
        switches=chosen,
    )


@contextmanager
def _seeded() -> Iterator[None]:
    import torch

    from memadvise.memory.semantics import random_state_kept

    numpy = sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy is not None else None
    with random_state_kept():
        torch.manual_seed(0)
        random.seed(0)
        if numpy is not None:
            numpy.random.seed(0)
        try:
            yield
        finally:
            if numpy is not None:
                numpy.random.set_state(arrays)


def _environment(lane: Lane) -> dict[str, str]:
    """What the bytes depend on beside the target and its plan. The build of torch (+cpu, +cu130) makes no difference
    to a trace, which is why every machine gets the same.
    """
    import torch

    device, version = lane.device.device, str(torch.__version__)
    if not lane.measure:
        assumed = lane.device.to_assumed()
        found = {"device": f"{device} {assumed['arch']}" if "arch" in assumed else device}
        found |= {name: value for name, value in assumed.items() if name not in ("arch", "context")}
        version = version.partition("+")[0]
        if found.get("torch", version) != version:
            found["assumed_torch"] = found["torch"]
        return {**found, "estimator": str(ESTIMATOR_VERSION), "torch": version}
    if device == "cpu":
        return {"device": device, "threads": str(torch.get_num_threads()), "torch": version}
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF", "-")
    name = f"{device} {torch.cuda.get_device_name()}"
    return {"device": name, "allocator": allocator, "cuda": str(torch.version.cuda), "torch": version}


def _information(target: Target, lane: Lane, ledger: MemoryLedger) -> dict[str, str]:
    """What belongs to the target: told when the bytes change, never a reason not to compare them."""
    found = {"target_sha256": target.sha256() or "-"}
    if lane.plan is not None:
        found["plan_sha256"] = hashlib.sha256(Path(lane.plan).read_bytes()).hexdigest()
    if lane.measure and _is_compiled():
        found["compiled"] = "yes"
    if ledger.checkpoint:
        found["checkpoint"] = ", ".join(ledger.checkpoint)
    if ledger.micro_batches > 1:
        found["micro_batches"] = str(ledger.micro_batches)
    for name in _LIBRARIES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            found[name] = str(version)
    return found


def _is_compiled() -> bool:
    """Whether anything was compiled in this process: kernels that are tuned by trying take what memory they like."""
    import torch

    utils = sys.modules.get("torch._dynamo.utils")
    return utils is not None and bool(torch._dynamo.utils.counters["frames"])


def _place(target: Target) -> tuple[str, int] | None:
    """Where ``build_model`` is defined, else the first line of the target's file."""
    if target.path is None:
        return None
    code = getattr(inspect.unwrap(target.build_model), "__code__", None)
    mine = code is not None and Path(code.co_filename) == target.path
    return str(target.path), code.co_firstlineno if code is not None and mine else 1


def _relative_spec(spec: str, root: Path) -> str:
    """``file.py:name`` and ``hf:FILE`` with the file relative to ``root``; a module's name as it is."""
    if spec.startswith("hf:"):
        return f"hf:{_relative(spec.removeprefix('hf:'), root)}"
    location, colon, name = spec.partition(":")
    is_file = location.endswith(".py") or os.sep in location
    return f"{_relative(location, root)}{colon}{name}" if is_file else spec


def _relative(path: str, root: Path) -> str:
    """Relative to ``root`` with forward slashes; as it is on another drive."""
    try:
        return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(root))).as_posix()
    except ValueError:
        return path
