"""Recordings of the real allocator: read from a snapshot, kept as JSON, compared with the simulation."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memadvise.errors import FileFormatError
from memadvise.ledger import to_json
from memadvise.memory.allocator import CachingAllocator
from memadvise.memory.allocator_config import MIB, parse_allocator_config
from memadvise.memory.recorded import compare, load_recording, read_snapshot

RECORDINGS = sorted((Path(__file__).parents[2] / "data" / "allocator").glob("*.json"))
# Rounded to parts of a power of two, many free blocks are of one size: the device's own addresses, which no recording
# tells, decide between them, and ascending ones are not what it handed out.
ADDRESSES_DECIDE = {"mix_of_sizes.3"}


@pytest.mark.parametrize("path", [p for p in RECORDINGS if p.stem not in ADDRESSES_DECIDE], ids=lambda path: path.stem)
def test_the_simulation_reserves_what_the_gpu_did(path):
    recording = load_recording(path)
    found = compare(recording)
    assert found.first_difference is None, f"{recording.device}, {recording.workload}, {recording.settings}: {found}"
    assert found.simulated_peak_allocated_bytes == found.recorded_peak_allocated_bytes


@pytest.mark.parametrize("path", [p for p in RECORDINGS if p.stem in ADDRESSES_DECIDE], ids=lambda path: path.stem)
def test_where_addresses_decide_some_order_of_them_gives_what_the_gpu_did(path, monkeypatch):
    recording = load_recording(path)
    found = []
    for seed in range(8):
        numbers = random.Random(seed)
        anywhere = property(lambda _, n=numbers: n.randrange(1 << 28) << 24, lambda *_: None)  # segments far apart
        monkeypatch.setattr(CachingAllocator, "_next_address", anywhere, raising=False)
        found.append(compare(recording).first_difference)
    assert None in found, found
    assert set(found) != {None}, "they do not decide: hold the recording to the one order, like the others"


def test_recordings_of_a_gpu_are_there():
    if not RECORDINGS:
        pytest.skip("not measured: no recording of a GPU in tests/data/allocator (benchmarks/record_allocator.py)")
    settings = {load_recording(path).settings for path in RECORDINGS}
    assert "" in settings
    assert "expandable_segments:True" in settings


# ---------------------------------------------------------------- by hand


def _entry(action, address, size, stream=0):
    return {"action": action, "addr": address, "size": size, "stream": stream}


def _snapshot(*entries, held):
    return {"device_traces": [[], list(entries)], "segments": [{"total_size": size} for size in held]}


ABOUT = {"workload": "hand", "device": "none", "torch": "2.13", "settings": "", "peak_allocated_bytes": 12 * MIB + 512}
BY_HAND = _snapshot(
    _entry("segment_alloc", 1000, 2 * MIB),
    _entry("alloc", 1000, 100),
    _entry("segment_alloc", 9000, 12 * MIB),
    _entry("alloc", 9000, 11 * MIB),
    _entry("free_requested", 9000, 11 * MIB),
    _entry("free_completed", 9000, 11 * MIB),
    _entry("alloc", 9000, 11 * MIB + 5),  # the same address again is another allocation
    held=[2 * MIB, 12 * MIB],
)


def test_a_snapshot_becomes_births_ends_and_levels(tmp_path):
    recording = read_snapshot(BY_HAND, **ABOUT)
    assert recording.sizes == (100, 11 * MIB, 11 * MIB + 5)
    assert recording.events == (0, 1, ~1, 2)
    assert recording.reserved == ((0, 2 * MIB), (1, 14 * MIB))
    path = tmp_path / "hand.json"
    path.write_text(to_json(recording))
    assert load_recording(path) == recording


def test_what_the_cpp_rules_give_agrees():
    found = compare(read_snapshot(BY_HAND, **ABOUT))
    assert (found.first_difference, found.largest_difference_bytes) == (None, 0)
    assert found.recorded_peak_bytes == found.simulated_peak_bytes == 14 * MIB
    assert found.simulated_peak_allocated_bytes == ABOUT["peak_allocated_bytes"]


def test_a_difference_is_found_and_measured():
    recording = read_snapshot(BY_HAND, **ABOUT)
    found = compare(replace(recording, reserved=((0, 2 * MIB), (1, 22 * MIB))))
    assert (found.first_difference, found.largest_difference_bytes) == (1, 8 * MIB)
    grown = compare(replace(recording, settings="expandable_segments:True"))
    assert (grown.first_difference, grown.largest_difference_bytes) == (1, 8 * MIB)


@pytest.mark.parametrize(
    ("snapshot", "says"),
    [
        (_snapshot(_entry("free_completed", 5, 7), held=[]), "never allocated"),
        (_snapshot(_entry("alloc", 5, 7), held=[MIB]), "adds up to 0"),
        (_snapshot(_entry("alloc", 5, 7), _entry("alloc", 6, 7, stream=3), held=[]), "2 streams"),
        (_snapshot(_entry("oom", 5, 7), held=[]), "ran out of memory"),
        ({"device_traces": [], "segments": []}, "0 devices"),
    ],
)
def test_a_history_that_is_not_whole_is_refused(snapshot, says):
    with pytest.raises(FileFormatError, match=says):
        read_snapshot(snapshot, **ABOUT)


@pytest.mark.parametrize("content", ["", "[]", '{"workload": "x"}'])
def test_a_damaged_recording_is_refused(tmp_path, content):
    path = tmp_path / "recording.json"
    path.write_text(content)
    with pytest.raises(FileFormatError, match="recording"):
        load_recording(path)


@given(
    st.lists(st.one_of(st.integers(1, 30 * MIB), st.integers(-50, -1)), max_size=60),
    st.sampled_from(["", "expandable_segments:True", "max_split_size_mb:20"]),
)
def test_a_snapshot_of_the_simulation_agrees_with_it(history, settings):
    allocator, live, entries, peak = CachingAllocator(parse_allocator_config(settings)), [], [], 0
    for item in history:
        before = allocator.reserved_bytes
        if item > 0:
            block = allocator.malloc(item)
            if allocator.reserved_bytes != before:
                entries.append(_entry("segment_alloc", block.address, allocator.reserved_bytes - before))
            entries.append(_entry("alloc", block.address, item))
            live.append(block)
        elif live:
            block = live.pop(item % len(live))
            entries.append(_entry("free_completed", block.address, block.size))
            allocator.free(block)
        peak = max(peak, allocator.allocated_bytes)
    if not entries:
        return
    about = {**ABOUT, "settings": settings, "peak_allocated_bytes": peak}
    found = compare(read_snapshot(_snapshot(*entries, held=[allocator.reserved_bytes]), **about))
    assert found.first_difference is None
    assert found.recorded_peak_allocated_bytes == found.simulated_peak_allocated_bytes
