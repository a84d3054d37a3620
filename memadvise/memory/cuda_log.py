"""The CUDA allocator's events of a step: torch.profiler's, which know who asked, made whole by the allocator's history.

On CUDA the profiler drops some frees (11 to 74 in a step, measured with torch 2.11: the running totals that its events
carry jump). The allocator's own history has every event, in order, but not what ran. Allocations are in both.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from memadvise.memory.allocator_log import MEMORY, AllocatorLog, allocator_log

_MOST_ENTRIES = 2_000_000
_GRANULE = 512
_ALLOCATED, _FREED = "alloc", "free_completed"


@dataclass(frozen=True)
class _Event:
    """What the readers of a log ask of a profiler's memory event. ``extra_fields``: ptr, alloc_size, device."""

    start_time_ns: int
    extra_fields: SimpleNamespace
    name: str = MEMORY
    parent: Any = None


@contextlib.contextmanager
def cuda_allocator_log() -> Iterator[AllocatorLog]:
    """As :func:`.allocator_log`, of the current CUDA device."""
    memory: Any = torch.cuda.memory
    recording = torch._C._cuda_isHistoryEnabled()  # somebody else's: not ours to end
    if not recording:
        memory._record_memory_history(max_entries=_MOST_ENTRIES, context=None)
    try:
        with allocator_log() as log:
            yield log
        traces = [] if recording else memory._snapshot()["device_traces"]
    finally:
        if not recording:
            memory._record_memory_history(enabled=None)
    entries = traces[torch.cuda.current_device()] if traces else []
    if entries and len(entries) < _MOST_ENTRIES:
        log.nodes = with_history(log.nodes, entries)


def with_history(nodes: Sequence[Any], entries: Sequence[dict[str, Any]]) -> list[Any]:
    """``nodes`` with the frees of ``entries``, each between the allocations that it came between.

    Args:
        nodes: of a profiler, in the order of time.
        entries: of the allocator's history over the same time: ``action``, ``addr``, ``size`` and ``time_us`` of each.
    """
    waiting: defaultdict[int, deque[int]] = defaultdict(deque)  # address -> allocations of it that are still to come
    for at, node in enumerate(nodes):
        if _allocated(node):
            waiting[node.extra_fields.ptr].append(at)
    done = 0
    found: list[Any] = []
    sizes: dict[int, int] = {}  # as the profiler counts them: with what a block has to spare
    for entry in entries:
        action, address = entry["action"], entry["addr"]
        size = -(-entry["size"] // _GRANULE) * _GRANULE
        if action == _ALLOCATED:
            if waiting[address]:
                at = waiting[address].popleft()
                sizes[address] = nodes[at].extra_fields.alloc_size
                found += (node for node in nodes[done : at + 1] if not _freed(node))
                done = max(done, at + 1)
            else:
                sizes[address] = size
                found.append(_event(found, address, size))
        elif action == _FREED:
            while done < len(nodes) and not _allocated(nodes[done]) and nodes[done].start_time_ns <= _time(entry):
                if not _freed(nodes[done]):
                    found.append(nodes[done])  # a mark, of where a phase begins
                done += 1
            found.append(_event(found, address, -sizes.pop(address, size)))
    return [*found, *(node for node in nodes[done:] if not _freed(node))]


def _of_cuda(node: Any) -> bool:
    return bool(node.name == MEMORY and node.extra_fields.device.type == "cuda")


def _allocated(node: Any) -> bool:
    return _of_cuda(node) and node.extra_fields.alloc_size > 0


def _time(entry: dict[str, Any]) -> int:
    """Of an entry, in nanoseconds."""
    return 1000 * int(entry.get("time_us", 0))


def _freed(node: Any) -> bool:
    return _of_cuda(node) and node.extra_fields.alloc_size < 0


def _event(before: Sequence[Any], address: int, size: int) -> _Event:
    fields = SimpleNamespace(ptr=address, alloc_size=size, device=SimpleNamespace(type="cuda"))
    return _Event(before[-1].start_time_ns if before else 0, fields)
