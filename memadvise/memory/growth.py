"""Memory that a step leaves behind: said when it would grow with every step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

from memadvise.memory.events import Trace
from memadvise.units import format_bytes

_MIN_BYTES = 1 << 14  # may stay behind unremarked: losses kept for a log
_MIN_SHARE = 1000  # and so may one part in so many of what is alive


def growth_warnings(trace: Trace, kept: list[set[int]], alive: Callable[[], set[int]]) -> list[str]:
    """Warnings if the last step left more memory behind than the one before.

    Args:
        trace: where the storages are.
        kept: the storages alive after each step, in the order of the steps.
        alive: the storages alive now.
    """
    if len(kept) < 2:
        return []

    def total(numbers: Iterable[int]) -> int:
        return sum(map(trace.size, numbers))

    before, after = kept[-2:]
    least = max(_MIN_BYTES, total(after) // _MIN_SHARE)
    if total(after) - total(before) < least:
        return []
    gc.collect()  # what only cycles hold goes when Python collects it
    left = alive()
    new = after - before
    cycles, lasting = total(new - left), total(new & left) - total(before - after)
    said = []
    if cycles >= least:
        said.append(
            f"{format_bytes(cycles)} of each step are held by reference cycles until Python's garbage collector runs: "
            "the peak of a long run may lie higher by that much for every step in between"
        )
    if lasting >= least:
        largest = trace.storages[max(new & left, key=trace.size)]
        said.append(
            f"the step never frees {format_bytes(lasting)} of what it allocates: step {len(kept) - 1} ends with "
            f"{format_bytes(total(before))}, step {len(kept)} with {format_bytes(total(after))}, and so it goes on; "
            f"the largest of it was made at {largest.where or largest.op or 'an unknown place'}"
        )
    return said
