"""A measured ledger beside the device's own counters, which have the last word."""

from __future__ import annotations

from dataclasses import replace

from memadvise.ledger import MemoryLedger, PhasePeak

_UNHELD = "(other)"  # as the replay calls what belongs to no module


def _disagreements(ledger: MemoryLedger, metered: dict[str, int]) -> list[str]:
    """What the events add up to and what the device's own counters say has to be the same."""
    return [
        f"the allocator's own peak in the {phase.phase} phase is {metered[phase.phase]:,} bytes, its events add up to "
        f"{phase.peak_bytes:,}"
        for phase in ledger.phases
        if phase.phase in metered and metered[phase.phase] != phase.peak_bytes
    ]


def as_counted(ledger: MemoryLedger, metered: dict[str, int]) -> MemoryLedger:
    """The ledger with the peaks that the device's counters say: they decide, and what they count more or less than the
    events is workspace, the category of what nobody is known to hold. A phase of less workspace stays as it is. Every
    difference is a warning.
    """
    ledger = replace(ledger, warnings=(*ledger.warnings, *_disagreements(ledger, metered)))
    phases = tuple(_phase_as_counted(phase, metered.get(phase.phase, phase.peak_bytes)) for phase in ledger.phases)
    highest = max(phases, key=lambda phase: phase.peak_bytes)
    return replace(
        ledger,
        phases=phases,
        peak_bytes=highest.peak_bytes,
        peak_phase=highest.phase,
        by_category=highest.by_category,
        by_module=highest.by_module,
    )


def _phase_as_counted(phase: PhasePeak, counted: int) -> PhasePeak:
    more, kind = counted - phase.peak_bytes, "workspace"
    if not more or phase.by_category.get(kind, 0) + more < 0:
        return phase
    by_module = {module: dict(cells) for module, cells in phase.by_module.items()}
    holders = sorted(by_module, key=lambda module: by_module[module].get(kind, 0), reverse=True)
    left = more
    for module in holders if more < 0 else [_UNHELD]:
        cells = by_module.setdefault(module, {})
        taken = max(left, -cells.get(kind, 0))
        cells[kind] = cells.get(kind, 0) + taken
        left -= taken
    kept = {module: {k: size for k, size in cells.items() if size} for module, cells in by_module.items()}
    by_category = {**phase.by_category, kind: phase.by_category.get(kind, 0) + more}
    return replace(
        phase,
        peak_bytes=counted,
        by_category={category: size for category, size in by_category.items() if size},
        by_module={module: cells for module, cells in kept.items() if cells},
    )
