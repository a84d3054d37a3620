"""Bytes in and out: ``12GB`` is 12 * 10**9, ``12GiB`` is 12 * 2**30; integers everywhere else."""

from __future__ import annotations

import re

from memadvise.errors import UsageError

_FACTORS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """``'12GB'`` -> 12000000000, ``'1.5GiB'`` -> 1610612736, ``'4096'`` -> 4096.

    Raises:
        UsageError: not a number with one of the units B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, or not positive.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise UsageError(
            f"'{text}' is not a size in bytes",
            hint="write a number and a unit, for example 12GB (12*10^9 bytes), 12GiB (12*2^30), 800MB or 123456",
        )
    size = round(float(match.group(1)) * factor) if "." in match.group(1) else int(match.group(1)) * factor
    if size <= 0:
        raise UsageError(f"'{text}' is not a positive size", hint="give at least one byte, for example 12GB")
    return size


def format_bytes(size: int) -> str:
    """Binary units with three to five digits: 1610612736 -> ``'1.50 GiB'``, 999 -> ``'999 B'``."""
    sign, size = ("-" if size < 0 else ""), abs(size)
    if size < 2**10:
        return f"{sign}{size} B"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            value = size / factor
            return f"{sign}{value:,.{2 if value < 100 else 1}f} {unit}"
    raise AssertionError("unreachable")


def echo_bytes(text: str, size: int) -> str:
    """The user's own words beside what was understood: ``'12GB = 11.18 GiB'``."""
    return f"{text.strip()} = {format_bytes(size)}"
