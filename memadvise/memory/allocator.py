"""Replay a trace in torch's CUDA caching allocator: the memory it reserves from the device, and how it cuts that up.

A simulation after c10/cuda/CUDACachingAllocator.cpp (torch 2.13), for one stream: small and large blocks in pools of
their own, the best fit among free blocks, splitting, merging with free neighbours, segments of 2 MiB, 20 MiB or a
multiple of 2 MiB, or one growing address range for each pool (``expandable_segments``). Where the device is full
(``capacity_bytes``), what is cached and in one piece is given back before an allocation fails.

Not simulated: other streams (``record_stream``), CUDA graphs' private pools. The device is assumed to hand out
ascending addresses; they decide between free blocks of equal size only.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from memadvise.errors import MemadviseError
from memadvise.ledger import Reservation
from memadvise.memory.allocator_config import MIB, AllocatorConfig
from memadvise.memory.events import Trace
from memadvise.memory.steady import end_of_step, further_steps

SMALL_SIZE = 1 * MIB  # kSmallSize: up to it, from the small pool
SMALL_BUFFER = 2 * MIB  # kSmallBuffer: a segment of the small pool, and a page of its growing segment
MIN_LARGE_ALLOC = 10 * MIB  # kMinLargeAlloc: from it on, a segment of its own
ROUND_LARGE = 2 * MIB  # kRoundLarge: such a segment's granularity
EXPANDABLE = AllocatorConfig(expandable_segments=True)
TRACED_STEPS = 2
MOST_STEPS = 6
_MIN_BLOCK = 512  # kMinBlockSize
_ADDRESS_SPACE = 1 << 50  # of a growing segment: never exhausted, as on a device that holds the step


class OutOfMemory(MemadviseError):
    """The simulated device is full, and nothing cached could be given back."""

    exit_code = 1


class Block:
    """A piece of a segment: handed out, free, or (in a growing segment) without memory behind it."""

    __slots__ = ("address", "allocated", "freed_at", "mapped", "next", "pool", "prev", "size")

    def __init__(self, pool: _Pool, address: int, size: int, *, mapped: bool = True) -> None:
        self.pool, self.address, self.size, self.mapped = pool, address, size, mapped
        self.allocated = False
        self.freed_at = 0  # how often its pool had been searched then: its age, for garbage collection
        self.prev: Block | None = None
        self.next: Block | None = None

    @property
    def is_split(self) -> bool:
        return self.prev is not None or self.next is not None


class _Pool:
    """The free blocks of one size class, ordered by size, then address."""

    def __init__(self, *, small: bool) -> None:
        self.small = small
        self.searches = 0
        self.free: list[tuple[int, int]] = []
        self.blocks: dict[int, Block] = {}  # of ``free``, by address
        self.unmapped: list[Block] = []  # by address
        self.base = 0  # address of its growing segment, from which pages are counted

    def insert(self, block: Block) -> None:
        block.freed_at = self.searches
        bisect.insort(self.free, (block.size, block.address))
        self.blocks[block.address] = block

    def remove(self, block: Block) -> None:
        del self.free[bisect.bisect_left(self.free, (block.size, block.address))]
        del self.blocks[block.address]


class CachingAllocator:
    """The allocator of one device and one stream.

    Attributes:
        reserved_bytes, allocated_bytes: as ``torch.cuda.memory_reserved`` and ``memory_allocated`` count them.
        peak_reserved_bytes: the highest of the former.
    """

    def __init__(self, config: AllocatorConfig | None = None) -> None:
        self.config = config or AllocatorConfig()
        self.reserved_bytes = self.allocated_bytes = self.peak_reserved_bytes = 0
        self._small, self._large = _Pool(small=True), _Pool(small=False)
        self._first: dict[int, Block] = {}  # first block of each segment, by address
        self._next_address = 0

    # ------------------------------------------------------------ what a program calls

    def malloc(self, num_bytes: int) -> Block:
        """Hand out a block for ``num_bytes``.

        Raises:
            OutOfMemory: the device (``capacity_bytes``) has no room left.
        """
        size = self.config.rounded(num_bytes)
        pool = self._small if size <= SMALL_SIZE else self._large
        block = self._best_fit(pool, size)
        if block is None:
            self._collect_garbage()
            block = self._reserve(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._reserve(pool, size)
        if block is None:
            self.empty_cache()
            block = self._reserve(pool, size)
        if block is None:
            raise OutOfMemory(
                f"{size} bytes do not fit: {self.allocated_bytes} of {self.config.capacity_bytes} bytes are allocated, "
                f"{self.reserved_bytes} reserved",
                hint="a larger device, or expandable_segments:True, which leaves fewer gaps",
            )
        if self._should_split(block, size):
            self._split(block, size)
        block.allocated = True
        self.allocated_bytes += block.size
        return block

    def free(self, block: Block) -> None:
        """Take a block back; it merges with free neighbours."""
        block.allocated = False
        self.allocated_bytes -= block.size
        self._merge(block, block.prev)
        self._merge(block, block.next)
        block.pool.insert(block)

    def empty_cache(self) -> None:
        """Give back to the device every segment, or page of a growing segment, that is wholly free."""
        for pool in (self._large, self._small):
            for _, address in list(pool.free):
                block = pool.blocks.get(address)
                if block is None:
                    continue  # merged with one that was given back
                if self.config.expandable_segments:
                    self._unmap(block)
                elif not block.is_split:
                    self._release(block)

    def segments(self) -> list[list[Block]]:
        """The blocks of each segment that has memory, in the order of addresses."""
        found = []
        for address in sorted(self._first):
            block: Block | None = self._first[address]
            blocks = []
            while block is not None:
                blocks.append(block)
                block = block.next
            if any(block.mapped for block in blocks):
                found.append(blocks)
        return found

    # ------------------------------------------------------------ free blocks

    def _best_fit(self, pool: _Pool, size: int) -> Block | None:
        """The smallest free block that holds ``size``, if the settings let it be used for that."""
        pool.searches += 1
        at = bisect.bisect_left(pool.free, (size, -1))
        if at == len(pool.free):
            return None
        block = pool.blocks[pool.free[at][1]]
        if self.config.expandable_segments:
            # The last mapped block counts with what it can still grow by.
            while at + 1 < len(pool.free):
                after = pool.blocks[pool.free[at + 1][1]]
                if _growable_size(after) >= _growable_size(block):
                    break
                block, at = after, at + 1
        limit = self.config.max_split_bytes
        if limit is not None:
            if size < limit <= block.size:
                return None  # oversize blocks are kept whole for oversize requests
            if size >= limit and block.size >= size + self.config.max_non_split_rounding_bytes:
                return None
        pool.remove(block)
        return block

    def _should_split(self, block: Block, size: int) -> bool:
        rest, limit = block.size - size, self.config.max_split_bytes
        if block.pool.small or self.config.expandable_segments:
            return rest >= _MIN_BLOCK
        return (limit is None or size < limit) and rest > SMALL_SIZE

    def _split(self, block: Block, size: int) -> None:
        """Cut ``block`` down to ``size``; the rest is a free block of its own."""
        rest = Block(block.pool, block.address + size, block.size - size)
        block.size = size
        _link(block, rest)
        block.pool.insert(rest)

    def _merge(self, block: Block, other: Block | None) -> None:
        """Let ``block`` take in a neighbour that is free too (or, both, without memory)."""
        if other is None or other.allocated or other.mapped != block.mapped:
            return
        if other.mapped:
            other.pool.remove(other)
        else:
            other.pool.unmapped.remove(other)
        if other is block.prev:
            if other.address in self._first:
                self._first[other.address] = block
            block.address, block.prev = other.address, other.prev
            if block.prev is not None:
                block.prev.next = block
        else:
            block.next = other.next
            if block.next is not None:
                block.next.prev = block
        block.size += other.size

    # ------------------------------------------------------------ memory of the device

    def _reserve(self, pool: _Pool, size: int) -> Block | None:
        """A block of at least ``size`` bytes with new memory behind it; None where the device is full."""
        segment = self._segment_size(size)
        if self.config.expandable_segments:
            return self._grow(pool, size) if self._has_room(segment) else None
        if not self._has_room(segment):
            return None
        block = Block(pool, self._next_address, segment)
        self._first[block.address] = block
        self._next_address += segment + 2 * MIB  # a gap: segments never touch
        self._count(segment)
        return block

    def _segment_size(self, size: int) -> int:
        if size <= SMALL_SIZE:
            return SMALL_BUFFER
        if size < MIN_LARGE_ALLOC:
            return self.config.large_segment_bytes
        return -(-size // ROUND_LARGE) * ROUND_LARGE

    def _has_room(self, size: int) -> bool:
        return self.config.capacity_bytes is None or self.reserved_bytes + size <= self.config.capacity_bytes

    def _count(self, size: int) -> None:
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _grow(self, pool: _Pool, size: int) -> Block | None:
        """The lowest run of free and unmapped blocks that can hold ``size``, with memory behind all of it."""
        block = self._growable(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            unmapped = block.next
            assert unmapped is not None
            if not self._map(unmapped, min(size - block.size, unmapped.size)):
                return None
            block = unmapped
        pool.remove(block)
        return block

    def _growable(self, pool: _Pool, size: int) -> Block:
        for unmapped in pool.unmapped:
            before = unmapped.prev
            first = before if before is not None and not before.allocated else unmapped
            room, block = 0, first
            while room < size and not block.allocated:
                room += block.size
                if block.next is None:
                    break
                block = block.next
            if room >= size:
                return first
        segment = Block(pool, self._next_address, _ADDRESS_SPACE, mapped=False)
        self._first[segment.address] = segment
        self._next_address += _ADDRESS_SPACE
        pool.base = segment.address
        pool.unmapped.append(segment)
        return segment

    def _map(self, block: Block, size: int) -> bool:
        """Put pages behind the beginning of an unmapped block, which then merges with its free neighbours."""
        pool = block.pool
        mapped = -(-size // self._page(pool)) * self._page(pool)
        if not self._has_room(mapped):
            return False
        pool.unmapped.remove(block)
        block.mapped = True
        if mapped < block.size:
            rest = Block(pool, block.address + mapped, block.size - mapped, mapped=False)
            block.size = mapped
            _link(block, rest)
            self._insert_unmapped(rest)
        self._merge(block, block.prev)
        self._merge(block, block.next)
        pool.insert(block)
        self._count(mapped)
        return True

    def _page(self, pool: _Pool) -> int:
        return SMALL_BUFFER if pool.small else self.config.large_segment_bytes

    def _insert_unmapped(self, block: Block) -> None:
        bisect.insort(block.pool.unmapped, block, key=lambda other: other.address)

    def _unmap(self, block: Block) -> None:
        """Give back the pages that lie wholly inside a free block."""
        pool, page = block.pool, self._page(block.pool)
        begin = pool.base - (pool.base - block.address) // page * page
        end = pool.base + (block.address + block.size - pool.base) // page * page
        if begin >= end:
            return
        pool.remove(block)
        if begin > block.address:
            before = Block(pool, block.address, begin - block.address)
            if block.address in self._first:
                self._first[block.address] = before
            if block.prev is not None:
                _link(block.prev, before)
            block.address, block.size = begin, block.size - before.size
            before.next, block.prev = block, before
            pool.insert(before)
        if block.address + block.size > end:
            after = Block(pool, end, block.address + block.size - end)
            block.size = end - block.address
            _link(block, after)
            pool.insert(after)
        block.mapped = False
        self.reserved_bytes -= block.size
        self._merge(block, block.prev)
        self._merge(block, block.next)
        self._insert_unmapped(block)

    def _release(self, block: Block) -> None:
        block.pool.remove(block)
        del self._first[block.address]
        self.reserved_bytes -= block.size

    def _release_oversize(self, pool: _Pool, size: int) -> bool:
        """With ``max_split_size_mb``: give back oversize blocks, the one that is enough, or the largest ones."""
        limit = self.config.max_split_bytes
        if limit is None or self.config.expandable_segments:
            return False
        wanted = max(size, limit)
        at = bisect.bisect_left(pool.free, (wanted, -1))
        if at < len(pool.free):
            self._release(pool.blocks[pool.free[at][1]])
            return True
        released = 0
        while released < wanted and pool.free and pool.free[-1][0] >= limit:
            released += pool.free[-1][0]
            self._release(pool.blocks[pool.free[-1][1]])
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Above the threshold, give back whole free segments: those that were longest unused first."""
        config = self.config
        if config.capacity_bytes is None or not config.garbage_collection_threshold or config.expandable_segments:
            return
        target = self.reserved_bytes - int(config.garbage_collection_threshold * config.capacity_bytes)
        while target > 0:
            pool = self._large
            ages = {b.address: pool.searches - b.freed_at for b in pool.blocks.values() if not b.is_split}
            if not ages:
                return
            mean = sum(ages.values()) / len(ages)
            for address, age in ages.items():
                if age >= mean:
                    target -= pool.blocks[address].size
                    self._release(pool.blocks[address])


def _growable_size(block: Block) -> int:
    after = block.next
    return block.size + (after.size if after is not None and not after.mapped else 0)


def _link(block: Block, after: Block) -> None:
    """Put ``after`` between ``block`` and what followed it."""
    after.prev, after.next = block, block.next
    if after.next is not None:
        after.next.prev = after
    block.next = after


# ---------------------------------------------------------------- replays


@dataclass(frozen=True)
class Level:
    """After one event: its place in the list, and what the allocator counts."""

    event: int
    allocated_bytes: int
    reserved_bytes: int


class Replay:
    """Hands births and ends of numbered storages to an allocator."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self.allocator = allocator
        self._blocks: dict[int, Block] = {}
        self._done = 0

    def run(self, events: Iterable[tuple[int, int]]) -> Iterator[Level]:
        """After each of ``events`` (``number, bytes`` or ``~number, 0``), what the allocator counts.

        Raises:
            OutOfMemory: they do not fit in the allocator's ``capacity_bytes``.
        """
        allocator, blocks = self.allocator, self._blocks
        for event, size in events:
            if event >= 0:
                blocks[event] = allocator.malloc(size)
            else:
                allocator.free(blocks.pop(~event))
            yield Level(self._done, allocator.allocated_bytes, allocator.reserved_bytes)
            self._done += 1


def reservation(trace: Trace, config: AllocatorConfig) -> Reservation:
    """What the allocator reserves over the traced steps and, where the steady one can be repeated, over more of them.

    The gaps of the first step stay, and later steps may open new ones: steps are added until one of them reserves
    nothing more, up to :data:`MOST_STEPS`.
    """
    replay = Replay(CachingAllocator(config))
    peak = before = 0
    sizes = [storage.num_bytes for storage in trace.storages]
    for level in replay.run((event, sizes[event] if event >= 0 else 0) for event in end_of_step(trace)):
        if level.event < trace.start:
            before = level.allocated_bytes
        elif level.event < trace.stop:
            peak = max(peak, level.allocated_bytes)
    steps = TRACED_STEPS
    for step in itertools.islice(further_steps(trace), MOST_STEPS - TRACED_STEPS):
        reserved = replay.allocator.peak_reserved_bytes
        for level in replay.run(step):
            peak = max(peak, level.allocated_bytes)
        steps += 1
        if replay.allocator.peak_reserved_bytes == reserved:
            break
    return Reservation(
        settings=config.settings,
        peak_reserved_bytes=replay.allocator.peak_reserved_bytes,
        peak_allocated_bytes=max(peak, before),
        num_segments=len(replay.allocator.segments()),
        num_steps=steps,
    )
