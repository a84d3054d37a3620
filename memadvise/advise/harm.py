"""What an option would cost: the probe's update error where it was measured, a stated prior where it was not."""

from __future__ import annotations

from dataclasses import dataclass

from memadvise.advise.candidates import DENSE, TOKEN_ROLES, Group, static_prior
from memadvise.ledger import ParameterProbe, ProbeLedger
from memadvise.plan.schema import Setting


@dataclass(frozen=True)
class Harm:
    """Harm of one setting for a whole group: ``value`` >= 0 in Adam's metric (``absD1``, see FidelityValue)."""

    value: float
    measured: bool
    reason: str


class HarmTable:
    """Looks harm up in a probe.

    Unmeasured tensors are priced above everything measured: per element, the worst measured harm, doubled for
    settings that the papers' static rules do not recommend and again for token tables and output heads, the tensors
    found most sensitive wherever it was measured. So they are compressed last, and the reason says so.
    """

    def __init__(self, probe: ProbeLedger | None) -> None:
        self._probes: dict[str, ParameterProbe] = {p.name: p for p in probe.parameters} if probe else {}
        self._values = {(p.name, f.candidate): f for p in self._probes.values() for f in p.fidelity}

    def worst_per_element(self, groups: tuple[Group, ...]) -> float:
        """The largest measured harm per element of any candidate, 1.0 when nothing was measured."""
        rates = [
            value.abs_d1 / member.numel
            for group in groups
            for member in group.members
            for setting in group.settings
            if (value := self._values.get((member.name, setting.key))) is not None
        ]
        return max(rates, default=0.0) or 1.0

    def of(self, group: Group, setting: Setting, worst: float) -> Harm:
        """Summed harm of ``setting`` over the members of ``group``."""
        if setting == DENSE:
            return Harm(0.0, True, "full second moment")
        if not group.members:
            return Harm(0.0, True, "no gradient reaches it: no state")
        values = [self._values.get((member.name, setting.key)) for member in group.members]
        known = [value for value in values if value is not None]
        total = sum(max(value.abs_d1, 0.0) for value in known)
        if len(known) == len(values):
            worst_cos = max(value.one_minus_cos for value in known)
            return Harm(total, True, f"update turns by at most 1-cos = {worst_cos:.2g}{self._snr_text(group, setting)}")
        prior = setting == static_prior(group.members[0])
        for member, value in zip(group.members, values, strict=True):
            if value is None:
                doubtful = (not prior) + (member.role in TOKEN_ROLES)
                total += worst * member.numel * 2.0**doubtful
        probed = [probe for member in group.members if (probe := self._probes.get(member.name))]
        silent = "the probe weighs other second moments only" if probed else "no probe"
        why = next((probe.unknown for probe in probed if probe.unknown), silent)
        return Harm(total, False, f"not measured ({why}); {'static prior of the papers' if prior else 'no prior'}")

    def _snr_text(self, group: Group, setting: Setting) -> str:
        axes = tuple(setting.options.get("axes", ()))
        found = [
            value.snr
            for member in group.members
            for value in (self._probes[member.name].snr if member.name in self._probes else ())
            if value.axes == axes and value.snr is not None
        ]
        return f", SNR {min(found):.3g} to {max(found):.3g}" if found else ""
