"""What torch's CUDA caching allocator really did, from ``torch.cuda.memory._snapshot()``, beside the simulation of it.

A recording is JSON: the sizes that were asked for, their births and ends in order, and the reserved bytes wherever they
changed. It is made on a GPU (``benchmarks/record_allocator.py``), small enough to be kept, and checked anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memadvise.errors import FileFormatError
from memadvise.ledger import from_dict
from memadvise.memory.allocator import CachingAllocator, Replay
from memadvise.memory.allocator_config import parse_allocator_config

FORMAT = 1
_RESERVES = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


@dataclass(frozen=True)
class Recording:
    """Allocations of one process on one device and stream, from its first one on.

    Attributes:
        workload, device, torch, settings: what ran, on which GPU, with which torch and ``PYTORCH_CUDA_ALLOC_CONF``.
        sizes: bytes asked for, by number.
        events: ``i`` for the allocation of number i, ``~i`` for the end of it.
        reserved: (number of events done, reserved bytes from then on), wherever they changed.
        peak_allocated_bytes: ``torch.cuda.max_memory_allocated()``.
    """

    workload: str
    device: str
    torch: str
    settings: str
    sizes: tuple[int, ...]
    events: tuple[int, ...]
    reserved: tuple[tuple[int, int], ...]
    peak_allocated_bytes: int
    notes: tuple[str, ...] = field(default=())
    format: int = FORMAT


@dataclass(frozen=True)
class Agreement:
    """The simulated allocator against the recorded one, after every event.

    ``first_difference``: the event after which the reserved bytes first differ, None if they never do.
    """

    num_events: int
    recorded_peak_bytes: int
    simulated_peak_bytes: int
    recorded_peak_allocated_bytes: int
    simulated_peak_allocated_bytes: int
    largest_difference_bytes: int
    first_difference: int | None


def read_snapshot(
    snapshot: Mapping[str, Any], *, workload: str, device: str, torch: str, settings: str, peak_allocated_bytes: int
) -> Recording:
    """A recording from ``torch.cuda.memory._snapshot()``, of a history that began before the first allocation.

    Raises:
        FileFormatError: the history is not whole (it began later, or its buffer overflowed), or uses several streams.
    """
    traces = [trace for trace in snapshot["device_traces"] if trace]
    if len(traces) != 1:
        raise FileFormatError(f"the snapshot has events of {len(traces)} devices, not of one")
    sizes: list[int] = []
    events: list[int] = []
    reserved: list[tuple[int, int]] = []
    numbers: dict[int, int] = {}
    level = 0
    streams = {entry["stream"] for entry in traces[0] if entry["action"] in ("alloc", "free_completed")}
    if len(streams) > 1:
        raise FileFormatError(f"the snapshot uses {len(streams)} streams; the simulation knows one")
    for entry in traces[0]:
        action, address, size = entry["action"], entry["addr"], entry["size"]
        if action == "alloc":
            numbers[address] = len(sizes)
            events.append(len(sizes))
            sizes.append(size)
        elif action == "free_completed":
            if address not in numbers:
                raise FileFormatError(
                    f"the snapshot frees {size} bytes that it never allocated: its history is not whole",
                    hint="call _record_memory_history before the first tensor is on the GPU, with enough max_entries",
                )
            events.append(~numbers.pop(address))
        elif action in _RESERVES:
            level += _RESERVES[action] * size
            if reserved and reserved[-1][0] == len(events):
                reserved.pop()
            reserved.append((len(events), level))
        elif action == "oom":
            raise FileFormatError("the recorded program ran out of memory; nothing after that can be compared")
    held = sum(segment["total_size"] for segment in snapshot["segments"])
    if held != level:
        raise FileFormatError(f"segments hold {held} bytes, the history adds up to {level}: it is not whole")
    return Recording(
        workload, device, torch, settings, tuple(sizes), tuple(events), tuple(reserved), peak_allocated_bytes
    )


def load_recording(path: Path) -> Recording:
    """Read a recording that was written with ``ledger.to_json``.

    Raises:
        FileFormatError: missing, damaged, or of another format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} is not a recording of the allocator ({error})") from error
    recording = from_dict(Recording, value, str(path))
    if recording.format != FORMAT:
        raise FileFormatError(f"{path} has format {recording.format}; this memadvise reads {FORMAT}")
    return recording


def compare(recording: Recording) -> Agreement:
    """Replay the recorded allocations in the simulation, with the same settings, and compare after every event."""
    sizes = recording.sizes
    events = ((event, sizes[event] if event >= 0 else 0) for event in recording.events)
    changes = dict(recording.reserved)
    # A segment is entered before the allocation that it was reserved for: what holds after `done` events counts then.
    real = peak = peak_allocated = largest = 0
    first: int | None = None
    for level in Replay(CachingAllocator(parse_allocator_config(recording.settings))).run(events):
        real = changes.get(level.event, real)
        difference = abs(level.reserved_bytes - real)
        largest = max(largest, difference)
        if difference and first is None:
            first = level.event
        peak = max(peak, level.reserved_bytes)
        peak_allocated = max(peak_allocated, level.allocated_bytes)
    return Agreement(
        num_events=len(recording.events),
        recorded_peak_bytes=max((level for _, level in recording.reserved), default=0),
        simulated_peak_bytes=peak,
        recorded_peak_allocated_bytes=recording.peak_allocated_bytes,
        simulated_peak_allocated_bytes=peak_allocated,
        largest_difference_bytes=largest,
        first_difference=first,
    )
