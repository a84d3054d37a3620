"""What the probe's statistics decide beside the scores: the axes of a mean by SNR, the blocks by the Hessian."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace

from memadvise.advise.candidates import Group
from memadvise.ledger import ParameterProbe
from memadvise.plan.schema import Setting

_HEADS = ("head", "head_column")


def narrowed(group: Group, probes: Mapping[str, ParameterProbe]) -> Group:
    """The group without the means that the statistics speak against; unchanged where nothing was measured.

    Of the means over fan_in and over fan_out the one with the lower SNR (2503.01843) goes; blocks of heads go where the
    Hessian showed others, clearly (2406.16793).
    """
    if len(group.settings) == 1:  # nothing to choose
        return group
    known = [probes[m.name] for m in group.members if m.name in probes]
    losing = _losing_axes(group, known)
    other_blocks = bool(known) and all(p.partition_measured and p.partition not in _HEADS for p in known)
    kept = tuple(
        s
        for s in group.settings
        if not (s.method == "slimadam" and _axes(s) == losing) and not (s.method == "adam_mini" and other_blocks)
    )
    return replace(group, settings=kept)


def _axes(setting: Setting) -> tuple[int, ...]:
    return tuple(setting.options.get("axes", ()))


def _losing_axes(group: Group, known: list[ParameterProbe]) -> tuple[int, ...] | None:
    first = group.members[0]
    rivals = (first.fan_in, first.fan_out)
    offered = {_axes(s) for s in group.settings if s.method == "slimadam"}
    if not all(rivals) or not set(rivals) <= offered:
        return None
    medians = []
    for axes in rivals:
        found = [v.snr for p in known for v in p.snr if v.axes == axes and v.snr is not None]
        if not found:
            return None
        medians.append(statistics.median(found))
    if medians[0] == medians[1]:
        return None
    return rivals[medians.index(min(medians))]
