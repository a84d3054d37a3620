"""What a program asks of ``torch.cuda`` while it is traced, answered as the assumed device would, CUDA or not.

Calls that wait, count or clear do nothing and give 0; questions about the device get the assumed architecture's
facts; streams and events are there and do nothing (one stream is what the allocator simulation knows, too). Kernels of
the program's own that look at ``tensor.is_cuda`` see CPU tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from memadvise.memory.architecture import DeviceModel

_TOTAL_BYTES = 80 << 30  # of the device's memory, where a program asks: it has to be some number
_NOTHING = (
    *("synchronize", "empty_cache", "ipc_collect", "init", "set_device", "set_per_process_memory_fraction"),
    *("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached"),
    *("reset_accumulated_memory_stats", "manual_seed", "manual_seed_all", "seed", "seed_all"),
    *("set_rng_state", "set_rng_state_all", "set_stream", "set_sync_debug_mode"),
)
_ZERO = (
    *("current_device", "initial_seed", "utilization", "get_sync_debug_mode"),
    *("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
    *("memory_cached", "max_memory_cached"),
)
_RANDOM_STATE = torch.zeros(16, dtype=torch.uint8)


class _Inert:
    """A stream, an event, or the context of one: every method is there and does nothing."""

    cuda_stream, device_index, event_id = 0, 0, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *exception: object) -> None:
        """Exceptions pass."""

    def query(self) -> bool:
        """Everything has been done."""
        return True

    def is_capturing(self) -> bool:
        """No graph is being captured."""
        return False

    def elapsed_time(self, end: Any) -> float:
        """Nothing takes time."""
        return 0.0

    def record_event(self, event: Any = None) -> _Inert:
        """The event given, or a new one."""
        return event if event is not None else _Inert()

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """As far as memory is concerned."""

    synchronize = record = wait = wait_event = wait_stream = _nothing


def _facts(model: DeviceModel) -> dict[str, Any]:
    """Answers to questions about the device, by the function's name."""
    architecture = model.architecture
    name, (major, minor) = architecture.cards.partition(",")[0], architecture.capability
    properties = SimpleNamespace(
        name=name,
        major=major,
        minor=minor,
        total_memory=_TOTAL_BYTES,
        multi_processor_count=architecture.num_sms,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=architecture.threads_per_sm,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="",
        uuid="",
    )
    return {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": major >= 8,
        "is_tf32_supported": major >= 8,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "get_device_name": name,
        "get_device_capability": (major, minor),
        "get_device_properties": properties,
        "get_arch_list": [architecture.name],
        "mem_get_info": (_TOTAL_BYTES, _TOTAL_BYTES),
        "memory_summary": "",
        "memory_snapshot": [],
        "get_rng_state": _RANDOM_STATE,
        "get_rng_state_all": [_RANDOM_STATE],
    }


def cuda_calls(model: DeviceModel) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, stand-in) for everything of torch that such calls go through."""

    def answers(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    cuda = torch.cuda
    for owner in (cuda, cuda.memory, cuda.random):
        for name in _NOTHING:
            yield owner, name, answers(None)
        for name in _ZERO:
            yield owner, name, answers(0)
        for name, value in _facts(model).items():
            yield owner, name, answers(value)
        for name in ("memory_stats", "memory_stats_as_nested_dict"):
            yield owner, name, lambda *args, **kwargs: defaultdict(int)
    yield torch.Tensor, "record_stream", answers(None)
    for name in ("Stream", "Event", "ExternalStream", "stream", "device", "device_of", "StreamContext"):
        yield cuda, name, _Inert
    for name in ("current_stream", "default_stream"):
        yield cuda, name, answers(_Inert())
    for name in ("range_push", "range_pop", "mark"):
        yield cuda.nvtx, name, answers(0)
    yield cuda.nvtx, "range", _Inert
    accelerator = getattr(torch, "accelerator", None)  # from torch 2.6 on
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device_index", "set_stream"):
        yield accelerator, name, answers(None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        yield accelerator, name, answers(0)
    for name, value in (
        *(("is_available", True), ("device_count", 1), ("current_device_index", 0), ("current_device_idx", 0)),
        *(("current_accelerator", torch.device("cuda")), ("current_stream", _Inert())),
    ):
        yield accelerator, name, answers(value)
