"""The memory of one training step, estimated without a GPU and, wherever that can be, without computing it.

Three ways, in this order: fake tensors; where they cannot go on and the model fits in this machine's memory, real
ones; where it does not, a lower bound. The ledger says which it was.
"""

from __future__ import annotations

from collections.abc import Callable

from memadvise.errors import MemadviseError, TargetRaised, UsageError
from memadvise.ledger import MemoryLedger
from memadvise.memory.architecture import DeviceModel
from memadvise.memory.depth import trace_by_depth
from memadvise.memory.events import Trace
from memadvise.memory.hostvalues import NotOnFakes
from memadvise.memory.real import DoesNotFit, available_bytes, fault_of_fakes, worth_running
from memadvise.memory.repeats import NotRepeated
from memadvise.memory.replay import build_ledger
from memadvise.memory.sharding import Sharding
from memadvise.memory.trace import MakeOptimizer, Prepare, trace_step
from memadvise.plan.schema import Switches
from memadvise.target import Target
from memadvise.units import format_bytes

_AS_IT_IS = Switches()
TENSORS = ("auto", "fake", "real")


def estimate(
    target: Target,
    *,
    device: str | DeviceModel = "cuda",
    optimizer: MakeOptimizer | None = None,
    optimizer_name: str | None = None,
    prepare: Prepare | None = None,
    switches: Switches = _AS_IT_IS,
    sharding: Sharding | None = None,
    tensors: str = "auto",
    extrapolate_depth: bool = False,
) -> MemoryLedger:
    """Where the bytes of one steady training step go.

    Args:
        target: the model, its batches, and optionally its loss and its step.
        device: "cuda" (kernels, libraries, defaults and 512-byte granularity of CUDA), "cpu" (exact bytes), or a
            :class:`DeviceModel` that says which architecture and what else to assume.
        optimizer: ``model -> torch.optim.Optimizer``; default ``torch.optim.AdamW`` as a user gets it on ``device``.
        optimizer_name: what the ledger calls it; default derived from the optimizer.
        prepare: called with the model before anything is recorded, to hold its weights in other forms.
        switches: checkpointing and micro-batches are done here; ``optimizer`` and ``prepare`` do the others.
        sharding: one rank of a run that is spread over several, by torch's own FSDP2 or DDP.
        tensors: "fake" computes nothing and takes no memory for weights; "real" runs the steps on the CPU; "auto" is
            fake and, where fakes cannot go on, real if the model fits here, else a lower bound (``ledger.source``).
        extrapolate_depth: trace 2, 3 and 4 of the model's repeated blocks and derive the rest, if that can be shown to
            be exact (:mod:`memadvise.memory.depth`); else trace all of it and say why. The optimizer has to treat
            equal blocks alike.

    Raises:
        TargetError, TargetRaised: the target's code is at fault.
        UsageError: an unknown device, or switches that do not fit the target.
        DoesNotFit: real tensors were asked for and this machine's memory is too small.
    """
    if tensors not in TENSORS:
        raise UsageError(f"'{tensors}' are no tensors to trace with", hint=f"use {', '.join(TENSORS)}")

    def trace(tensors: str, *, gradients_only: bool = False) -> Trace:
        def traced(target: Target) -> Trace:
            return trace_step(
                target,
                device=device,
                make_optimizer=optimizer,
                prepare=prepare,
                switches=switches,
                tensors=tensors,
                gradients_only=gradients_only,
                sharding=sharding,
            )

        if not extrapolate_depth or gradients_only or tensors != "fake":
            return traced(target)
        try:
            return trace_by_depth(target, traced)
        except NotRepeated as error:
            whole = traced(target)
            whole.warnings.append(f"the depth was not extrapolated, all of it was traced: {error.message}")
            return whole

    if sharding is not None:
        tensors = "fake"  # the process group is a fake one, too
    made, source = _trace_somehow(trace) if tensors == "auto" else (trace(tensors), "estimate")
    return build_ledger(made, source=source, optimizer=optimizer_name or made.optimizer, switches=switches)


def _trace_somehow(trace: Callable[..., Trace]) -> tuple[Trace, str]:
    """A trace on fake tensors, else on real ones, else a lower bound; and which of ``MemoryLedger.source`` that is."""
    try:
        return trace("fake"), "estimate"
    except MemadviseError as error:
        if not isinstance(error, TargetRaised | NotOnFakes):
            raise
        problem: Exception = error
    except (RuntimeError, TypeError, ValueError) as error:  # from an optimizer's step, say
        problem = error
    fault = fault_of_fakes(problem)
    lower = _lower_bound(trace)
    least = _peak(lower) if lower is not None else None
    if worth_running(problem, least):
        try:
            made = trace("real")
        except (DoesNotFit, MemoryError) as error:
            shortage = str(error) or type(error).__name__
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            shortage = "an allocation of the step failed"
        else:
            made.warnings.insert(
                0, f"the step was run on real tensors, as fake ones cannot go on: {fault or _said(problem)}"
            )
            return made, "estimate"
    else:
        shortage = f"its weights, gradients and optimizer state alone take {format_bytes(least or 0)}"
    if fault is None:
        raise problem
    if lower is None:
        raise NotOnFakes(
            f"the model cannot be built without computing: {fault}; and not here: {shortage}",
            hint="build its weights with torch's own functions, or scan it on a machine with more memory",
        ) from problem
    lower.warnings.insert(
        0,
        "a lower bound: weights, gradients and optimizer state are exact, activations are unknown. Fake tensors cannot "
        f"go on: {fault}; and on real ones the step does not fit in the {format_bytes(available_bytes())} of memory "
        f"that are free here: {shortage}",
    )
    return lower, "lower bound"


def _said(problem: Exception) -> str:
    return problem.message if isinstance(problem, MemadviseError) else str(problem)


def _peak(trace: Trace) -> int:
    """The highest level of live bytes in the steady step."""
    level = peak = 0
    for at, event in enumerate(trace.events[: trace.stop]):
        level += trace.size(event) if event >= 0 else -trace.size(~event)
        if at >= trace.start:
            peak = max(peak, level)
    return peak


def _lower_bound(trace: Callable[..., Trace]) -> Trace | None:
    """Gradients and an optimizer's step without a forward pass; None where not even the model can be built."""
    try:
        return trace("fake", gradients_only=True)
    except (MemadviseError, RuntimeError, TypeError, ValueError):
        return None
