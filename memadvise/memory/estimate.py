"""The memory of one training step, estimated without computing it and without a GPU."""

from __future__ import annotations

from memadvise.ledger import MemoryLedger
from memadvise.memory.replay import build_ledger
from memadvise.memory.trace import MakeOptimizer, trace_step
from memadvise.plan.schema import Switches
from memadvise.target import Target

_AS_IT_IS = Switches()


def estimate(
    target: Target,
    *,
    device: str = "cuda",
    optimizer: MakeOptimizer | None = None,
    optimizer_name: str | None = None,
    switches: Switches = _AS_IT_IS,
) -> MemoryLedger:
    """Where the bytes of one steady training step go; nothing is computed and no weights are allocated.

    Args:
        target: the model, its batches, and optionally its loss and its step.
        device: "cuda" (kernels, defaults and 512-byte granularity of CUDA) or "cpu" (exact bytes).
        optimizer: ``model -> torch.optim.Optimizer``; default ``torch.optim.AdamW`` as a user gets it on ``device``.
        optimizer_name: what the ledger calls it; default derived from the optimizer.
        switches: checkpointing and micro-batches.

    Raises:
        TargetError, TargetRaised: the target's code is at fault.
        UsageError: an unknown device, or switches that do not fit the target.
    """
    trace = trace_step(target, device=device, make_optimizer=optimizer, switches=switches)
    return build_ledger(trace, source="estimate", optimizer=optimizer_name or trace.optimizer, switches=switches)
