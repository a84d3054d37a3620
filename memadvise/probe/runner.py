"""The probe: short real training that measures what compressing each parameter's optimizer state would cost.

1. AdamW for ``num_steps``, watched (:mod:`.adamw`): every candidate of every tensor as a shadow on its gradients, the
   SNR of second moments along every axis set, and, in the middle and at the end, the block structure of the Hessian.
2. Each bundled optimizer for ``optimizer_steps`` from the same weights on the same batches: loss, state, step time.

One model is alive at a time, with a copy of its initial weights on the CPU. What runs out of memory or diverges leaves
statistics "unknown" with the reason; it never ends the scan. Where the user asks to stop, what was measured is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from memadvise.ledger import OptimizerRun, Parameter, ProbeLedger
from memadvise.optim.create import create_optimizer
from memadvise.plan.schema import Plan, Setting
from memadvise.probe.adamw import EXTENSIONS, AdamWProbe, Hyper
from memadvise.probe.blocks import BlockProbe
from memadvise.probe.checkpoint import load_checkpoint
from memadvise.probe.collected import Collected
from memadvise.probe.snr import SnrRule
from memadvise.probe.training import (
    Snapshot,
    Stopped,
    TrainingLog,
    collecting_new_garbage,
    drop_gradients,
    is_out_of_memory,
    private_rng,
    seed_all,
)
from memadvise.probe.trials import OptimizerFactory, not_tried, try_optimizer
from memadvise.probe.waves import SHADOW_BYTES
from memadvise.target import Target
from memadvise.units import format_bytes

Progress = Callable[[str, int, int], None]


def run_probe(
    target: Target,
    parameters: Sequence[Parameter],
    *,
    settings: Mapping[str, Sequence[Setting]],
    methods: Sequence[Setting] | Mapping[str, Plan | Setting],
    num_steps: int = 60,
    optimizer_steps: int = 20,
    lr: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
    hessian: bool = True,
    hessian_samples: int = 32,
    hessian_probes: int = 8,
    snr_rule: SnrRule = "cutoff",
    shadow_limit_bytes: int = SHADOW_BYTES,
    checkpoint: str | Path | None = None,
    prior: ProbeLedger | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    extensions: int = EXTENSIONS,
    make_optimizer: OptimizerFactory = create_optimizer,
) -> ProbeLedger:
    """Probe a target; deterministic for a seed (on one machine), and the caller's random state is left as it was.

    Args:
        target: its model and batches are built here.
        parameters: as :func:`memadvise.roles.describe_parameters` gives them; the trainable ones are probed.
        settings: candidates by parameter name, each to be run as a shadow.
        methods: optimizers to try on the whole model, one setting each, or a label and a plan (or setting) each.
        num_steps: of AdamW; 60 with 5 recorded ones rank candidates as well as longer runs do.
        optimizer_steps: of each method.
        lr: AdamW's, after a linear warm-up over the first tenth; other methods scale it by their default factor.
            None: 1e-3, or the checkpoint's, which also gives weight_decay, betas and eps then.
        weight_decay: of all runs.
        betas: of AdamW, its family and the shadows; other methods keep their default in their own runs.
        eps: of all runs.
        seed: of weights (unless the target seeds itself), dropout, samples and the Hessian's random signs.
        hessian: whether to measure block structure.
        hessian_samples: different gradients in the screen; fewer if the batches hold fewer samples.
        hessian_probes: sign pairs in the confirmation, on at most six matrices.
        snr_rule: how axes to average are derived from SNR (:data:`memadvise.probe.snr.SNR_RULES`).
        shadow_limit_bytes: shadows hold no more at once; the run is repeated for those that do not fit.
        checkpoint: weights and AdamW's moments to start from (:mod:`memadvise.probe.checkpoint`).
        prior: a probe that was interrupted, with the same arguments: what it lacks is measured.
        progress: called with (what, done, total).
        stop: asked between steps; True ends the probe with what is known, ``complete=False``.
        extensions: how often the probe may go on for half its length, where the halves of its window disagree.
        make_optimizer: ``(model, plan or setting, *, lr, weight_decay, betas, eps) -> Optimizer``.

    Raises:
        TargetError, TargetRaised: the target cannot be built or trained at all (see :mod:`memadvise.target`).
        UsageError: the checkpoint cannot be read or is not of this model, or the limit is below one tensor's need.
    """

    def report(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(what, done, total)
        if stop is not None and stop():
            raise Stopped

    labelled = methods if isinstance(methods, Mapping) else {setting.key: setting for setting in methods}
    trainable = [p for p in parameters if p.trainable]
    collected = Collected(trainable, settings, snr_rule, prior)
    loaded = load_checkpoint(checkpoint, {p.name: p.shape for p in trainable}) if checkpoint is not None else None
    if loaded is not None:
        betas, eps, weight_decay = loaded.betas, loaded.eps, loaded.weight_decay
        collected.note(
            f"started from {loaded.path}: betas {betas[0]:g} {betas[1]:g}, eps {eps:g}, weight decay {weight_decay:g}, "
            f"learning rate {loaded.lr:g} there"
        )
    lr = lr if lr is not None else loaded.lr if loaded is not None else 1e-3
    log = TrainingLog()
    runs: list[OptimizerRun] = list(prior.runs) if prior is not None else []
    facts: dict[str, Any] = {
        "shadow_limit_bytes": shadow_limit_bytes,
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }
    with private_rng(seed), collecting_new_garbage():
        try:
            model = target.model()
            if loaded is not None:
                loaded.load_weights(model)
            batches = target.batches(max(num_steps, optimizer_steps if labelled else 0, 1))
            start = Snapshot(model)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.problem = "out of memory while building the model and its batches"
            runs = [not_tried(label, plan, lr, log.problem) for label, plan in labelled.items()]
            return collected.ledger(lr, log, runs, **facts)
        if (different := len({id(batch) for batch in batches})) < len(batches):
            collected.note(f"build_batches() ended after {different}: they were repeated")
        hyper = Hyper(lr, betas, eps, weight_decay, seed, loaded)
        watched = AdamWProbe(target, model, start, batches[:num_steps], hyper, collected, log, report, extensions)
        try:
            if prior is not None:
                watched.adopt(prior)
            blocks = BlockProbe(
                model,
                partial(target.loss, model),
                [p for p in collected.parameters if p.name in watched.tensors],
                batches,
                warn=collected.warn,
                report=report,
                seed=seed,
                num_samples=hessian_samples,
                num_probes=hessian_probes,
            )
            if not watched.passes:
                collected.hessian = blocks.values
            watched.run(shadow_limit_bytes, blocks if hessian else None)
            for done, (label, plan) in enumerate(labelled.items()):
                report(f"probing: training with {label}", done, len(labelled))
                if done < len(runs):
                    continue
                drop_gradients(model)  # and, with the garbage collector, what is left of the optimizer before
                seed_all(seed)
                common = {"weight_decay": weight_decay, "betas": betas, "eps": eps}
                few = batches[:optimizer_steps]
                runs.append(try_optimizer(target, model, start, label, plan, few, lr, common, make_optimizer))
            if labelled:
                report("probing: training with each optimizer", len(labelled), len(labelled))
        except Stopped:
            facts["complete"] = False
    if watched.shadow_bytes:
        collected.note(
            f"shadows held {format_bytes(watched.shadow_bytes)} at most (limit {format_bytes(shadow_limit_bytes)}), in "
            f"{watched.passes} pass{'' if watched.passes == 1 else 'es'} over the run"
        )
    return collected.ledger(lr, log, runs, shadow_bytes=watched.shadow_bytes, passes=watched.passes, **facts)
