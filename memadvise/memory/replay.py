"""Replay a trace: the peak, the phases, and what every byte was for.

Categories are decided here, after the fact, from identities and lifetimes:

- weights, gradients, optimizer_state, buffers, inputs: tensors known by what they are;
- workspace: scratch memory inside kernels;
- activations: made by a forward pass and still alive when the backward pass after it begins, or recomputed for it;
- temporaries: everything else, as what a foreach optimizer allocates during its step;
- what was made before the steady step and outlives it, unnamed, is a buffer (a cache, a table).
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from dataclasses import dataclass

from memadvise.ledger import CATEGORIES, PHASES, LiveTensor, MemoryLedger, PhasePeak
from memadvise.memory.events import Trace
from memadvise.plan.schema import Switches

MAX_TIMELINE_POINTS = 2000
MAX_LIVE_TENSORS = 200
_NO_MODULE = {"setup": "(other)", "forward": "(loss)", "backward": "(loss)", "step": "(optimizer)"}


def build_ledger(
    trace: Trace, *, source: str, optimizer: str, switches: Switches, warnings: tuple[str, ...] = ()
) -> MemoryLedger:
    """The ledger of the trace's steady step.

    ``by_category`` and ``by_module`` describe the moment of the peak and each add up to ``peak_bytes``;
    ``live_at_peak`` lists the largest storages then (at most 200), ``timeline`` has at most 2000 points.
    """
    categories = categorize(trace)
    replay = _replay(trace, categories)
    live = sorted(replay.live_at_peak, key=trace.size, reverse=True)
    by_module: dict[str, Counter[str]] = defaultdict(Counter)
    for number in live:
        by_module[_module(trace, number, categories[number])][categories[number]] += trace.size(number)
    by_category = replay.by_category[replay.peak_phase]
    return MemoryLedger(
        source=source,
        device=trace.device,
        optimizer=optimizer,
        micro_batches=switches.micro_batches,
        checkpoint=tuple(switches.checkpoint),
        peak_bytes=replay.peak[replay.peak_phase],
        peak_phase=replay.peak_phase,
        state_bytes=trace.state_bytes,
        by_category=_ordered(by_category),
        by_module={
            module: _ordered(counts)
            for module, counts in sorted(by_module.items(), key=lambda item: item[1].total(), reverse=True)
        },
        phases=tuple(
            PhasePeak(phase, replay.peak[phase], _ordered(replay.by_category[phase]))
            for phase in PHASES
            if phase in replay.peak
        ),
        live_at_peak=tuple(_live(trace, number, categories[number]) for number in live[:MAX_LIVE_TENSORS]),
        timeline=thin(replay.levels, MAX_TIMELINE_POINTS),
        num_events=trace.stop - trace.start,
        assumptions=tuple(trace.assumptions),
        warnings=(*trace.warnings, *warnings),
    )


def categorize(trace: Trace) -> list[str]:
    """One of ``ledger.CATEGORIES`` for every storage of the trace."""
    birth, death = {}, {}
    for at, event in enumerate(trace.events):
        if event >= 0:
            birth[event] = at
        else:
            death[~event] = at
    backward_starts = [at for at, phase in trace.marks if phase == "backward"]
    never = len(trace.events)
    categories = []
    for number, storage in enumerate(trace.storages):
        born, died = birth[number], death.get(number, never)
        if storage.kind is not None:
            category = storage.kind
        elif born < trace.start and died >= trace.stop:
            category = "buffers"
        elif storage.recomputed:
            category = "activations"
        elif storage.phase == "forward":
            after = bisect.bisect_right(backward_starts, born)
            survives = after < len(backward_starts) and died >= backward_starts[after]
            category = "activations" if survives else "temporaries"
        else:
            category = "temporaries"
        categories.append(category)
    return categories


@dataclass
class _Replay:
    peak_phase: str
    peak: dict[str, int]  # by phase
    by_category: dict[str, Counter[str]]  # by phase, at that phase's peak
    live_at_peak: set[int]
    levels: list[int]  # live bytes after each event of the steady step


def _replay(trace: Trace, categories: list[str]) -> _Replay:
    sizes = [trace.size(number) for number in range(len(trace.storages))]
    live: set[int] = set()
    for event in trace.events[: trace.start]:
        live.add(event) if event >= 0 else live.discard(~event)
    base = set(live)
    level = sum(sizes[number] for number in live)
    peak: dict[str, int] = {}
    where: dict[str, int] = {}
    levels: list[int] = []
    phase, marks = "setup", iter([*trace.marks, (len(trace.events) + 1, "")])
    mark_at, mark = next(marks)

    def note(done: int) -> None:
        """The level after ``done`` events, in the running phase; what a phase finds belongs to its peak."""
        if phase in PHASES and level > peak.get(phase, -1):
            peak[phase], where[phase] = level, done

    for at in range(trace.start, trace.stop + 1):
        while mark_at <= at:  # several, when a phase allocates nothing
            phase = mark
            if mark_at == at:
                note(at)
            mark_at, mark = next(marks)
        if at < trace.stop:
            event = trace.events[at]
            level += sizes[event] if event >= 0 else -sizes[~event]
            levels.append(level)
            note(at + 1)
    peak_phase = max(peak, key=lambda name: peak[name])
    by_category: dict[str, Counter[str]] = {}
    live_at_peak: set[int] = set()
    for name in peak:
        alive = set(base)
        for event in trace.events[trace.start : where[name]]:
            alive.add(event) if event >= 0 else alive.discard(~event)
        counts: Counter[str] = Counter()
        for number in alive:
            counts[categories[number]] += sizes[number]
        by_category[name] = counts
        if name == peak_phase:
            live_at_peak = alive
    return _Replay(peak_phase, peak, by_category, live_at_peak, levels)


def thin(levels: list[int], limit: int) -> tuple[tuple[int, int], ...]:
    """(event number, bytes) at no more than ``limit`` points: of each stretch its lowest and its highest."""
    if len(levels) <= limit:
        return tuple(enumerate(levels))
    stretches = limit // 2
    points: list[tuple[int, int]] = []
    for i in range(stretches):
        span = range(i * len(levels) // stretches, (i + 1) * len(levels) // stretches)
        chosen = {max(span, key=levels.__getitem__), min(span, key=levels.__getitem__)}
        points += [(at, levels[at]) for at in sorted(chosen)]
    return tuple(points)


def _module(trace: Trace, number: int, category: str) -> str:
    storage = trace.storages[number]
    if storage.module:
        return storage.module
    if category == "inputs":
        return "(batch)"
    if category in ("weights", "gradients", "optimizer_state", "buffers"):
        return "(model)"
    return _NO_MODULE.get(storage.phase, "(other)")


def _live(trace: Trace, number: int, category: str) -> LiveTensor:
    storage = trace.storages[number]
    module = _module(trace, number, category)
    return LiveTensor(trace.size(number), category, module, storage.op, storage.phase, storage.where)


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in CATEGORIES if counts[name]}
