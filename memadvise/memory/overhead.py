"""What a training process takes from the device beside its tensors: ranges, each with where it comes from."""

from __future__ import annotations

from memadvise.ledger import Overhead
from memadvise.memory.architecture import DeviceModel


def device_overhead(model: DeviceModel) -> tuple[Overhead, ...]:
    """The lines of a CUDA process: its context with the kernels it loads, outside torch's allocator and visible in NVML
    only. Workspaces of cuBLAS come from the allocator and are traced (:mod:`.workspace`).
    """
    low, high = model.context_bytes
    source = "--assume context=" if low == high else f"as users report it for {model.arch}; not measured here"
    return (Overhead("CUDA context and loaded kernels", low, high, source),)
