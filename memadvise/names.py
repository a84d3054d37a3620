"""Canonical dotted names and the patterns that match them."""

from __future__ import annotations

import re
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

    Parameters with one pattern, shape and role are one decision of the advisor.
    """
    numbers = tuple(int(part) for part in name.split(".") if part.isdigit())
    return ".".join("*" if part.isdigit() else part for part in name.split(".")), numbers
