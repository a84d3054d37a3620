"""What was followed once need not be followed again: the step of a parameter, for all parameters of its kind.

Following the operations of one parameter's step takes up to half a second of fake tensors. What it left behind in the
trace is nothing but births and ends of temporaries; if all of them ended, and all belong to the same module and line,
the same list can stand for the next parameter of the kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from memadvise.memory.events import Storage, Trace


@dataclass(frozen=True)
class _Course:
    """Temporaries in the order of their births; events as in a trace, numbered from 0."""

    storages: tuple[Storage, ...]
    events: tuple[int, ...]


class Courses:
    """What kinds of work were seen to allocate, and to free again.

    Args:
        trace: what is written to.
        place: module and line of what runs now, with the phase and whether it is computed again.
    """

    def __init__(self, trace: Trace, place: Callable[[], tuple[str, str | None, str, bool]]) -> None:
        self._trace, self._place = trace, place
        self._known: dict[Hashable, _Course] = {}

    def repeat(self, key: Hashable, run: Callable[[], None]) -> bool:
        """Run, or write down what the last run of this ``key`` did; whether it was the latter."""
        course = self._known.get(key)
        if course is None:
            events, storages = len(self._trace.events), len(self._trace.storages)
            here = self._place()
            run()
            if (course := self._course(events, storages, here)) is not None:
                self._known[key] = course
            return False
        module, where, phase, recomputed = self._place()
        offset = len(self._trace.storages)
        self._trace.storages += [
            dataclasses.replace(s, module=module, where=where, phase=phase, recomputed=recomputed)
            for s in course.storages
        ]
        self._trace.events += [e + offset if e >= 0 else e - offset for e in course.events]
        return True

    def _course(self, events: int, storages: int, here: tuple[str, str | None, str, bool]) -> _Course | None:
        """What was recorded since; None where it is not to be repeated."""
        found = tuple(e - storages if e >= 0 else e + storages for e in self._trace.events[events:])
        made = tuple(self._trace.storages[storages:])
        births, ends = [e for e in found if e >= 0], [~e for e in found if e < 0]
        if births != list(range(len(made))) or sorted(ends) != births:  # something stayed, or something older went
            return None
        if any((s.module, s.where, s.phase, s.recomputed) != here or s.communication for s in made):
            return None
        return _Course(made, found)
