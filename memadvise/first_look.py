"""What a scan has to know of a target before it traces: parameters with roles, switches worth tracing, the loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from memadvise.batches import split_batch
from memadvise.errors import MemadviseError, TargetError
from memadvise.ledger import Parameter
from memadvise.plan.schema import Switches
from memadvise.target import Target
from memadvise.whatif import WhatIf, settled, switch_variants

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memadvise.memory.architecture import DeviceModel


def described(
    target: Target, device: DeviceModel, tensors: str, asked: WhatIf | None
) -> tuple[tuple[Parameter, ...], list[Switches], WhatIf | None]:
    """The parameters with their roles, the switches worth tracing, and the what-if that was asked for, settled.

    For "auto" on real tensors where fake ones cannot go on, and by the modules' types alone where there is no memory
    for those.
    """
    from memadvise.memory.real import DoesNotFit, fault_of_fakes, real_session, worth_running
    from memadvise.memory.session import Session, fake_session
    from memadvise.roles import describe_parameters

    def of(session: Session, *, run: bool) -> tuple[tuple[Parameter, ...], list[Switches], WhatIf | None]:
        model, batches = session
        parameters = describe_parameters(model, (lambda: loss_of(target, model, batches[0])) if run else None)
        settled_what_if = settled(asked, target, model, batches[0]) if asked is not None else None
        return parameters, switch_variants(target, model, batches[0]), settled_what_if

    if tensors == "real":
        with real_session(target, device) as session:
            return of(session, run=True)
    try:
        with fake_session(target, device) as session:
            return of(session, run=True)
    except TargetError as error:
        if tensors == "fake":
            raise
        problem = error
    try:
        with fake_session(target, device) as session:
            static = of(session, run=False)
    except MemadviseError:  # not even built
        static = None
    least = 2 * sum(p.num_bytes for p in static[0]) if static is not None else None  # as much again to run on them
    if not worth_running(problem, least):
        if static is None or fault_of_fakes(problem) is None:
            raise problem
        return static
    try:
        with real_session(target, device) as session:
            return of(session, run=True)
    except (DoesNotFit, MemoryError):
        if static is None:
            raise problem from None
        return static


class _FirstBackward(BaseException):
    """Leaves a step of the user's where its first backward pass would begin; no ``except Exception`` stops it."""

    def __init__(self, roots: Any) -> None:
        self.roots = roots


def loss_of(target: Target, model: nn.Module, batch: Any) -> torch.Tensor:
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


def micro_batches_change(target: Target) -> str | None:
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
