"""The memory of a real training step on CUDA, as the caching allocator counts it."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch

from memadvise.memory.semantics import random_state_kept
from memadvise.memory.session import map_tensors
from memadvise.memory.tensors import default_optimizer, garbage_collection_paused
from memadvise.memory.trace import MakeOptimizer
from memadvise.plan.schema import Switches
from memadvise.switches import apply_checkpoint, train_step
from memadvise.target import Target

NUM_STEPS = 3  # the last one is the steady state
_AS_IT_IS = Switches()


@dataclass(frozen=True)
class CudaPeak:
    """Bytes of one steady step.

    Args:
        allocated_bytes: ``torch.cuda.max_memory_allocated()`` of the step: what the estimate predicts.
        requested_bytes: the same without rounding and without what large blocks have to spare.
        fixed_bytes: still allocated when model, optimizer and batch are gone: workspaces of cuBLAS, one for each
            thread that multiplied matrices.
    """

    allocated_bytes: int
    requested_bytes: int
    fixed_bytes: int


def measure_cuda(
    target: Target,
    *,
    optimizer: MakeOptimizer | None = None,
    switches: Switches = _AS_IT_IS,
    device: str = "cuda",
) -> CudaPeak:
    """Run :data:`NUM_STEPS` real training steps and read the allocator's peak in the last one.

    As in the estimate, the batch of the step is on the device for the whole step, and no other.
    """
    gc.collect()
    if device == "cuda":
        # Of what ran before, workspaces and blocks that are kept: the estimate is of a process of its own.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    with random_state_kept(), garbage_collection_paused():
        allocated, requested = _run(target, optimizer or default_optimizer, switches, device)
    gc.collect()
    torch.cuda.synchronize()
    return CudaPeak(allocated, requested, torch.cuda.memory_allocated())


def _run(target: Target, make_optimizer: MakeOptimizer, switches: Switches, device: str) -> tuple[int, int]:
    waiting = [map_tensors(batch, lambda tensor: tensor.cpu()) for batch in target.batches(NUM_STEPS)]
    model = target.model().to(device)
    if switches.checkpoint:
        apply_checkpoint(model, switches.checkpoint)
    optimizer = make_optimizer(model)
    for waits in waiting:
        batch: Any = map_tensors(waits, lambda tensor: tensor.to(device))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        train_step(target, model, batch, optimizer, micro_batches=switches.micro_batches)
        torch.cuda.synchronize()
        del batch
    return torch.cuda.max_memory_allocated(), torch.cuda.memory_stats()["requested_bytes.all.peak"]
