"""The scan: trace the memory of a step and its what-ifs, then probe what compression would cost."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import memadvise
from memadvise.advise.candidates import DENSE, TOKEN_ROLES, candidate_settings, static_prior
from memadvise.advise.recommend import ENGINE_ADAMW
from memadvise.errors import MemadviseError, PlanError, TargetError, TargetRaised
from memadvise.ledger import MemoryLedger, Parameter, ProbeLedger, Scan
from memadvise.names import glob_escape
from memadvise.optim.registry import fitted, list_methods, method_info, problems_of
from memadvise.plan.schema import Plan, Rule, Setting, Switches
from memadvise.switches import batch_size, checkpoint_patterns, split_batch
from memadvise.target import Target, load_target

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

Progress = Callable[[str, int, int], None]
_MICRO_BATCHES = (2, 4)


@dataclass(frozen=True)
class ProbeOptions:
    """How to probe: AdamW steps, steps of each optimizer, AdamW's hyper-parameters, seed, Hessian or not.

    ``optimizers``: names of the methods that are tried beside AdamW; None: all but the slow ones.
    """

    num_steps: int = 60
    optimizer_steps: int = 20
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    hessian: bool = True
    optimizers: tuple[str, ...] | None = None


def run_scan(
    spec: str,
    *,
    target_options: dict[str, Any] | None = None,
    device: str = "cuda",
    probe: ProbeOptions | None = None,
    progress: Progress | None = None,
) -> Scan:
    """Scan a target.

    Args:
        spec: ``file.py``, ``file.py:name``, ``package.module:name`` or ``hf:DIR_OR_CONFIG_JSON``.
        target_options: batch_size, seq_len, dtype of an ``hf:`` target.
        device: whose memory to predict, ``"cuda"`` or ``"cpu"``; no such device is needed.
        probe: None traces only and allocates no weights.
        progress: called with (what, done, total).

    Raises:
        TargetError, TargetRaised: see :mod:`memadvise.target`.
    """
    from memadvise.memory.estimate import estimate
    from memadvise.memory.session import fake_session
    from memadvise.roles import describe_parameters, fingerprint

    report = progress or (lambda what, done, total: None)
    target_options = dict(target_options or {})
    target = load_target(spec, options=target_options)
    report("describing the parameters", 0, 1)
    with fake_session(target, device) as (model, batches):
        parameters = describe_parameters(model, lambda: _loss(target, model, batches[0]))
        variants = _switch_variants(target, model, batches[0])
    total = len(variants) + 1
    report("tracing one step: AdamW as it stands", 0, total)
    ledgers = [estimate(target, device=device)]
    changed: str | None = None  # why micro-batches are no option
    for done, switches in enumerate(variants, start=1):
        if changed and switches.micro_batches > 1:
            continue
        report(f"tracing one step: {_describe(switches)}", done, total)
        try:
            ledger = trace_setting(target, Setting("adamw"), device=device, switches=switches, label=ENGINE_ADAMW)
        except TargetError as error:
            if switches.micro_batches == 1:
                raise
            changed = f"micro-batches are not offered: a part of a batch does not run ({error.message})"
        else:
            ledgers.append(ledger)
    probed = None
    if probe is not None:
        try:
            # Loaded anew each time: its globals may hold what a trace left in them, or count the calls.
            if any(ledger.micro_batches > 1 for ledger in ledgers):
                changed = _micro_batches_change(load_target(spec, options=target_options))
            target = load_target(spec, options=target_options)
            probed = _probe(target, parameters, probe, progress)
        except TargetRaised as error:
            error.hint = error.hint or "the trace went through: with --no-probe the scan stops there"
            raise
    if changed:
        ledgers = [ledger for ledger in ledgers if ledger.micro_batches == 1]
        ledgers[0] = replace(ledgers[0], warnings=(*ledgers[0].warnings, changed))
    return Scan(
        target=spec,
        target_sha256=target.sha256(),
        target_options=target_options,
        environment=environment(),
        fingerprint=fingerprint(parameters),
        parameters=parameters,
        memory=tuple(ledgers),
        probe=probed,
    )


def _probe(
    target: Target, parameters: tuple[Parameter, ...], probe: ProbeOptions, progress: Progress | None
) -> ProbeLedger:
    from memadvise.probe.runner import run_probe

    return run_probe(
        target,
        parameters,
        settings={p.name: candidate_settings(p) for p in parameters if p.trainable},
        methods=probe_methods(parameters, probe.optimizers),
        num_steps=probe.num_steps,
        # Who asks for fewer steps wants the answer sooner: no optimizer takes more of them than AdamW.
        optimizer_steps=min(probe.optimizer_steps, probe.num_steps),
        lr=probe.lr,
        weight_decay=probe.weight_decay,
        betas=probe.betas,
        seed=probe.seed,
        hessian=probe.hessian,
        progress=progress,
    )


def _micro_batches_change(target: Target) -> str | None:
    """Why micro-batches would change what is learned: the loss of a batch is not the mean of its halves' losses.

    So it is with contrastive losses, sums, tokens that are not counted, a first dimension that is time or nodes.
    None where they agree, or where nothing can be said (the probe meets the same trouble and tells).
    """
    import torch

    from memadvise.probe.training import fresh

    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        try:
            model = target.model().eval()  # no dropout
            batch = target.batches(1)[0]
            whole = target.loss(model, fresh(batch)).item()
            parts = [target.loss(model, part).item() for part in split_batch(batch, 2)]
        except (MemadviseError, MemoryError, RuntimeError):
            return None
    narrow = any(p.dtype.itemsize < 4 for p in model.parameters())
    mean = sum(parts) / len(parts)
    if not math.isfinite(whole) or math.isclose(mean, whole, rel_tol=2e-2 if narrow else 1e-3, abs_tol=1e-6):
        return None
    return (
        f"micro-batches are not offered: the loss of a batch, {whole:.4g}, is not the mean of its halves' losses, "
        f"{mean:.4g}, so accumulated gradients would differ"
    )


class _FirstBackward(BaseException):
    """Leaves a step of the user's where its first backward pass would begin; no ``except Exception`` stops it."""

    def __init__(self, roots: Any) -> None:
        self.roots = roots


def _loss(target: Target, model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss with its graph. With a ``train_step`` and no ``compute_loss``, what that step first runs backward on."""
    import torch

    if target.train_step is None or target.compute_loss is not None:
        return target.loss(model, batch)

    def stop(tensors: Any, *args: Any, **kwargs: Any) -> None:
        raise _FirstBackward(tensors)

    autograd: Any = torch.autograd
    run_engine, autograd._engine_run_backward = autograd._engine_run_backward, stop
    try:
        target.step(model, batch, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    except _FirstBackward as backward:
        loss: torch.Tensor = backward.roots[0]
        return loss
    finally:
        autograd._engine_run_backward = run_engine
    raise TargetError(
        f"train_step(model, batch, optimizer) of {target.spec} runs no backward pass", hint="call loss.backward() in it"
    )


def trace_setting(
    target: Target, plan: Plan | Setting, *, device: str, switches: Switches | None = None, label: str
) -> MemoryLedger:
    """Trace one step with memadvise's own engine executing ``plan``."""
    from memadvise.memory.estimate import estimate
    from memadvise.optim.create import create_optimizer, hold_weights

    if switches is None:
        switches = plan.switches if isinstance(plan, Plan) else Switches()

    def build_model() -> nn.Module:
        model = target.model()
        hold_weights(model, plan)  # before the trace takes stock of the parameters
        return model

    def build(model: nn.Module) -> Optimizer:
        return create_optimizer(model, plan, lr=1e-3)

    held = replace(target, build_model=build_model)
    return estimate(held, device=device, optimizer=build, optimizer_name=label, switches=switches)


def plan_tracer(scan: Scan) -> tuple[Callable[[Plan], MemoryLedger], tuple[str, ...]]:
    """A function that traces the scanned target with a plan, and warnings (the target changed since the scan).

    Raises:
        TargetError: the target of the scan is not there any more; so does the function, if it has other parameters.
    """
    try:
        target = load_target(scan.target, options=scan.target_options)
    except TargetRaised:
        raise
    except TargetError as error:
        raise TargetError(
            f"the plan is traced on the target of the scan, and {error.message}",
            where=error.where,
            hint="run this in the folder where the scan was made, or scan again",
        ) from error
    warnings = []
    if target.sha256() != scan.target_sha256:
        warnings.append(f"{scan.target} has changed since it was scanned; scan again if the model or its batches did")
    device = scan.memory[0].device

    def trace(plan: Plan) -> MemoryLedger:
        try:
            return trace_setting(target, plan, device=device, label="memadvise plan")
        except PlanError as error:  # the user has not seen this plan: it is the scan that does not fit
            raise TargetError(
                f"{scan.target} is not the model that was scanned: {error.problems[0].message}",
                hint=f"scan it again: memadvise scan {scan.target}",
            ) from error

    return trace, tuple(warnings)


def probe_methods(parameters: tuple[Parameter, ...], names: tuple[str, ...] | None = None) -> dict[str, Plan]:
    """AdamW and the methods called ``names`` once, applied to the whole model as their papers would apply them.

    None: every bundled method but those whose step takes tens of times AdamW's.
    """
    trainable = [p for p in parameters if p.trainable]

    def uniform(choose: Callable[[Parameter], Setting]) -> Plan:
        chosen = [(glob_escape(p.name), choose(p)) for p in trainable]
        return Plan(rules=tuple(Rule(name, setting.method, dict(setting.options)) for name, setting in chosen))

    def adam_mini(parameter: Parameter) -> Setting:
        settings = candidate_settings(parameter)
        heads = [s for s in settings if s.method == "adam_mini"]
        if len(settings) == 1 or heads:
            return heads[0] if heads else settings[0]
        axis = parameter.fan_out[0] if parameter.fan_out and len(parameter.shape) == 2 else 0
        return Setting("adam_mini", {"partition": "row", **({"axis": axis} if axis else {})})

    def defaults(name: str) -> Callable[[Parameter], Setting]:
        def choose(parameter: Parameter) -> Setting:
            setting = fitted(Setting(name), parameter.shape)
            left_out = method_info(name).method.hidden_only and parameter.role in TOKEN_ROLES
            return DENSE if left_out or problems_of(setting, parameter.shape, name="") else setting

        return choose

    special = {"slimadam": static_prior, "adam_mini": adam_mini}
    if names is None:
        names = tuple(name for name in list_methods() if not method_info(name).method.slow)
    chosen = [name for name in list_methods() if name in ("adamw", *names)]
    return {name: uniform(special.get(name) or defaults(name)) for name in chosen}


def _switch_variants(target: Target, model: nn.Module, batch: Any) -> list[Switches]:
    """The combinations of switches this target can run, no switch first."""
    from torch.nn.modules.batchnorm import _BatchNorm

    counts = [1]
    size = batch_size(batch)
    # A batch norm sees other statistics in a smaller batch: that changes the mathematics, so it is not offered.
    if target.train_step is None and size is not None and not any(isinstance(m, _BatchNorm) for m in model.modules()):
        counts += [n for n in _MICRO_BATCHES if size % n == 0 and size >= n]
    patterns = checkpoint_patterns(model)
    return [Switches(n, c) for c in ([(), patterns] if patterns else [()]) for n in counts]


def _describe(switches: Switches) -> str:
    parts = ["checkpointing"] if switches.checkpoint else []
    parts += [f"{switches.micro_batches} micro-batches"] if switches.micro_batches > 1 else []
    return " and ".join(parts) or "memadvise's AdamW"


def environment() -> dict[str, str]:
    """Versions a number depends on."""
    import torch

    return {
        "memadvise": memadvise.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.system(),
    }
