"""A profile: compressibility learned from scans of other models, for one that is too large to probe.

Scores are per element, by role, relative depth (0: the first tensor of that role, 1: the last) and kind of candidate
(:func:`memadvise.advise.candidates.kind`), so that they carry over to a tensor of another size and layout. A profile
ranks; it says less than a probe of the model itself, and the stated confidence is lowered by one level.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memadvise.advise.candidates import candidate_settings, kind
from memadvise.errors import FileFormatError, UsageError
from memadvise.ledger import FidelityValue, Parameter, Scan, from_dict

PROFILE_VERSION = 1
_DIGITS = 4  # seeds differ in the second one


@dataclass(frozen=True)
class ProfileValue:
    """What one kind of candidate did to one tensor: FidelityValue's scores, ``abs_d1`` and ``abs_d24`` per element."""

    role: str
    depth: float
    candidate: str
    abs_d1: float
    one_minus_cos: float
    abs_d24: float | None = None
    lr_multiplier: float | None = None


@dataclass(frozen=True)
class Profile:
    """A profile file. ``evidence``: sizes, seeds, steps, versions, the command that made it."""

    name: str
    values: tuple[ProfileValue, ...]
    evidence: dict[str, Any] = field(default_factory=dict)
    profile_version: int = PROFILE_VERSION

    def lookup(self, parameter: Parameter, depth: float, candidate: str) -> FidelityValue | None:
        """Scores for one tensor: linear between the nearest depths of its role, times its elements; None: no such role
        or candidate.
        """
        found = sorted(
            (v for v in self.values if v.role == parameter.role and v.candidate == candidate), key=lambda v: v.depth
        )
        if not found:
            return None
        below = [v for v in found if v.depth <= depth] or found[:1]
        above = [v for v in found if v.depth >= depth] or found[-1:]
        low, high = below[-1], above[0]
        share = (depth - low.depth) / (high.depth - low.depth) if high.depth > low.depth else 0.0

        def between(name: str, scale: float = 1.0) -> Any:
            first, second = getattr(low, name), getattr(high, name)
            return None if first is None or second is None else scale * (first + share * (second - first))

        return FidelityValue(
            candidate,
            between("abs_d1", parameter.numel),
            between("one_minus_cos"),
            abs_d24=between("abs_d24", parameter.numel),
            lr_multiplier=between("lr_multiplier"),
        )


def relative_depths(parameters: Iterable[Parameter]) -> dict[str, float]:
    """Name -> place among the trainable parameters of its role, from 0 to 1, in the model's order."""
    by_role: dict[str, list[str]] = defaultdict(list)
    for parameter in parameters:
        if parameter.trainable:
            by_role[parameter.role].append(parameter.name)
    return {name: i / max(1, len(names) - 1) for names in by_role.values() for i, name in enumerate(names)}


def profile_from_scans(name: str, scans: Sequence[Scan], evidence: dict[str, Any]) -> Profile:
    """The profile of what the probes of ``scans`` measured, averaged over tensors of one role, depth and candidate.

    Raises:
        UsageError: a scan without a probe.
    """
    pools: dict[tuple[str, float, str], list[tuple[FidelityValue, int]]] = defaultdict(list)
    for scan in scans:
        if scan.probe is None:
            raise UsageError(f"the scan of {scan.target} has no probe to learn from", hint="scan without --no-probe")
        parameters = {p.name: p for p in scan.parameters}
        depths = relative_depths(scan.parameters)
        for probed in scan.probe.parameters:
            parameter = parameters[probed.name]
            kinds = {s.key: kind(parameter, s) for s in candidate_settings(parameter)}
            for value in probed.fidelity:
                if value.candidate in kinds:
                    key = (parameter.role, round(depths[probed.name], 3), kinds[value.candidate])
                    pools[key].append((value, parameter.numel))
    values = tuple(_pooled(*key, pool) for key, pool in sorted(pools.items()))
    return Profile(name, values, evidence)


def _pooled(role: str, depth: float, candidate: str, pool: list[tuple[FidelityValue, int]]) -> ProfileValue:
    def mean(numbers: list[float | None]) -> float | None:
        known = [n for n in numbers if n is not None]
        return float(f"{sum(known) / len(known):.{_DIGITS}g}") if known and len(known) == len(numbers) else None

    return ProfileValue(
        role,
        depth,
        candidate,
        mean([v.abs_d1 / n for v, n in pool]) or 0.0,
        mean([v.one_minus_cos for v, _ in pool]) or 0.0,
        mean([None if v.abs_d24 is None else v.abs_d24 / n for v, n in pool]),
        mean([v.lr_multiplier for v, _ in pool]),
    )


# ---------------------------------------------------------------- files


def load_profile(name_or_file: str) -> Profile:
    """The profile of that name among those shipped, or of that file.

    Raises:
        UsageError: neither. FileFormatError: truncated, foreign, of another version, or not as it should be.
    """
    path = Path(name_or_file)
    if path.suffix != ".json":
        shipped = shipped_profiles()
        if name_or_file not in shipped:
            known = f"shipped are: {', '.join(sorted(shipped))}" if shipped else "none is shipped"
            raise UsageError(f"there is no profile '{name_or_file}'", hint=f"{known}; a file's name ends in .json")
        path = shipped[name_or_file]
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"cannot read the profile {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} is not a whole JSON document ({error})") from error
    version = value.get("profile_version") if isinstance(value, dict) else None
    if version != PROFILE_VERSION:
        what = f"has profile version {version}" if isinstance(version, int) else "is not a memadvise profile"
        raise FileFormatError(f"{path} {what}; this memadvise reads version {PROFILE_VERSION}")
    return from_dict(Profile, value, str(path))


def shipped_profiles() -> dict[str, Path]:
    """Name -> file of the profiles that travel with memadvise: ``_profiles`` beside it, ``profiles/`` in a checkout."""
    package = Path(__file__).parents[1]
    folders = (package / "_profiles" / "models", package.parent / "profiles" / "models")
    return {path.stem: path for folder in reversed(folders) if folder.is_dir() for path in folder.glob("*.json")}
