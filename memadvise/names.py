"""Canonical dotted names and the patterns that match them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")


def canonical_name(name: str) -> str:
    """The name without wrapper segments: ``_orig_mod.``, ``_fsdp_wrapped_module.``, ``_checkpoint_wrapped_module.``
    anywhere, and ``module.`` (DDP, DataParallel) at the front.
    """
    parts = name.split(".")
    while parts and parts[0] in _WRAPPERS and len(parts) > 1:
        parts.pop(0)
    return ".".join(part for part in parts if part not in _WRAPPERS[:3])


@lru_cache(maxsize=4096)
def pattern_regex(pattern: str) -> re.Pattern[str]:
    """A glob on dotted names as a regular expression.

    ``*`` matches within one dotted segment, ``**`` across segments, ``?`` one character, ``[ab]`` a set;
    a pattern that starts with ``re:`` is a regular expression on the full name.

    Raises:
        re.error: an ``re:`` pattern that does not compile.
    """
    if pattern.startswith("re:"):
        return re.compile(pattern[3:])
    out, i = [], 0
    while i < len(pattern):
        char = pattern[i]
        if pattern.startswith("**", i):
            out.append(".*")
            i += 2
            continue
        if char == "*":
            out.append("[^.]*")
        elif char == "?":
            out.append("[^.]")
        elif char == "[" and "]" in pattern[i + 2 :]:
            end = pattern.index("]", i + 2)
            body = pattern[i + 1 : end]
            negated, body = body.startswith("!") and len(body) > 1, body.removeprefix("!") or body
            members = re.sub(r"([^0-9A-Za-z_-])", r"\\\1", body)
            out.append(f"[{'^' if negated else ''}{members}]")
            i = end
        else:
            out.append(re.escape(char))
        i += 1
    return re.compile("".join(out))


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches the whole canonical ``name``."""
    return pattern_regex(pattern).fullmatch(name) is not None


def glob_escape(name: str) -> str:
    """A pattern that matches exactly this name."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def repeat_pattern(name: str) -> tuple[str, tuple[int, ...]]:
    """Numeric segments replaced by ``*``, and the numbers: ``h.3.mlp.w`` -> (``h.*.mlp.w``, (3,)).

    Names with one pattern are the same place in repeated blocks.
    """
    numbers = tuple(int(part) for part in name.split(".") if part.isdecimal())
    return ".".join("*" if part.isdecimal() else part for part in name.split(".")), numbers


def shared_patterns(names: Iterable[str]) -> dict[str, list[str]]:
    """Glob -> the names it stands for: names that differ in numeric segments only share one pattern.

    A number that is the same in all of them stays: ``h.0.mlp.2.w``, ``h.1.mlp.2.w`` -> ``h.*.mlp.2.w``. A pattern
    may match further names; whoever uses it for one decision must check that.
    """
    buckets: dict[str, list[str]] = {}
    for name in names:
        buckets.setdefault(repeat_pattern(name)[0], []).append(name)
    shared: dict[str, list[str]] = {}
    for members in buckets.values():
        columns = zip(*(name.split(".") for name in members), strict=True)
        pattern = ".".join(glob_escape(column[0]) if len(set(column)) == 1 else "*" for column in columns)
        shared[pattern] = members
    return shared


# ---------------------------------------------------------------- many names in one word, without loss

_RANGES = re.compile(r"\{\d+(\.\.\d+)?(,\d+(\.\.\d+)?)*\}")


def fold_ranges(names: Iterable[str]) -> list[str]:
    """Names that differ in numbered segments as few words, as a shell would expand them: ``h.0.w``, ``h.1.w``,
    ``h.5.w`` -> ``h.{0..1,5}.w``. :func:`expand_ranges` gives back exactly these names.
    """
    Segment = str | tuple[int, ...]
    shapes: dict[int, set[tuple[Segment, ...]]] = {}
    for name in names:
        parts: tuple[Segment, ...] = tuple(f"\\{part}" if part[:1] in ("{", "\\") else part for part in name.split("."))
        shapes.setdefault(len(parts), set()).add(parts)
    words = []
    for length, found in shapes.items():
        for at in range(length):
            merged: dict[tuple[Segment, ...], set[int]] = {}
            kept: set[tuple[Segment, ...]] = set()
            for known in found:
                part = known[at]
                if isinstance(part, str) and part.isascii() and part.isdecimal() and str(int(part)) == part:
                    merged.setdefault((*known[:at], *known[at + 1 :]), set()).add(int(part))
                else:
                    kept.add(known)
            for rest, numbers in merged.items():
                segment: Segment = tuple(sorted(numbers)) if len(numbers) > 1 else str(min(numbers))
                kept.add((*rest[:at], segment, *rest[at:]))
            found = kept
        words += [".".join(p if isinstance(p, str) else _write_ranges(p) for p in parts) for parts in found]
    return sorted(words)


def expand_ranges(word: str, *, limit: int = 1_000_000) -> list[str]:
    """The names that a word of :func:`fold_ranges` stands for.

    Raises:
        ValueError: more than ``limit`` names, or a range that runs backwards.
    """
    names = [""]
    for number, part in enumerate(_split_segments(word)):
        choices = _read_ranges(part, limit) if _RANGES.fullmatch(part) else [part.removeprefix("\\")]
        if len(names) * len(choices) > limit:
            raise ValueError(f"'{word}' stands for more than {limit} names")
        names = [f"{name}{'.' if number else ''}{choice}" for name in names for choice in choices]
    return names


def _split_segments(word: str) -> list[str]:
    """Segments between dots; the two dots of a range are none of them."""
    parts, start, i = [], 0, 0
    while i < len(word):
        if i == start and (match := _RANGES.match(word, i)) and word[match.end() : match.end() + 1] in ("", "."):
            i = match.end()
        elif word[i] == ".":
            parts.append(word[start:i])
            start = i = i + 1
        else:
            i += 1
    return [*parts, word[start:]]


def _write_ranges(numbers: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"


def _read_ranges(part: str, limit: int) -> list[str]:
    numbers: list[str] = []
    for run in part[1:-1].split(","):
        first, _, last = run.partition("..")
        if len(run) > 40 or (last and not 0 <= int(last) - int(first) < limit):
            raise ValueError(f"'{part}' is no range of at most {limit} numbers")
        numbers += [str(n) for n in range(int(first), int(last or first) + 1)]
    return numbers
