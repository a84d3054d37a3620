"""The simulated caching allocator: invariants of every history, and cases worked out by hand from the C++ rules."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memadvise.errors import UsageError
from memadvise.memory.allocator import EXPANDABLE, CachingAllocator, OutOfMemory, reservation
from memadvise.memory.allocator_config import MIB, AllocatorConfig, parse_allocator_config
from memadvise.memory.events import Storage, Trace

CONFIGS = {
    "default": AllocatorConfig(),
    "expandable": EXPANDABLE,
    "max_split": AllocatorConfig(max_split_bytes=30 * MIB),
    "rounded": AllocatorConfig(roundup_power2_divisions=(4,) * 16),
    "full": AllocatorConfig(capacity_bytes=150 * MIB),
    "expandable, full": AllocatorConfig(expandable_segments=True, capacity_bytes=150 * MIB),
    "collected": AllocatorConfig(capacity_bytes=150 * MIB, garbage_collection_threshold=0.5),
    "max_split, full": AllocatorConfig(max_split_bytes=30 * MIB, capacity_bytes=150 * MIB),
}
# (bytes to allocate) or (index of a live block to free): sizes on both sides of every threshold
SIZES = st.one_of(
    st.integers(1, 4096), st.integers(2**19, 2 * MIB), st.integers(2 * MIB, 12 * MIB), st.integers(12 * MIB, 60 * MIB)
)
HISTORIES = st.lists(st.one_of(st.tuples(st.just("malloc"), SIZES), st.tuples(st.just("free"), st.integers(0, 99))))


def _check(allocator, live):
    """Blocks tile their segments, what is handed out is exactly what was asked for, and the counts agree."""
    segments = allocator.segments()
    blocks = [block for segment in segments for block in segment]
    for segment in segments:
        for block, after in itertools.pairwise(segment):
            assert block.address + block.size == after.address
            assert block.next is after
            assert after.prev is block
            assert block.allocated or after.allocated or block.mapped != after.mapped, "free neighbours are merged"
        assert segment[0].prev is None
        assert segment[-1].next is None
    ends = [(segment[0].address, segment[-1].address + segment[-1].size) for segment in segments]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends)), "segments are apart"
    assert {id(block) for block in blocks if block.allocated} == {id(block) for block, _ in live}
    assert all(block.size >= asked and block.mapped for block, asked in live)
    assert sum(block.size for block in blocks if block.mapped) == allocator.reserved_bytes
    assert sum(block.size for block, _ in live) == allocator.allocated_bytes
    assert allocator.allocated_bytes <= allocator.reserved_bytes <= allocator.peak_reserved_bytes
    if allocator.config.capacity_bytes is not None:
        assert allocator.peak_reserved_bytes <= allocator.config.capacity_bytes
    free = {(b.size, b.address) for b in blocks if b.mapped and not b.allocated}
    assert free == {entry for pool in (allocator._small, allocator._large) for entry in pool.free}


def _run(config, history, *, check=False):
    allocator, live, counts = CachingAllocator(config), [], []
    for what, value in history:
        if what == "malloc":
            try:
                live.append((allocator.malloc(value), value))
            except OutOfMemory:
                counts.append("full")
        elif live:
            allocator.free(live.pop(value % len(live))[0])
        counts.append((allocator.allocated_bytes, allocator.reserved_bytes))
        if check:
            _check(allocator, live)
    return allocator, live, counts


@pytest.mark.parametrize("name", CONFIGS)
@given(history=HISTORIES)
def test_blocks_never_overlap_and_reserved_covers_allocated(name, history):
    allocator, live, _ = _run(CONFIGS[name], history, check=True)
    for block, _ in live:
        allocator.free(block)
    _check(allocator, [])
    assert all(
        not block.is_split or not block.mapped or name.startswith("expandable")
        for segment in allocator.segments()
        for block in segment
    ), "what is all free is in one piece"
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert allocator.segments() == []


@given(history=HISTORIES)
def test_the_same_history_gives_the_same_counts(history):
    for config in CONFIGS.values():
        assert _run(config, history)[2] == _run(config, history)[2]


@given(history=HISTORIES)
def test_growing_segments_waste_at_most_a_page_when_nothing_is_freed(history):
    """Allocations only: one growing segment for each pool, filled without gaps."""
    allocator, _, _ = _run(EXPANDABLE, [item for item in history if item[0] == "malloc"])
    assert len(allocator.segments()) <= 2
    assert allocator.reserved_bytes - allocator.allocated_bytes < 22 * MIB


# ---------------------------------------------------------------- by hand


def _reserved(sizes, config=None):
    allocator = CachingAllocator(config)
    blocks = [allocator.malloc(size) for size in sizes]
    return allocator, blocks


@pytest.mark.parametrize(
    ("size", "reserved", "allocated"),
    [
        (1, 2 * MIB, 512),
        (513, 2 * MIB, 1024),
        (MIB, 2 * MIB, MIB),  # still small
        (MIB + 1, 20 * MIB, MIB + 512),
        (10 * MIB - 512, 20 * MIB, 10 * MIB - 512),
        (10 * MIB, 10 * MIB, 10 * MIB),  # a segment of its own
        (10 * MIB + 512, 12 * MIB, 10 * MIB + 512),  # the rest, more than 1 MiB, is split off
        (11 * MIB, 12 * MIB, 12 * MIB),  # a rest of 1 MiB is not: it counts as allocated
        (19 * MIB, 20 * MIB, 20 * MIB),
    ],
)
def test_sizes_of_first_segments(size, reserved, allocated):
    allocator, _ = _reserved([size])
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (reserved, allocated)


@pytest.mark.parametrize(
    ("size", "reserved"), [(1, 2 * MIB), (MIB + 1, 20 * MIB), (11 * MIB, 20 * MIB), (21 * MIB, 40 * MIB)]
)
def test_growing_segments_take_whole_pages(size, reserved):
    allocator, _ = _reserved([size], EXPANDABLE)
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (reserved, -(-size // 512) * 512)


def test_small_blocks_share_a_segment_and_go_back_to_it():
    allocator, blocks = _reserved([MIB, MIB, 512])
    assert allocator.reserved_bytes == 4 * MIB
    assert blocks[1].address == blocks[0].address + MIB
    for block in blocks:
        allocator.free(block)
    assert [len(segment) for segment in allocator.segments()] == [1, 1]


def test_the_smallest_free_block_that_fits_is_taken():
    allocator, blocks = _reserved([40 * MIB, 512, 30 * MIB, 20 * MIB])
    large, _, middle, _ = blocks
    allocator.free(large)
    allocator.free(middle)
    assert allocator.malloc(25 * MIB).address == middle.address
    assert allocator.malloc(25 * MIB).address == large.address
    assert allocator.reserved_bytes == 92 * MIB


def test_a_gap_too_small_for_the_next_request_stays_reserved():
    """The classic fragmentation: two halves of 20 MiB are free, but no 30 MiB in one piece."""
    allocator, blocks = _reserved([20 * MIB, 20 * MIB])
    for block in blocks:
        allocator.free(block)
    allocator.malloc(30 * MIB)
    assert allocator.reserved_bytes == 70 * MIB
    growing, blocks = _reserved([20 * MIB, 20 * MIB], EXPANDABLE)
    for block in blocks:
        growing.free(block)
    growing.malloc(30 * MIB)
    assert growing.reserved_bytes == 40 * MIB


def test_a_growing_segment_is_extended_from_its_free_end():
    allocator, blocks = _reserved([30 * MIB, 10 * MIB], EXPANDABLE)
    allocator.free(blocks[1])
    block = allocator.malloc(50 * MIB)
    assert block.address == blocks[1].address
    assert allocator.reserved_bytes == 80 * MIB
    assert len(allocator.segments()) == 1


def test_oversize_blocks_are_kept_whole():
    config = AllocatorConfig(max_split_bytes=30 * MIB)
    allocator, blocks = _reserved([40 * MIB], config)
    allocator.free(blocks[0])
    small = allocator.malloc(20 * MIB)  # not out of the 40
    assert allocator.reserved_bytes == 60 * MIB
    again = allocator.malloc(35 * MIB)  # oversize too, and within 20 MiB of it: the whole block
    assert (again.address, again.size) == (blocks[0].address, 40 * MIB)
    allocator.free(again)
    allocator.free(small)
    assert allocator.malloc(61 * MIB).address not in (again.address, small.address)


def test_a_full_device_gives_back_whole_free_segments_before_it_fails():
    config = AllocatorConfig(capacity_bytes=100 * MIB)
    allocator, blocks = _reserved([40 * MIB, 40 * MIB], config)
    allocator.free(blocks[0])
    allocator.malloc(60 * MIB)  # the first segment is given back for it
    assert allocator.reserved_bytes == 100 * MIB
    assert allocator.peak_reserved_bytes == 100 * MIB
    with pytest.raises(OutOfMemory, match=r"20971520 bytes do not fit: 104857600 of 104857600"):
        allocator.malloc(20 * MIB)
    assert allocator.allocated_bytes == 100 * MIB


def test_a_segment_in_use_cannot_be_given_back():
    config = AllocatorConfig(capacity_bytes=100 * MIB)
    allocator, _ = _reserved([5 * MIB, 80 * MIB], config)
    with pytest.raises(OutOfMemory):  # 15 MiB of the first segment are free, in one piece, but 16 are wanted
        allocator.malloc(16 * MIB)
    allocator.malloc(15 * MIB)


def test_pages_of_a_growing_segment_are_given_back_and_filled_again():
    config = AllocatorConfig(expandable_segments=True, capacity_bytes=103 * MIB)
    allocator, blocks = _reserved([40 * MIB, 20 * MIB, 40 * MIB, 512], config)
    allocator.free(blocks[0])
    for _ in range(4097):  # the small pool needs a second page: the free 40 MiB are unmapped
        allocator.malloc(512)
    assert allocator.reserved_bytes == 64 * MIB
    lower = allocator.malloc(15 * MIB)  # at the lowest address with room
    assert lower.address == blocks[0].address
    assert allocator.reserved_bytes == 84 * MIB


def test_garbage_collection_gives_back_what_was_longest_unused():
    config = AllocatorConfig(capacity_bytes=1000 * MIB, garbage_collection_threshold=0.1)
    allocator, blocks = _reserved([60 * MIB, 50 * MIB], config)
    allocator.free(blocks[0])
    allocator.free(blocks[1])
    allocator.free(allocator.malloc(55 * MIB))  # the first is used once more
    allocator.malloc(200 * MIB)  # 110 MiB are reserved, 100 allowed: 10 MiB have to go
    assert allocator.reserved_bytes == 260 * MIB


def test_divisions_of_powers_of_two():
    config = parse_allocator_config("roundup_power2_divisions:4")
    assert config.rounded(1200 * 1024) == 1280 * 1024
    assert config.rounded(1024 * 1024) == MIB
    assert config.rounded(1030 * 1024) == 1280 * 1024
    assert config.rounded(1) == 512
    assert config.rounded(513) == 1024  # too small to be divided


# ---------------------------------------------------------------- settings


def test_the_example_of_torch_is_read_as_torch_reads_it():
    """test/cpp: AllocatorConfigTest, and the values it expects."""
    config = parse_allocator_config(
        "max_split_size_mb:40, max_non_split_rounding_mb:30, garbage_collection_threshold:0.5,"
        "roundup_power2_divisions:[64:8,128:2,256:4,512:2,1024:4,>:1],expandable_segments:True,"
        "pinned_use_background_threads:True"
    )
    assert config.max_split_bytes == 40 * MIB
    assert config.max_non_split_rounding_bytes == 30 * MIB
    assert config.large_segment_bytes == 20 * MIB
    assert config.garbage_collection_threshold == 0.5
    assert config.expandable_segments
    # 1, 2 ... 64 MiB; 128; 256; 512; 1 GiB; from 2 GiB on
    assert config.roundup_power2_divisions == (8, 8, 8, 8, 8, 8, 8, 2, 4, 2, 4, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    "text", ["", "expandable_segments:True", "max_split_size_mb:128,garbage_collection_threshold:0.8"]
)
def test_settings_are_written_as_they_are_read(text):
    config = parse_allocator_config(text)
    assert config.settings == (text or "default")
    assert parse_allocator_config("" if config.settings == "default" else config.settings) == config


def test_every_setting_survives_its_own_spelling():
    config = parse_allocator_config("roundup_power2_divisions:[256:1,512:2,>:4],large_segment_size_mb:40")
    assert parse_allocator_config(config.settings) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("expandable:True", "no option 'expandable'"),
        ("expandable_segments:yes", "not True or False"),
        ("max_split_size_mb:10", "at least 20"),
        ("max_split_size_mb", "at least 20"),
        ("garbage_collection_threshold:1.5", "not between 0 and 1"),
        ("roundup_power2_divisions:3", "not a power of two"),
        ("roundup_power2_divisions:[256:1", "not a number or"),
    ],
)
def test_settings_torch_would_refuse(text, says):
    with pytest.raises(UsageError, match=says):
        parse_allocator_config(text)


# ---------------------------------------------------------------- traces


def test_a_replay_covers_all_steps_and_counts_the_peak_of_the_steady_one():
    trace = Trace(device="cuda", granularity=512)
    first = trace.born(Storage(50 * MIB, "", "", "setup"))
    trace.died(first)
    trace.start = len(trace.events)
    kept = trace.born(Storage(11 * MIB, "", "", "forward"))
    other = trace.born(Storage(600, "", "", "forward"))
    trace.died(kept)
    trace.died(other)
    trace.stop = len(trace.events)
    found = reservation(trace, AllocatorConfig())
    assert found.settings == "default"
    assert found.peak_reserved_bytes == 52 * MIB
    assert found.peak_allocated_bytes == 11 * MIB + 1024
    assert found.num_segments == 2
    assert reservation(trace, EXPANDABLE).peak_reserved_bytes == 62 * MIB
    tight = AllocatorConfig(capacity_bytes=40 * MIB)
    with pytest.raises(OutOfMemory):
        reservation(trace, tight)
