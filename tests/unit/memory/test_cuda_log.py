"""A profiler's events made whole by the allocator's history, as both look on CUDA."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from memadvise.memory.allocator_log import MEMORY
from memadvise.memory.cuda_log import with_history


def event(time: int, address: int, size: int, device: str = "cuda") -> Any:
    fields = SimpleNamespace(ptr=address, alloc_size=size, device=SimpleNamespace(type=device))
    return SimpleNamespace(name=MEMORY, start_time_ns=time, extra_fields=fields, parent="operation")


def mark(time: int, name: str) -> Any:
    return SimpleNamespace(name=name, start_time_ns=time, extra_fields=None, parent=None)


def entry(action: str, address: int, size: int) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size}


def seen(nodes: list[Any]) -> list[Any]:
    return [(n.extra_fields.ptr, n.extra_fields.alloc_size) if n.name == MEMORY else n.name for n in nodes]


def test_frees_that_the_profiler_lost_are_there_in_their_place() -> None:
    nodes = [event(1, 10, 1024), mark(2, "backward"), event(3, 20, 512), event(4, 10, 2048), event(5, 20, -512)]
    entries = [
        entry("alloc", 10, 1000),
        entry("free_requested", 10, 1000),
        entry("free_completed", 10, 1000),  # lost
        entry("alloc", 20, 512),
        entry("segment_alloc", 99, 2**21),
        entry("alloc", 10, 2000),
        entry("free_completed", 20, 512),
        entry("free_completed", 10, 2000),  # lost
    ]
    found = with_history(nodes, entries)
    assert seen(found) == [(10, 1024), (10, -1024), "backward", (20, 512), (10, 2048), (20, -512), (10, -2048)]
    assert found[0].parent == "operation"
    assert [node.start_time_ns for node in found] == sorted(node.start_time_ns for node in found)


def test_what_was_there_before_is_freed_as_it_was_asked_for_and_other_devices_stay() -> None:
    nodes = [event(1, 7, 64, "cpu"), event(2, 7, -64, "cpu"), mark(3, "forward")]
    found = with_history(nodes, [entry("free_completed", 30, 700)])
    assert sorted(map(str, seen(found))) == sorted(map(str, [(30, -1024), (7, 64), (7, -64), "forward"]))


def test_an_allocation_that_the_profiler_lost_is_of_nobody() -> None:
    found = with_history([event(1, 10, 512)], [entry("alloc", 10, 512), entry("alloc", 40, 5000)])
    assert seen(found) == [(10, 512), (40, 5120)]
    assert found[1].parent is None


def test_a_phase_begins_where_the_clock_says_so() -> None:
    nodes = [event(1_000, 10, 512), mark(2_000, "step"), mark(9_000, "end")]
    late, early = ({**entry("free_completed", 10, 512), "time_us": time} for time in (3, 1))
    start = entry("alloc", 10, 512)
    assert seen(with_history(nodes, [start, late])) == [(10, 512), "step", (10, -512), "end"]
    assert seen(with_history(nodes, [start, early])) == [(10, 512), (10, -512), "step", "end"]
