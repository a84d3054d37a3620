"""The scan: trace the memory of a step and its what-ifs, then probe what compression would cost."""

from __future__ import annotations

import inspect
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import memadvise
from memadvise.advise.candidates import candidate_settings, probe_settings, static_prior
from memadvise.advise.profile import Profile, profile_from_scans
from memadvise.advise.rules import DENSE, TOKEN_ROLES
from memadvise.advise.sizes import ENGINE_ADAMW
from memadvise.batches import split_batch
from memadvise.errors import MemadviseError, OptimizerError, PlanError, TargetError, TargetRaised, UsageError
from memadvise.ledger import MemoryLedger, Parameter, ProbeLedger, Scan
from memadvise.names import glob_escape
from memadvise.optim.registry import fitted, list_methods, method_info, problems_of
from memadvise.plan.schema import Plan, Rule, Setting, Switches
from memadvise.switches import checkpoint_patterns
from memadvise.target import Target, load_target
from memadvise.whatif import WhatIf, settled, switch_variants, trace_setting, trace_what_if

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memadvise.memory.architecture import DeviceModel
    from memadvise.memory.sharding import Sharding

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ProbeOptions:
    """How to probe: AdamW steps, steps of each optimizer, AdamW's hyper-parameters, seed, Hessian or not.

    ``lr``: None is 1e-3, or the checkpoint's. ``optimizers``: names of the methods that are tried beside AdamW; None:
    all but the slow ones. ``shadow_bytes``: the most that shadows may hold; None is memadvise.probe.waves.SHADOW_BYTES.
    """

    num_steps: int = 60
    optimizer_steps: int = 20
    lr: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    hessian: bool = True
    optimizers: tuple[str, ...] | None = None
    snr_rule: Literal["cutoff", "official"] = "cutoff"
    checkpoint: str | None = None
    shadow_bytes: int | None = None

    @classmethod
    def stored(cls, values: Mapping[str, Any]) -> ProbeOptions:
        """Options as a scan file holds them."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**known)


def run_scan(
    spec: str,
    *,
    target_options: dict[str, Any] | None = None,
    device: str | DeviceModel = "cuda",
    probe: ProbeOptions | None = None,
    measured: bool = False,
    compiled: bool = False,
    asked: WhatIf | None = None,
    extrapolate_depth: bool = False,
    tensors: str = "auto",
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Scan:
    """Scan a target.

    Args:
        spec: ``file.py``, ``file.py:name``, ``package.module:name`` or ``hf:DIR_OR_CONFIG_JSON``.
        target_options: batch_size and seq_len of the batches, dtype of an ``hf:`` target.
        device: whose memory to predict, ``"cuda"``, ``"cpu"`` or a model of one; no such device is needed.
        probe: None traces only and allocates no weights.
        measured: run the step for real, too, on the device at hand.
        compiled: bound the same step under ``torch.compile``, too.
        asked: one more what-if to trace; the pattern "auto" among those to checkpoint stands for the repeated blocks.
        extrapolate_depth: trace a few of the model's repeated blocks where that can be shown to be exact.
        tensors: "fake", "real" or "auto": what the step is traced on (see :func:`memadvise.memory.estimate.estimate`).
        progress: called with (what, done, total).
        stop: asked between the steps of the probe; True ends it with what was measured (:func:`resume_scan` goes on).

    Raises:
        TargetError, TargetRaised: see :mod:`memadvise.target`.
        EnvironmentProblem: ``measured`` without such a device, or with one on which the step does not fit.
    """
    from memadvise.memory.architecture import device_model
    from memadvise.memory.compiled import estimate_compiled
    from memadvise.memory.estimate import estimate
    from memadvise.memory.measure import measure
    from memadvise.memory.meter import open_meter
    from memadvise.roles import fingerprint

    report = progress or (lambda what, done, total: None)
    assumed = device_model(device)
    meter = open_meter(assumed.device) if measured else None  # first of all: there may be no such device
    target_options = dict(target_options or {})
    target = load_target(spec, options=target_options)
    report("describing the parameters", 0, 1)
    parameters, variants, asked = _described(target, assumed, tensors, asked)
    total = len(variants) + 1
    report("tracing one step: AdamW as it stands", 0, total)
    ledgers = [estimate(target, device=assumed, extrapolate_depth=extrapolate_depth, tensors=tensors)]
    answer: MemoryLedger | None = None
    if asked is not None:
        report("tracing one step: as asked", 0, total)
        answer = trace_what_if(target, asked, device=assumed)
    changed: str | None = None  # why micro-batches are no option
    unreleased: str | None = None  # and why gradient release is none
    for done, switches in enumerate(variants, start=1):
        if (changed and switches.micro_batches > 1) or (unreleased and switches.gradient_release):
            continue
        what = switches.describe() or "memadvise's AdamW"
        report(f"tracing one step: {what}", done, total)
        try:
            ledger = trace_setting(
                target,
                Setting("adamw"),
                device=assumed,
                switches=switches,
                label=ENGINE_ADAMW,
                extrapolate_depth=extrapolate_depth,
                tensors=tensors,
            )
        except (TargetError, OptimizerError) as error:
            if switches.gradient_release:
                unreleased = f"gradient release is not offered: {error.message}"
            elif switches.micro_batches > 1:
                changed = f"micro-batches are not offered: a part of a batch does not run ({error.message})"
            else:
                raise
        else:
            ledgers.append(ledger)
    bound: MemoryLedger | None = None
    if compiled:
        report("tracing one step: torch.compile", 0, 1)
        bound = estimate_compiled(load_target(spec, options=target_options), device=assumed, eager=ledgers[0])
    ran: MemoryLedger | None = None
    if meter is not None:
        report("measuring real steps", 0, 1)
        ran = measure(load_target(spec, options=target_options), device=assumed.device, meter=meter)
    probed = None
    if probe is not None:
        try:
            # Loaded anew each time: its globals may hold what a trace left in them, or count the calls.
            if any(ledger.micro_batches > 1 for ledger in ledgers):
                changed = _micro_batches_change(load_target(spec, options=target_options))
            target = load_target(spec, options=target_options)
            probed = _probe(target, parameters, probe, progress, stop)
        except TargetRaised as error:
            error.hint = error.hint or "the trace went through: with --no-probe the scan stops there"
            raise
    if changed:
        ledgers = [ledger for ledger in ledgers if ledger.micro_batches == 1]
    notes = tuple(note for note in (changed, unreleased) if note)
    ledgers[0] = replace(ledgers[0], warnings=(*ledgers[0].warnings, *notes))
    return Scan(
        target=spec,
        target_sha256=target.sha256(),
        target_options=target_options,
        environment=environment(),
        fingerprint=fingerprint(parameters),
        parameters=parameters,
        memory=tuple(ledgers),
        probe=probed,
        measured=ran,
        compiled=bound,
        asked=answer,
    )


def resume_scan(scan: Scan, *, progress: Progress | None = None, stop: Callable[[], bool] | None = None) -> Scan:
    """Complete a scan whose probe was interrupted, with the options it had; a complete one is returned as it is.

    Raises:
        UsageError: it has no probe, or its target has changed.
        TargetError, TargetRaised: as :func:`run_scan`.
    """
    if scan.probe is None:
        raise UsageError("this scan has no probe to resume", hint=f"scan again: memadvise scan {scan.target}")
    if scan.probe.complete:
        return scan
    target = load_target(scan.target, options=scan.target_options)
    if target.sha256() != scan.target_sha256:
        raise UsageError(
            f"{scan.target} has changed since its scan was interrupted: the rest would be of another program",
            hint=f"scan again: memadvise scan {scan.target}",
        )
    options = ProbeOptions.stored(scan.probe.options)
    return replace(scan, probe=_probe(target, scan.parameters, options, progress, stop, prior=scan.probe))


def run_sharded_scan(
    spec: str,
    sharding: Sharding,
    *,
    target_options: dict[str, Any] | None = None,
    device: str | DeviceModel = "cuda",
    progress: Progress | None = None,
) -> Scan:
    """Trace one rank of a run of the target that is spread over several, as it is and with checkpointed blocks.

    The batch is what the rank sees. Arguments and errors as of :func:`run_scan`; EnvironmentProblem where
    torch.distributed cannot be used.
    """
    from memadvise.memory.estimate import estimate
    from memadvise.memory.session import fake_session
    from memadvise.roles import describe_parameters, fingerprint

    report = progress or (lambda what, done, total: None)
    target_options = dict(target_options or {})
    target = load_target(spec, options=target_options)
    with fake_session(target, device) as (model, batches):
        parameters = describe_parameters(model, lambda: _loss(target, model, batches[0]))
        patterns = checkpoint_patterns(model)
    variants = [Switches(), *([Switches(checkpoint=patterns)] if patterns else [])]
    ledgers = []
    for done, switches in enumerate(variants):
        report(f"tracing one rank: {switches.describe() or 'AdamW as it stands'}", done, len(variants))
        ledgers.append(estimate(target, device=device, switches=switches, sharding=sharding))
    return Scan(
        target=spec,
        target_sha256=target.sha256(),
        target_options=target_options,
        environment=environment(),
        fingerprint=fingerprint(parameters),
        parameters=parameters,
        memory=tuple(ledgers),
    )


def _described(
    target: Target, device: DeviceModel, tensors: str, asked: WhatIf | None
) -> tuple[tuple[Parameter, ...], list[Switches], WhatIf | None]:
    """The parameters with their roles, the switches worth tracing, and the what-if that was asked for, settled.

    For "auto" on real tensors where fake ones cannot go on, and by the modules' types alone where there is no memory
    for those.
    """
    from memadvise.memory.real import DoesNotFit, fault_of_fakes, real_session, worth_running
    from memadvise.memory.session import Session, fake_session
    from memadvise.roles import describe_parameters

    def described(session: Session, *, run: bool) -> tuple[tuple[Parameter, ...], list[Switches], WhatIf | None]:
        model, batches = session
        parameters = describe_parameters(model, (lambda: _loss(target, model, batches[0])) if run else None)
        settled_what_if = settled(asked, target, model, batches[0]) if asked is not None else None
        return parameters, switch_variants(target, model, batches[0]), settled_what_if

    if tensors == "real":
        with real_session(target, device) as session:
            return described(session, run=True)
    try:
        with fake_session(target, device) as session:
            return described(session, run=True)
    except TargetError as error:
        if tensors == "fake":
            raise
        problem = error
    try:
        with fake_session(target, device) as session:
            static = described(session, run=False)
    except MemadviseError:  # not even built
        static = None
    least = 2 * sum(p.num_bytes for p in static[0]) if static is not None else None  # as much again to run on them
    if not worth_running(problem, least):
        if static is None or fault_of_fakes(problem) is None:
            raise problem
        return static
    try:
        with real_session(target, device) as session:
            return described(session, run=True)
    except (DoesNotFit, MemoryError):
        if static is None:
            raise problem from None
        return static


def _probe(
    target: Target,
    parameters: tuple[Parameter, ...],
    probe: ProbeOptions,
    progress: Progress | None,
    stop: Callable[[], bool] | None,
    prior: ProbeLedger | None = None,
) -> ProbeLedger:
    from memadvise.probe.runner import run_probe
    from memadvise.probe.waves import SHADOW_BYTES

    ledger = run_probe(
        target,
        parameters,
        settings={p.name: probe_settings(p) for p in parameters if p.trainable},
        methods=probe_methods(parameters, probe.optimizers),
        num_steps=probe.num_steps,
        # Who asks for fewer steps wants the answer sooner: no optimizer takes more of them than AdamW.
        optimizer_steps=min(probe.optimizer_steps, probe.num_steps),
        lr=probe.lr,
        weight_decay=probe.weight_decay,
        betas=probe.betas,
        seed=probe.seed,
        hessian=probe.hessian,
        snr_rule=probe.snr_rule,
        shadow_limit_bytes=SHADOW_BYTES if probe.shadow_bytes is None else probe.shadow_bytes,
        checkpoint=probe.checkpoint,
        prior=prior,
        progress=progress,
        stop=stop,
    )
    return replace(ledger, options=asdict(probe))


def proxy_profile(scan: Scan, progress: Progress | None = None) -> Profile:
    """Scores of the target's own smaller configuration, ``build_model(scale="proxy")``, by role and relative depth.

    The proxy is probed with the hyper-parameters of the scan's probe, where it had one, on the target's batches.

    Raises:
        TargetError: ``build_model`` takes no ``scale``; TargetRaised: it raised.
    """
    from memadvise.memory.session import fake_session
    from memadvise.roles import describe_parameters

    target = load_target(scan.target, options=scan.target_options)
    build: Any = target.build_model
    if "scale" not in inspect.signature(build).parameters:
        raise TargetError(
            f"build_model() of {scan.target} takes no scale, so it has no proxy",
            hint="write build_model(scale='full'), which builds a narrower or shallower model for scale='proxy'",
        )
    smaller = replace(target, build_model=partial(build, scale="proxy"))
    with fake_session(smaller, "cpu") as (model, batches):
        parameters = describe_parameters(model, lambda: _loss(smaller, model, batches[0]))
    given = ProbeOptions.stored(scan.probe.options) if scan.probe and scan.probe.options else ProbeOptions()
    options = replace(given, hessian=False, optimizers=(), checkpoint=None)
    ledger = _probe(smaller, parameters, options, progress, None)
    evidence = {"proxy": scan.target, "num_steps": ledger.num_steps, "seed": options.seed, **environment()}
    return profile_from_scans("proxy", [replace(scan, parameters=parameters, probe=ledger)], evidence)


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


def plan_tracer(scan: Scan) -> tuple[Callable[[Plan], MemoryLedger], tuple[str, ...]]:
    """A function that traces the scanned target with a plan, and warnings (the target changed since the scan).

    Raises:
        UsageError: the scan is of a sharded run.
        TargetError: the target of the scan is not there any more; so does the function, if it has other parameters.
    """
    from memadvise.memory.architecture import from_assumed

    if scan.memory[0].sharding:
        raise UsageError(
            f"the scan is of one rank of {scan.memory[0].sharding}, and plans are made for one GPU",
            hint=f"scan the target without --shard: memadvise scan {scan.target}",
        )
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
    if scan.memory[0].source == "lower bound":
        warnings.append(
            f"the memory of {scan.target} is known from below only: a plan that seems to fit may still be too large"
        )
    device = from_assumed(scan.memory[0].device, scan.memory[0].assumed)

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
            return heads[0] if heads else DENSE
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


def environment() -> dict[str, str]:
    """Versions a number depends on."""
    import torch

    return {
        "memadvise": memadvise.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.system(),
    }
