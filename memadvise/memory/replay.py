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

from memadvise.ledger import CATEGORIES, PHASES, LiveGroup, LiveTensor, MemoryLedger, PhasePeak
from memadvise.memory.allocator import EXPANDABLE, reservation
from memadvise.memory.allocator_config import AllocatorConfig
from memadvise.memory.architecture import from_assumed
from memadvise.memory.events import Trace
from memadvise.memory.overhead import device_overhead
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
    live = sorted(replay.alive[replay.peak_phase], key=trace.size, reverse=True)
    phases = {
        phase: PhasePeak(phase, replay.peak[phase], *_sums(trace, categories, replay.alive[phase]))
        for phase in PHASES
        if phase in replay.peak
    }
    highest = phases[replay.peak_phase]
    on_cuda = trace.device == "cuda" and source != "measure"
    return MemoryLedger(
        source=source,
        device=trace.device,
        optimizer=optimizer,
        micro_batches=switches.micro_batches,
        checkpoint=tuple(switches.checkpoint),
        peak_bytes=highest.peak_bytes,
        peak_phase=replay.peak_phase,
        state_bytes=trace.state_bytes,
        by_category=highest.by_category,
        by_module=highest.by_module,
        phases=tuple(phases.values()),
        live_at_peak=tuple(_live(trace, number, categories[number]) for number in live[:MAX_LIVE_TENSORS]),
        timeline=thin(replay.levels, MAX_TIMELINE_POINTS),
        num_events=trace.stop - trace.start,
        assumptions=tuple(trace.assumptions),
        warnings=(*trace.warnings, *warnings),
        reserved=tuple(reservation(trace, config) for config in (AllocatorConfig(), EXPANDABLE)) if on_cuda else (),
        overhead=device_overhead(from_assumed(trace.device, trace.assumed)) if on_cuda else (),
        live_groups=_groups(trace, live, categories),
        batch=trace.batch,
        gradient_release=switches.gradient_release,
        weights=switches.weights,
        assumed=trace.assumed,
        sharding=trace.sharding,
        on_real=trace.on_real,
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
        elif storage.communication:
            category = storage.communication
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
    alive: dict[str, set[int]]  # by phase, at that phase's peak
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
    alive_at: dict[str, set[int]] = {}
    for name in peak:
        alive = set(base)
        for event in trace.events[trace.start : where[name]]:
            alive.add(event) if event >= 0 else alive.discard(~event)
        alive_at[name] = alive
    return _Replay(peak_phase, peak, alive_at, levels)


def _sums(trace: Trace, categories: list[str], alive: set[int]) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Bytes by category, and by module (largest first) and category."""
    by_category: Counter[str] = Counter()
    by_module: dict[str, Counter[str]] = defaultdict(Counter)
    for number in sorted(alive):
        category, size = categories[number], trace.size(number)
        by_category[category] += size
        by_module[_module(trace, number, category)][category] += size
    largest_first = sorted(by_module.items(), key=lambda item: item[1].total(), reverse=True)
    return _ordered(by_category), {module: _ordered(counts) for module, counts in largest_first}


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
    return LiveTensor(trace.size(number), category, module, storage.op, storage.phase, storage.where, storage.dtype)


def _groups(trace: Trace, live: list[int], categories: list[str]) -> tuple[LiveGroup, ...]:
    """All that is alive, storages that are alike together, the most bytes first."""
    counts: Counter[tuple[str, str, str, str, str | None]] = Counter()
    sizes: Counter[tuple[str, str, str, str, str | None]] = Counter()
    for number in live:
        storage, category = trace.storages[number], categories[number]
        key = (category, _module(trace, number, category), storage.op, storage.dtype, storage.where)
        counts[key] += 1
        sizes[key] += trace.size(number)
    order = sorted(sizes, key=lambda key: (-sizes[key], *(part or "" for part in key)))
    return tuple(LiveGroup(*key, count=counts[key], num_bytes=sizes[key]) for key in order)


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in CATEGORIES if counts[name]}
