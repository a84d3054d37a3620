"""The probe: short real training that measures what compressing each parameter's optimizer state would cost.

1. AdamW for ``num_steps``. From the middle on, every tenth of the run, the second moment of every parameter is read:
   SNR along every axis set, and how far each candidate would move AdamW's update. In the middle and at the end, the
   block structure of the Hessian.
2. Each bundled optimizer for ``optimizer_steps`` from the same weights on the same batches: loss, state, step time.

One model is alive at a time, with a copy of its initial weights on the CPU. What runs out of memory or diverges leaves
statistics "unknown" with the reason; it never ends the scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memadvise.errors import MemadviseError
from memadvise.ledger import FidelityValue, HessianValue, OptimizerRun, Parameter, ParameterProbe, ProbeLedger
from memadvise.names import canonical_name
from memadvise.optim.create import create_optimizer
from memadvise.optim.registry import approximate_second_moment, list_methods, method_info
from memadvise.plan.schema import Plan, Setting
from memadvise.probe.blocks import BlockProbe
from memadvise.probe.fidelity import Approximate, fidelity
from memadvise.probe.snr import SnrTrajectory
from memadvise.probe.training import (
    Moments,
    Snapshot,
    StepTimer,
    TrainingLog,
    collecting_new_garbage,
    drop_gradients,
    is_out_of_memory,
    private_rng,
    seed_all,
    state_bytes,
    train,
)
from memadvise.target import Target

Progress = Callable[[str, int, int], None]
OptimizerFactory = Callable[..., Optimizer]
_NO_GRADIENT = "never received a gradient"


def run_probe(
    target: Target,
    parameters: Sequence[Parameter],
    *,
    settings: Mapping[str, Sequence[Setting]],
    methods: Sequence[Setting] | Mapping[str, Plan | Setting],
    num_steps: int = 60,
    optimizer_steps: int = 20,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
    hessian: bool = True,
    hessian_samples: int = 32,
    hessian_probes: int = 8,
    progress: Progress | None = None,
    approximate: Approximate = approximate_second_moment,
    make_optimizer: OptimizerFactory = create_optimizer,
) -> ProbeLedger:
    """Probe a target; deterministic for a seed (on one machine), and the caller's random state is left as it was.

    Args:
        target: its model and batches are built here.
        parameters: as :func:`memadvise.roles.describe_parameters` gives them; the trainable ones are probed.
        settings: candidates by parameter name, for the fidelity of their update.
        methods: optimizers to try on the whole model, one setting each, or a label and a plan (or setting) each.
        num_steps: of AdamW; 60 with 5 recorded ones rank candidates as well as longer runs do.
        optimizer_steps: of each method.
        lr: AdamW's, after a linear warm-up over the first tenth; other methods scale it by their default factor.
        weight_decay: of all runs.
        betas: of AdamW and its family; other methods keep their default.
        eps: of all runs.
        seed: of weights (unless the target seeds itself), dropout and the Hessian's random signs.
        hessian: whether to measure block structure.
        hessian_samples: different gradients in the screen; fewer if the batches hold fewer samples.
        hessian_probes: sign pairs in the confirmation, on at most six matrices.
        progress: called with (what, done, total).
        approximate: see :func:`memadvise.probe.fidelity.fidelity`.
        make_optimizer: ``(model, plan or setting, *, lr, weight_decay, betas, eps) -> Optimizer``.

    Raises:
        TargetError, TargetRaised: the target cannot be built or trained at all (see :mod:`memadvise.target`).
    """
    report = progress or (lambda what, done, total: None)
    labelled = methods if isinstance(methods, Mapping) else {setting.key: setting for setting in methods}
    hyper = {"weight_decay": weight_decay, "betas": betas, "eps": eps}
    collected = _Collected([p for p in parameters if p.trainable], settings, betas, eps, approximate)
    log = TrainingLog()
    runs: list[OptimizerRun] = []
    with private_rng(seed), collecting_new_garbage():
        try:
            model = target.model()
            batches = target.batches(max(num_steps, optimizer_steps if labelled else 0, 1))
            start = Snapshot(model)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.problem = "out of memory while building the model and its batches"
            runs = [_not_run(label, plan, lr, log.problem) for label, plan in labelled.items()]
            return collected.ledger(lr, log, runs)
        seed_all(seed)
        blocks = None
        if hessian:
            loss = partial(target.loss, model)
            blocks = BlockProbe(
                model,
                loss,
                collected.parameters,
                batches,
                warn=collected.warn,
                report=report,
                seed=seed,
                num_samples=hessian_samples,
                num_probes=hessian_probes,
            )
            collected.hessian = blocks.values
        _probe_adamw(target, model, batches[:num_steps], lr, hyper, log, collected, blocks, report)
        for done, (label, plan) in enumerate(labelled.items()):
            report(f"probing: training with {label}", done, len(labelled))
            drop_gradients(model)  # and, with the garbage collector, what is left of the optimizer before
            seed_all(seed)
            runs.append(_run(target, model, start, label, plan, batches[:optimizer_steps], lr, hyper, make_optimizer))
        if labelled:
            report("probing: training with each optimizer", len(labelled), len(labelled))
    return collected.ledger(lr, log, runs)


# ---------------------------------------------------------------- AdamW and its statistics


class _Collected:
    """What is known of every parameter so far."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        settings: Mapping[str, Sequence[Setting]],
        betas: tuple[float, float],
        eps: float,
        approximate: Approximate,
    ) -> None:
        self.parameters = parameters
        self.settings = settings
        self.betas, self.eps, self.approximate = betas, eps, approximate
        self.snr: dict[str, SnrTrajectory] = {}
        self.fidelity: dict[str, dict[str, list[FidelityValue]]] = {}
        self.hessian: dict[str, tuple[HessianValue, ...]] = {}
        self.unknown: dict[str, str] = {}
        self.warnings: list[str] = []
        self.recorded: list[int] = []

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The live tensor of every probed parameter, by the ledger's name."""
        live = {canonical_name(name): tensor for name, tensor in model.named_parameters()}
        found: dict[str, Tensor] = {}
        for parameter in self.parameters:
            name = next((name for name in (parameter.name, *parameter.aliases) if name in live), None)
            if name is None:
                self.unknown[parameter.name] = "not found in the model that was trained"
            else:
                found[parameter.name] = live[name]
        return found

    def record(self, step: int, tensors: Mapping[str, Tensor], moments: Moments) -> None:
        """SNR and fidelity of every parameter at one step."""
        self.recorded.append(step)
        for name, tensor in tensors.items():
            state = moments.of(tensor)
            if state is None or name in self.unknown:
                continue
            if tensor.is_complex():
                self.unknown[name] = "complex-valued: not measured"
                continue
            try:
                self._record(name, *state)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self.forget(name, "out of memory while measuring its second moment")

    def _record(self, name: str, m: Tensor, v: Tensor, step: int) -> None:
        self.snr.setdefault(name, SnrTrajectory()).add(v)
        candidates = self.settings.get(name, ())
        values = fidelity(m, v, step, self.betas, self.eps, candidates, approximate=self.approximate)
        for value in values:
            if value.candidate == "adamw" and value.abs_d1 != 0:
                self.warn(f"self-check failed: AdamW differs from itself by {value.abs_d1:.3g} on {name}")
            if math.isfinite(value.abs_d1 + value.one_minus_cos):
                self.fidelity.setdefault(name, {}).setdefault(value.candidate, []).append(value)

    def forget(self, name: str, reason: str) -> None:
        self.unknown[name] = reason
        self.snr.pop(name, None)
        self.fidelity.pop(name, None)

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def ledger(self, lr: float, log: TrainingLog, runs: Sequence[OptimizerRun]) -> ProbeLedger:
        """Everything, as a record."""
        if log.problem:
            kept = "the statistics recorded before are kept" if self.recorded else "nothing was recorded before"
            self.warn(f"the AdamW probe ended early: {log.problem}; {kept}")
        if self.recorded and self.parameters and not self.snr and not self.unknown:
            self.warn("no parameter ever received a gradient: does train_step call backward() and optimizer.step()?")
        if log.loss_problem:
            self.warn(f"losses are unknown: {log.loss_problem}")
        missing = f"{log.problem}, before anything was recorded" if log.problem and not self.recorded else _NO_GRADIENT
        return ProbeLedger(
            num_steps=log.num_steps,
            recorded_steps=tuple(self.recorded),
            lr=lr,
            losses=tuple(log.losses),
            parameters=tuple(self._probe(parameter.name, missing) for parameter in self.parameters),
            runs=tuple(runs),
            warnings=tuple(self.warnings),
        )

    def _probe(self, name: str, missing: str) -> ParameterProbe:
        measured = self.snr.get(name)
        return ParameterProbe(
            name=name,
            snr=measured.values() if measured else (),
            fidelity=tuple(
                FidelityValue(
                    candidate,
                    math.fsum(value.abs_d1 for value in values) / len(values),
                    math.fsum(value.one_minus_cos for value in values) / len(values),
                )
                for candidate, values in self.fidelity.get(name, {}).items()
            ),
            hessian=self.hessian.get(name, ()),
            unknown=self.unknown.get(name, None if measured else missing),
        )


def _probe_adamw(
    target: Target,
    model: nn.Module,
    batches: Sequence[Any],
    lr: float,
    hyper: Mapping[str, Any],
    log: TrainingLog,
    collected: _Collected,
    blocks: BlockProbe | None,
    report: Progress,
) -> None:
    """Train, record, measure block structure; every failure ends up in ``log.problem`` or in ``collected``."""
    total = len(batches)
    middle, stride = total // 2, max(1, total // 10)
    recorded = range(middle, total, stride)
    tensors = collected.tensors(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **hyper)
    moments = Moments(optimizer)

    def after_step(step: int) -> None:
        report("probing: AdamW", step + 1, total)
        if step in recorded:
            collected.record(step, tensors, moments)
        if blocks is not None and step == middle and step < total - 1:
            blocks.screen(tensors)

    report("probing: AdamW", 0, total)
    loss_at = {*recorded, total - 1}
    train(target, model, optimizer, batches, lr=lr, log=log, loss_at=loss_at, after_step=after_step)
    drop_gradients(model)
    if log.problem is None:
        _warn_of_divergence(log, lr, collected)
        if blocks is not None:
            blocks.screen(tensors)
            blocks.confirm(tensors)


def _warn_of_divergence(log: TrainingLog, lr: float, collected: _Collected) -> None:
    count = max(1, len(log.losses) // 10)
    if len(log.losses) < 2 * count:
        return
    first, last = (math.fsum(part) / count for part in (log.losses[:count], log.losses[-count:]))
    if last > first + 0.1 * abs(first):
        collected.warn(
            f"the loss rose from {first:.4g} to {last:.4g} at learning rate {lr:g}: "
            "the statistics describe a diverging run; probe with a smaller learning rate"
        )


# ---------------------------------------------------------------- each optimizer


def _run(
    target: Target,
    model: nn.Module,
    start: Snapshot,
    label: str,
    plan: Plan | Setting,
    batches: Sequence[Any],
    lr: float,
    hyper: Mapping[str, Any],
    make_optimizer: OptimizerFactory,
) -> OptimizerRun:
    """Train the model from ``start``; what goes wrong becomes the run's ``problem``."""
    method, options = _name(label, plan)
    lr *= _lr_factor(method)
    log = TrainingLog()
    timer: StepTimer | None = None
    used = 0
    try:
        start.restore(model)
        optimizer = make_optimizer(model, plan, lr=lr, **_hyper(method, hyper))
        timer = StepTimer(optimizer)
        train(target, model, optimizer, batches, lr=lr, log=log, loss_at={len(batches) - 1})
        used = state_bytes(optimizer)
    except MemadviseError as error:
        log.problem = "out of memory" if is_out_of_memory(error) else error.message
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        log.problem = "out of memory while the optimizer was made"
    return OptimizerRun(
        method=method,
        options=options,
        lr=lr,
        num_steps=log.num_steps,
        first_loss=log.losses[0] if log.losses else None,
        last_loss=log.losses[-1] if log.losses else None,
        state_bytes=used,
        step_seconds=timer.median() if timer else None,
        problem=log.problem,
    )


def _not_run(label: str, plan: Plan | Setting, lr: float, problem: str) -> OptimizerRun:
    method, options = _name(label, plan)
    return OptimizerRun(method, options, lr, 0, None, None, 0, None, problem)


def _name(label: str, plan: Plan | Setting) -> tuple[str, dict[str, Any]]:
    return (plan.method, dict(plan.options)) if isinstance(plan, Setting) else (label, {})


def _lr_factor(method: str) -> float:
    return method_info(method).default_lr_factor if method in list_methods() else 1.0


def _hyper(method: str, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """AdamW's hyper-parameters, but a method whose betas mean something else (Lion) keeps its own."""
    if (
        method in list_methods()
        and method_info(method).method.default_betas != method_info("adamw").method.default_betas
    ):
        return {**hyper, "betas": None}
    return dict(hyper)
