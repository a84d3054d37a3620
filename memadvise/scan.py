"""The scan: trace the memory of a step and its what-ifs, then probe what compression would cost."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import memadvise
from memadvise.advise.candidates import probe_settings
from memadvise.advise.profile import Profile, profile_from_scans
from memadvise.advise.sizes import ENGINE_ADAMW
from memadvise.advise.uniform import probe_methods
from memadvise.errors import OptimizerError, PlanError, TargetError, TargetRaised, UsageError
from memadvise.first_look import described, loss_of, micro_batches_change
from memadvise.ledger import MemoryLedger, Parameter, ProbeLedger, Scan
from memadvise.plan.schema import Plan, Setting, Switches
from memadvise.switches import checkpoint_patterns
from memadvise.target import Target, load_target
from memadvise.whatif import WhatIf, trace_setting, trace_what_if

if TYPE_CHECKING:
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
    parameters, variants, asked = described(target, assumed, tensors, asked)
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
                changed = micro_batches_change(load_target(spec, options=target_options))
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
        parameters = describe_parameters(model, lambda: loss_of(target, model, batches[0]))
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
        parameters = describe_parameters(model, lambda: loss_of(smaller, model, batches[0]))
    given = ProbeOptions.stored(scan.probe.options) if scan.probe and scan.probe.options else ProbeOptions()
    options = replace(given, hessian=False, optimizers=(), checkpoint=None)
    ledger = _probe(smaller, parameters, options, progress, None)
    evidence = {"proxy": scan.target, "num_steps": ledger.num_steps, "seed": options.seed, **environment()}
    return profile_from_scans("proxy", [replace(scan, parameters=parameters, probe=ledger)], evidence)


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


def environment() -> dict[str, str]:
    """Versions a number depends on."""
    import torch

    return {
        "memadvise": memadvise.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.system(),
    }
