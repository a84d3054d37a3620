"""Short training with each optimizer on the whole model, from the same start on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from memadvise.errors import MemadviseError
from memadvise.ledger import OptimizerRun
from memadvise.optim.registry import list_methods, method_info
from memadvise.plan.schema import Plan, Setting
from memadvise.probe.training import Snapshot, StepTimer, TrainingLog, is_out_of_memory, state_bytes, train
from memadvise.target import Target

OptimizerFactory = Callable[..., Optimizer]


def try_optimizer(
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


def not_tried(label: str, plan: Plan | Setting, lr: float, problem: str) -> OptimizerRun:
    """The record of a run that could not begin."""
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
