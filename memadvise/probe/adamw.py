"""The run that is watched: AdamW on the user's batches, as often as the shadows' memory asks for.

The first pass also reads the SNR of every second moment and measures the Hessian's blocks; later ones repeat it, same
start, same batches, same random numbers, for the tensors whose shadows did not fit beside the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from memadvise.ledger import ProbeLedger
from memadvise.probe.blocks import BlockProbe
from memadvise.probe.checkpoint import Checkpoint
from memadvise.probe.checks import AGREEMENT, training_problems
from memadvise.probe.collected import Collected
from memadvise.probe.schedule import Schedule
from memadvise.probe.training import Moments, Snapshot, TrainingLog, drop_gradients, private_rng, seed_all, train
from memadvise.probe.waves import Wave, needs_of, plan_waves
from memadvise.target import Target

Report = Callable[[str, int, int], None]
EXTENSIONS = 2  # of half a length each, where the halves of the window disagree


@dataclass(frozen=True)
class Hyper:
    """AdamW's hyper-parameters, and where the run starts."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    seed: int
    checkpoint: Checkpoint | None = None


class _Run:
    """One pass as it is trained: its optimizer, and the wave that watches it."""

    def __init__(self, probe: AdamWProbe, wave: Wave, log: TrainingLog) -> None:
        self.probe, self.wave, self.log = probe, wave, log
        hyper = probe.hyper
        trained = [p for p in probe.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=hyper.lr, betas=hyper.betas, eps=hyper.eps, weight_decay=hyper.weight_decay
        )
        self.moments = Moments(self.optimizer)
        if hyper.checkpoint is not None:
            hyper.checkpoint.load_moments(self.optimizer, self.moments, probe.tensors)
            wave.start(probe.tensors, self.moments)
        self.optimizer.register_step_post_hook(self._watch)

    def _watch(self, *_: Any) -> None:
        schedule, step = self.probe.schedule, self.log.num_steps
        begin, end = schedule.window(step)
        self.wave.after_step(
            self.probe.tensors, self.moments, step, record=step in schedule.recorded, begin=begin, end=end
        )

    def go(self, batches: Sequence[Any], start: int, after_step: Callable[[int], None]) -> None:
        schedule, hyper = self.probe.schedule, self.probe.hyper
        train(
            self.probe.target,
            self.probe.model,
            self.optimizer,
            batches,
            lr=hyper.lr,
            log=self.log,
            start=start,
            warmup=0 if hyper.checkpoint else schedule.warmup,
            loss_at={*schedule.recorded, start + len(batches) - 1},
            after_step=after_step,
            relieve=self.wave.relieve,
        )


class AdamWProbe:
    """Passes over one model.

    Args:
        target: its ``step`` is trained.
        model: left as the last pass left it; ``start`` restores it.
        start: weights and buffers to start from.
        batches: of the first ``num_steps``.
        hyper: of AdamW.
        collected: takes what is measured.
        log: of the first pass.
        report: called with (what, done, total); may raise :class:`memadvise.probe.training.Stopped`.
        extensions: how often the run may be made longer by half, where the halves of the window disagree.
    """

    def __init__(
        self,
        target: Target,
        model: nn.Module,
        start: Snapshot,
        batches: Sequence[Any],
        hyper: Hyper,
        collected: Collected,
        log: TrainingLog,
        report: Report,
        extensions: int = EXTENSIONS,
    ) -> None:
        self.target, self.model, self.start, self.batches = target, model, start, list(batches)
        self.hyper, self.collected, self.log, self.report = hyper, collected, log, report
        self.extensions = extensions
        self.schedule = Schedule(len(self.batches))
        self.tensors: Mapping[str, Tensor] = collected.tensors(model)
        self.passes = 0
        self.shadow_bytes = 0

    def adopt(self, prior: ProbeLedger) -> None:
        """Go on after the passes that an interrupted probe finished."""
        if not prior.passes:
            return
        self.passes, self.shadow_bytes = prior.passes, prior.shadow_bytes
        if (longer := prior.num_steps - self.schedule.num_steps) > 0:
            self._extended(longer)
        self.log.num_steps, self.log.losses = prior.num_steps, list(prior.losses)
        self.collected.recorded = list(prior.recorded_steps)
        self.collected.warnings, self.collected.notes = list(prior.warnings), list(prior.notes)

    def run(self, limit: int, blocks: BlockProbe | None) -> None:
        """All passes that the shadows need with at most ``limit`` bytes at once; the first also measures ``blocks``.

        Raises:
            UsageError: the limit is too small for one tensor.
        """
        by_name = {p.name: p for p in self.collected.parameters}
        missing = [by_name[name] for name in self.tensors if not self.collected.is_known(name, self.schedule)]
        needs = needs_of(missing, self.collected.settings)
        queue = plan_waves(needs, limit)
        total = self.passes + max(1, len(queue))
        while queue or not self.passes:
            names = queue.pop(0) if queue else []
            wave = Wave(
                [by_name[name] for name in names],
                self.collected.settings,
                self.hyper.betas,
                self.hyper.eps,
                self.hyper.seed,
            )
            try:
                if self.passes:
                    problem = self._again(wave, f"pass {self.passes + 1} of {total}")
                else:
                    problem = self._first(wave, blocks)
            finally:
                self._finish(wave, [needs[name].transient_bytes for name in names])
            self.passes += 1
            if problem is not None:
                break
            if wave.dropped:
                limit = max(limit // 2, max(needs[n].held_bytes + needs[n].transient_bytes for n in wave.dropped))
                again = plan_waves({name: needs[name] for name in wave.dropped}, limit)
                queue, total = queue + again, total + len(again)
                self.collected.warn(
                    f"memory ran out with the shadows of {len(names)} tensors in flight: {len(wave.dropped)} of them "
                    f"were put off to {len(again)} more pass{'es' if len(again) > 1 else ''}"
                )

    def _finish(self, wave: Wave, transient: Sequence[int]) -> None:
        wave.shed()
        self.collected.take(wave)
        if wave.most_bytes:
            self.shadow_bytes = max(self.shadow_bytes, wave.most_bytes + max(transient))
        if cold := sorted({key for found in wave.results.values() for key in found.cold()}):
            self.collected.note(
                f"the checkpoint's moments say nothing of the state of {', '.join(cold)}: it started empty, as it "
                "would where training changes to it there"
            )

    def _first(self, wave: Wave, blocks: BlockProbe | None) -> str | None:
        seed_all(self.hyper.seed)
        self._watch(wave, blocks)
        drop_gradients(self.model)  # and the moments
        if self.log.problem is None:
            fresh = self.hyper.checkpoint is None
            warmup = self.schedule.warmup if fresh else 0
            for problem in training_problems(self.log.losses, warmup, self.hyper.lr, from_start=fresh):
                self.collected.warn(problem)
            if blocks is not None:
                wave.shed()
                blocks.screen(self.tensors)
                blocks.confirm(self.tensors)
        return self.log.problem

    def _watch(self, wave: Wave, blocks: BlockProbe | None) -> None:
        """Train, record, and go on as long as the halves of the window disagree."""
        run = _Run(self, wave, self.log)

        def after_step(step: int) -> None:
            self.report("probing: AdamW", step + 1, self.schedule.total)
            if step in self.schedule.recorded:
                self.collected.record(step, self.tensors, run.moments)
            if blocks is not None and step == self.schedule.num_steps // 2 < self.schedule.num_steps - 1:
                blocks.screen(self.tensors)

        self.report("probing: AdamW", 0, self.schedule.total)
        run.go(self.batches, 0, after_step)
        for left in range(self.extensions, -1, -1):
            self.collected.take(wave)
            agreement = self.collected.agreement()
            if self.log.problem is not None or agreement is None or agreement >= AGREEMENT:
                return
            if left:
                start = len(self.batches)
                self.collected.note(
                    f"the halves of the window ranked the candidates differently (Spearman {agreement:.2f}): the probe "
                    f"went on after step {start} for half its length"
                )
                run.go(self._extended(max(1, self.schedule.num_steps // 2)), start, after_step)
        self.collected.warn(
            f"the two halves of the window rank the candidates differently (Spearman {agreement:.2f}, wanted "
            f"{AGREEMENT}): the ranking is not settled, probe for longer with --probe-steps"
        )

    def _extended(self, count: int) -> list[Any]:
        """Batches for a run that goes on for ``count`` steps; its window moves to the second half of all of it."""
        start = len(self.batches)
        with private_rng(self.hyper.seed):  # the run shall go on as if nobody had looked
            more = self.target.batches(start + count)[start:]
        self.batches += more
        self.schedule = replace(self.schedule, extra=self.schedule.extra + count)
        self.collected.first_step = self.schedule.first_counted
        return more

    def _again(self, wave: Wave, which: str) -> str | None:
        """A later pass, for shadows alone; says if it was not the same run."""
        log = TrainingLog()
        self.start.restore(self.model)
        seed_all(self.hyper.seed)
        self.report(f"probing: AdamW, {which}", 0, len(self.batches))

        def after_step(step: int) -> None:
            self.report(f"probing: AdamW, {which}", step + 1, len(self.batches))

        _Run(self, wave, log).go(self.batches, 0, after_step)
        drop_gradients(self.model)
        pairs = zip(self.log.losses, log.losses, strict=False)
        if any(not math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-6) for a, b in pairs):
            self.collected.warn(
                f"{which} of the probe was not the run of the first: does the target keep anything in a global, or "
                "draw random numbers of its own? Scores of different tensors may not compare; with a larger "
                "--probe-memory fewer passes are needed"
            )
        return log.problem
