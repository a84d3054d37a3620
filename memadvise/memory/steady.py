"""The steady step once more, and again: a trace of as many steps as are wanted, for what only builds up over many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from memadvise.memory.events import Trace


def end_of_step(trace: Trace) -> list[int]:
    """The events up to the end of the steady step, its batch freed."""
    ended = {~event for event in trace.events[: trace.stop] if event < 0}
    born = [event for event in trace.events[trace.start : trace.stop] if event >= 0]
    batch = [number for number in born if trace.storages[number].kind == "inputs" and number not in ended]
    return trace.events[: trace.stop] + [~number for number in batch]


def further_steps(trace: Trace) -> Iterator[list[tuple[int, int]]]:
    """Events of a third, a fourth ... step like the steady one, as (event, bytes); births get numbers of their own.

    What the steady step frees of the step before it, the next one frees of the steady step: for that, the two have to
    leave the same behind. Where they do not (the first step differs, memory grows), nothing is yielded.
    """
    body = end_of_step(trace)[trace.start :]
    born = [event for event in body if event >= 0]
    freed = {~event for event in body if event < 0}
    left, taken = defaultdict(list), defaultdict(list)
    for number in born:
        if number not in freed:
            left[_looks(trace, number)].append(number)
    for number in sorted(freed.difference(born)):
        taken[_looks(trace, number)].append(number)
    if left.keys() != taken.keys() or any(len(left[looks]) != len(taken[looks]) for looks in left):
        return
    # What stands in this step for a storage that was there before it.
    heirs = {old: new for looks in taken for old, new in zip(taken[looks], left[looks], strict=True)}
    current = {number: number for number in born}
    numbers = len(trace.storages)
    while True:
        before, current = current, {}
        step = []
        for event in body:
            if event >= 0:
                current[event] = numbers
                step.append((numbers, trace.storages[event].num_bytes))
                numbers += 1
            else:
                number = ~event
                step.append((~(current[number] if number in current else before[heirs[number]]), 0))
        yield step


def _looks(trace: Trace, number: int) -> Any:
    storage = trace.storages[number]
    return storage.num_bytes, storage.op, storage.module, storage.kind
