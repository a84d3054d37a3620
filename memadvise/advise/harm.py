"""What an option would cost: the probe's score where it was measured, a profile's or a stated prior where it was not.

Tier 1 is scored by the update error in Adam's metric (``abs_d1``), tier 2 by the same of the displacement over 24
steps (``abs_d24``). The two are never compared or added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

from memadvise.advise.candidates import (
    Group,
    base_kind,
    candidate_settings,
    kind,
    parts_of,
    static_prior,
    tier,
)
from memadvise.advise.profile import Profile
from memadvise.advise.rules import DENSE, TOKEN_ROLES, codecs_of
from memadvise.ledger import FidelityValue, Parameter, ParameterProbe, ProbeLedger
from memadvise.optim.registry import default_lr_factor
from memadvise.plan.schema import Setting

# Loss of one group of tensors in a small GPT (two seeds), with one value a row as the unit, 0.005 nats.
_PRIOR = {"mean(fan_in)": 1.0, "mean(kernel)": 1.0, "factored": 1.0, "low-rank": 1.0, "mean(heads)": 1.5}
_PRIOR_COARSE = 2.0
_PRIOR_CODEC = {"int8": 0.04, "dynamic8": 0.04, "bf16": 0.04, "int4": 0.4}
_PRIOR_TOKENS = 2.0  # tables and heads, the tensors found most sensitive wherever it was measured
# Rounding at random is another error at every step and averages out; what a mean or a factor loses is the same one for
# long. On the five tasks of benchmarks/advice_quality.py AdamW in 4 bits cost -2 to +9 thousandths of a nat, where row
# means and factors cost 3 to 15 times as much for the same error of one update.
_ROUNDED = 0.2


class Source(IntEnum):
    """Where a score is from; larger is weaker."""

    MEASURED = 0
    PARTS = 1
    PROFILE = 2
    PRIOR = 3


@dataclass(frozen=True)
class Harm:
    """Harm of one setting for a whole group: ``value`` >= 0 in the metric of its tier, see the module.

    ``lr_factor``: that of the rule; 1 in tier 1.
    """

    value: float
    source: Source
    reason: str
    lr_factor: float = 1.0

    @property
    def measured(self) -> bool:
        return self.source <= Source.PARTS


class HarmTable:
    """Looks harm up in a probe, then in a profile.

    What neither knows is priced above everything measured: per element, the worst score of that tensor, or of any if it
    has none, times what is known of the kind of setting. So it is chosen last, and the reason says so.
    """

    def __init__(
        self, probe: ProbeLedger | None, profile: Profile | None = None, depths: Mapping[str, float] | None = None
    ) -> None:
        self._probes: dict[str, ParameterProbe] = {p.name: p for p in probe.parameters} if probe else {}
        self._values = {(p.name, f.candidate): f for p in self._probes.values() for f in p.fidelity}
        self._profile, self._depths = profile, depths or {}
        self._worst = {1: 1.0, 2: 1.0}
        self._own_worst: dict[tuple[str, int], float] = {}

    def learn_worst(self, groups: Iterable[Group]) -> None:
        """Note the largest known score per element of each tensor's candidates and of all, one for each tier."""
        every: dict[int, list[float]] = {1: [], 2: []}
        for member in (member for group in groups for member in group.members):
            rates: dict[int, list[float]] = {1: [], 2: []}
            for setting in candidate_settings(member):
                score = _score(self._value(member, setting)[0], tier(setting))
                if score is not None:
                    rates[tier(setting)].append(score / member.numel)
            for number, found in rates.items():
                every[number] += found
                if any(found):
                    self._own_worst[member.name, number] = max(found)
        self._worst = {number: max(found, default=0.0) or 1.0 for number, found in every.items()}

    def of(self, group: Group, setting: Setting) -> Harm:
        """Summed harm of ``setting`` over the members of ``group``."""
        if setting == DENSE:
            return Harm(0.0, Source.MEASURED, "both moments in full")
        if not group.members:
            return Harm(0.0, Source.MEASURED, "no gradient reaches it: no state")
        number = tier(setting)
        total, weakest, cosines, factors = 0.0, Source.MEASURED, [], []
        for member in group.members:
            value, source = self._value(member, setting)
            score = _score(value, number)
            if value is None or score is None:
                worst = self._own_worst.get((member.name, number), self._worst[number])
                score, source = worst * member.numel * prior_rate(member, setting), Source.PRIOR
            else:
                cosines.append(value.one_minus_cos)
                if value.lr_multiplier:
                    factors.append(value.lr_multiplier)
            total += max(score, 0.0)
            weakest = max(weakest, source)
        factor, rate = 1.0, ""
        if number == 2:
            factor, rate = self._lr_factor(setting, factors, len(group.members))
        return Harm(total, weakest, self._reason(group, setting, weakest, cosines) + rate, factor)

    def _value(self, member: Parameter, setting: Setting) -> tuple[FidelityValue | None, Source]:
        """The best known scores of one tensor."""
        measured = self._values.get((member.name, setting.key))
        if measured is not None:
            return _lasting(measured, setting), Source.MEASURED
        parts = parts_of(setting)
        known = [_lasting(self._values.get((member.name, part.key)), part) for part in parts] if parts else []
        if found := _sum(setting.key, known):
            return found, Source.PARTS
        if self._profile is not None:
            depth = self._depths.get(member.name, 0.5)
            wanted = [[setting], list(parts)] if parts else [[setting]]
            for settings in wanted:
                known = [_lasting(self._profile.lookup(member, depth, kind(member, s)), s) for s in settings]
                if found := _sum(setting.key, known):
                    return found, Source.PROFILE
        return None, Source.PRIOR

    @staticmethod
    def _lr_factor(setting: Setting, factors: list[float], count: int) -> tuple[float, str]:
        """One multiplier for the group: the geometric mean of its tensors'; the method's custom if not measured."""
        if len(factors) == count:
            mean = math.exp(math.fsum(math.log(f) for f in factors) / count)
            return float(f"{mean:.3g}"), f"; learning rate x {mean:.3g} matches the length of AdamW's path"
        factor = default_lr_factor(setting.method)
        return factor, f"; learning rate x {factor:g}, the method's custom, not measured here"

    def _reason(self, group: Group, setting: Setting, source: Source, cosines: list[float]) -> str:
        if source is Source.MEASURED:
            return f"update turns by at most 1-cos = {max(cosines):.2g}{self._snr_text(group, setting)}"
        if source is Source.PARTS:
            return (
                f"from its two parts, measured: update turns by at most 1-cos = {max(cosines):.2g}"
                f"{self._snr_text(group, setting)}"
            )
        if source is Source.PROFILE and self._profile:
            return f"not measured on this model; profile {self._profile.name} by role and depth"
        probed = [probe for member in group.members if (probe := self._probes.get(member.name))]
        silent = "the probe has no score of this setting" if probed else "no probe"
        why = next((probe.unknown for probe in probed if probe.unknown), silent)
        prior = "; the mean that the papers recommend" if setting == static_prior(group.members[0]) else ""
        return f"not measured ({why}){prior}"

    def _snr_text(self, group: Group, setting: Setting) -> str:
        axes = tuple(setting.options.get("axes", ()))
        found = [
            value.snr
            for member in group.members
            for value in (self._probes[member.name].snr if member.name in self._probes else ())
            if value.axes == axes and value.snr is not None
        ]
        return f", SNR {min(found):.3g} to {max(found):.3g}" if found else ""


def _score(value: FidelityValue | None, number: int) -> float | None:
    if value is None:
        return None
    return value.abs_d1 if number == 1 else value.abs_d24


def _lasting(value: FidelityValue | None, setting: Setting) -> FidelityValue | None:
    """The scores without what averages out over the steps."""
    if value is None or setting.method != DENSE.method or "int4" not in codecs_of(setting).values():
        return value
    return replace(value, abs_d1=_ROUNDED * value.abs_d1)


def _sum(key: str, known: list[FidelityValue | None]) -> FidelityValue | None:
    """The scores of things done together; None unless all are known."""
    values = [value for value in known if value is not None]
    if not values or len(values) < len(known):
        return None
    if len(values) == 1:
        return values[0]
    return FidelityValue(key, sum(v.abs_d1 for v in values), sum(v.one_minus_cos for v in values))


def prior_rate(parameter: Parameter, setting: Setting) -> float:
    """Harm per element in units of the worst measured one, where nothing is known of the tensor."""
    if tier(setting) == 2:
        return 1.0
    base = 0.0 if setting.method == DENSE.method else _PRIOR.get(base_kind(parameter, setting), _PRIOR_COARSE)
    if setting == static_prior(parameter):
        base = 1.0
    rate = base + sum(_PRIOR_CODEC.get(codec, _PRIOR_COARSE) for codec in codecs_of(setting).values())
    return rate * (_PRIOR_TOKENS if parameter.role in TOKEN_ROLES else 1.0)
