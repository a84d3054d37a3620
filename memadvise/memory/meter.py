"""The counters of the device that a real step runs on: torch's allocator, and NVML for what lies outside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from memadvise.errors import EnvironmentProblem
from memadvise.ledger import Overhead, Reservation
from memadvise.memory.allocator_log import AllocatorLog, allocator_log
from memadvise.memory.cuda_log import cuda_allocator_log
from memadvise.memory.device import DeviceUse, device_use
from memadvise.memory.session import map_tensors, own_copy
from memadvise.units import format_bytes


class Meter:
    """A device without counters of its own: the CPU, whose allocator is read from the profiler's events alone.

    Attributes:
        device: "cpu" or "cuda".
        granularity: bytes that the allocator rounds up to.
        warm_up_steps, measured_steps: how often the step runs before, and while, it is measured.
    """

    device = "cpu"
    granularity = 1
    warm_up_steps = 1
    measured_steps = 1
    name = "torch's CPU allocator"

    def place(self, batch: Any) -> Any:
        """The batch in memory of its own on the device."""
        return own_copy(batch)

    def move(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model on the device."""
        return model

    def history(self) -> contextlib.AbstractContextManager[AllocatorLog | None]:
        """A log of the allocator's events before the measured step; None where the device's counters do without."""
        return allocator_log()

    def logged(self) -> contextlib.AbstractContextManager[AllocatorLog]:
        """A log of the allocator's events in the measured step."""
        return allocator_log()

    def settle(self) -> None:
        """Wait until the device has done everything that was asked of it."""

    def reset(self) -> None:
        """Peaks count from here on."""

    def level(self) -> int | None:
        """Bytes allocated now, None where nobody counts them."""
        return None

    def peak(self) -> int | None:
        """The most bytes allocated since :meth:`reset`."""
        return None

    def reserved(self, peak_allocated: int) -> tuple[Reservation, ...]:
        """What the caching allocator has taken from the device."""
        return ()

    def overhead(self) -> tuple[tuple[Overhead, ...], list[str]]:
        """Lines for memory that lies outside the allocator, and sentences about them."""
        return (), []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A step that does not fit becomes an :class:`EnvironmentProblem`."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            said = str(error).strip().split("\n")[0]
            raise EnvironmentProblem(
                f"the step does not fit on the device that it is measured on: {said}",
                hint="without --measure it is only traced; memadvise recommend --budget device finds a plan that fits",
            ) from error


class CudaMeter(Meter):
    """The current CUDA device.

    Raises:
        EnvironmentProblem: torch sees no CUDA device.
    """

    device = "cuda"
    granularity = 512
    warm_up_steps = 2  # optimizer state, workspaces and caches are there, the allocator has its segments
    measured_steps = 3

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            built = "torch sees no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
            raise EnvironmentProblem(
                f"there is no GPU to measure on: {built}",
                hint="--measure --device cpu measures on this machine's CPU; without --measure no GPU is needed",
            )
        # Before this process takes anything: all that is in use then is in use by others.
        self._used_before = None if torch.cuda.is_initialized() else device_use()
        self.name = f"torch.cuda.max_memory_allocated() on {torch.cuda.get_device_name()}"
        self._most_reserved = 0

    def place(self, batch: Any) -> Any:
        return map_tensors(batch, lambda tensor: tensor.detach().to(self.device, copy=True))

    def move(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.to(self.device)

    def history(self) -> contextlib.AbstractContextManager[AllocatorLog | None]:
        return contextlib.nullcontext()

    def logged(self) -> contextlib.AbstractContextManager[AllocatorLog]:
        return cuda_allocator_log()

    def settle(self) -> None:
        torch.cuda.synchronize()

    def reset(self) -> None:
        self._most_reserved = max(self._most_reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    def level(self) -> int | None:
        return torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated()

    def reserved(self, peak_allocated: int) -> tuple[Reservation, ...]:
        settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or "default"
        most = max(self._most_reserved, torch.cuda.max_memory_reserved())
        segments = int(torch.cuda.memory_stats()["segment.all.current"])
        return (Reservation(settings, most, peak_allocated, segments),)

    def overhead(self) -> tuple[tuple[Overhead, ...], list[str]]:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        return outside_the_allocator(device_use(uuid), self._used_before, torch.cuda.memory_reserved())


def open_meter(device: str) -> Meter:
    """The meter of ``device``, "cpu" or "cuda".

    Raises:
        EnvironmentProblem: there is no such device.
    """
    return CudaMeter() if device == "cuda" else Meter()


def outside_the_allocator(
    now: DeviceUse | None, before: DeviceUse | None, reserved_bytes: int
) -> tuple[tuple[Overhead, ...], list[str]]:
    """This process's context and what other processes hold, from NVML, and a sentence with the whole.

    Args:
        now: the device while the process holds ``reserved_bytes`` in its caching allocator; None without NVML.
        before: the device before this process used it; None when it did already.
        reserved_bytes: what this process's caching allocator has taken from the device.
    """
    if now is None:
        return (), ["NVML does not answer: the CUDA context and other processes were not measured."]
    said = [f"NVML: {format_bytes(now.used_bytes)} of the device's {format_bytes(now.total_bytes)} are in use."]
    if now.own_bytes is not None:
        own, others, source = now.own_bytes, now.used_bytes - now.own_bytes, "NVML, by process"
    elif before is not None:
        # In a container NVML names processes by numbers of the host.
        own, others, source = now.used_bytes - before.used_bytes, before.used_bytes, "NVML, before and after"
    else:
        return (), [*said, "NVML does not say which part of it is this process's: its context was not measured."]
    context = max(0, own - reserved_bytes)
    lines = [Overhead("CUDA context and loaded kernels", context, context, source)]
    if others > 0:
        lines.append(Overhead("other processes and the driver", others, others, source))
    return tuple(lines), said
