"""Training runs that can be compared: the same start and the same batches for a seed, whatever optimizer trains.

Every seed gives new weights (unless the target seeds itself) and another order of the batches. What counts at the end
is the target's ``validation_loss`` where it has one, else the mean training loss of the last fifth of the steps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from memadvise.advise.contest import Run, Trainer
from memadvise.errors import TargetError
from memadvise.plan.schema import Plan
from memadvise.target import Target

Progress = Callable[[str, int, int], None]
MISLEADING_STEPS = 100
_EXECUTOR = "chunked"  # all executors agree, and this one compiles nothing for a few hundred steps


def few_steps(num_steps: int) -> str | None:
    """What to say of runs too short to be believed."""
    if num_steps >= MISLEADING_STEPS:
        return None
    return (
        f"{num_steps} steps are few: gaps before about {MISLEADING_STEPS} steps were misleading where it was tried "
        "(an output head under APOLLO looked better than AdamW for 60 steps and ended clearly worse)"
    )


def end_window(num_steps: int) -> int:
    """How many of the last steps' losses are averaged."""
    return max(2, num_steps // 5)


@dataclass(frozen=True)
class Side:
    """One run: the loss of every step, why it stopped early, and the target's own validation loss after the last."""

    losses: tuple[float, ...]
    problem: str | None = None
    validation: float | None = None

    def end(self, window: int) -> float | None:
        """What counts: the validation loss, or the mean of the last ``window`` steps; None if it did not get there."""
        if self.problem is not None:
            return None
        return self.validation if self.validation is not None else math.fsum(self.losses[-window:]) / window


class PairedRuns:
    """Builds and trains; the weights, and the order of the batches, of a seed are the same in each of its runs.

    Args:
        target: its model is built for every run; one is alive at a time.
        num_steps: of each run; the learning rate rises over the first tenth.
        weight_decay: of every run.
        betas: of every run.
    """

    def __init__(self, target: Target, num_steps: int, weight_decay: float, betas: tuple[float, float]) -> None:
        self._target, self._weight_decay, self._betas = target, weight_decay, betas
        self._batches = target.batches(num_steps)

    def adamw(self, seed: int, lr: float) -> Side:
        """``torch.optim.AdamW``."""
        import torch

        def make(model: Any) -> tuple[Target, Any]:
            trainable = [p for p in model.parameters() if p.requires_grad]
            return self._target, torch.optim.AdamW(trainable, lr=lr, weight_decay=self._weight_decay, betas=self._betas)

        return self._run(seed, lr, make)

    def plan(self, seed: int, lr: float, plan: Plan) -> Side:
        """A plan as it would be executed: rules, learning-rate factors and switches."""
        from memadvise.optim.create import create_optimizer
        from memadvise.switches import apply_checkpoint, train_step

        def make(model: Any) -> tuple[Target, Any]:
            optimizer = create_optimizer(
                model, plan, lr=lr, weight_decay=self._weight_decay, betas=self._betas, executor=_EXECUTOR
            )
            apply_checkpoint(model, plan.switches.checkpoint)
            if plan.switches.micro_batches == 1:
                return self._target, optimizer
            step = partial(train_step, self._target, micro_batches=plan.switches.micro_batches)
            return replace(self._target, train_step=step), optimizer

        return self._run(seed, lr, make)

    def _run(self, seed: int, lr: float, make: Callable[[Any], tuple[Target, Any]]) -> Side:
        from memadvise.probe.training import (
            TrainingLog,
            collecting_new_garbage,
            drop_gradients,
            private_rng,
            seed_all,
            train,
        )

        batches = list(self._batches)
        random.Random(seed).shuffle(batches)
        log, validation = TrainingLog(), None
        with private_rng(seed), collecting_new_garbage():
            model = self._target.model()
            seed_all(seed)  # dropout is the same, whatever building the model drew
            target, optimizer = make(model)
            train(target, model, optimizer, batches, lr=lr, log=log, loss_at=range(len(batches)))
            drop_gradients(model)
            if log.problem is None:
                validation = self._target.held_out_loss(model)
        if log.problem is None and validation is not None and not math.isfinite(validation):
            log.problem = f"the validation loss became {validation}"
        if log.problem is None and validation is None and len(log.losses) < len(batches):
            raise TargetError(
                f"the losses of {self._target.spec} are not known" + (f": {log.loss_problem}" * bool(log.loss_problem)),
                hint="return the loss from train_step(model, batch, optimizer), or add compute_loss(model, batch) or "
                "validation_loss(model)",
            )
        return Side(tuple(log.losses), log.problem, validation)


def contest_trainer(
    target: Target,
    *,
    num_steps: int,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    progress: Progress | None = None,
) -> Trainer:
    """What trains the plans of a contest (:mod:`memadvise.advise.contest`); arguments as of ``verify``."""
    report = progress or (lambda what, done, total: None)
    runs, window = PairedRuns(target, num_steps, weight_decay, betas), end_window(num_steps)

    def train(wanted: Sequence[Run]) -> list[float]:
        ends = []
        for done, run in enumerate(wanted):
            report(f"training {len(wanted)} plans of the contest", done, len(wanted))
            end = runs.plan(run.seed, lr * run.rate, run.plan).end(window)
            ends.append(math.inf if end is None else end)
        report(f"training {len(wanted)} plans of the contest", len(wanted), len(wanted))
        return ends

    return train
