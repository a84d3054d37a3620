"""Write a plan as YAML that people can read and edit: reasons beside the rules, keys always in the same order."""

from __future__ import annotations

import hashlib
import math
import re
import textwrap
from pathlib import Path
from typing import Any

import memadvise
from memadvise.plan.load import resolve
from memadvise.plan.schema import Plan, Rule
from memadvise.units import format_bytes

_DIGEST = "# memadvise-digest: "
_WIDTH = 100
_BARE_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
# Words that YAML 1.1 readers, editors among them, turn into something else than text.
_RESERVED = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def emit_plan(plan: Plan, *, command: str | None = None, budget: str | None = None) -> str:
    """The plan as commented YAML; :func:`memadvise.plan.load.parse_plan` gives an equal plan back.

    Tuples among the options come back as lists. The last line is a digest of all above it, see :func:`is_unedited`.

    Args:
        plan: what to write; notes and reasons become comments.
        command: the command line that makes this file again.
        budget: the budget in the user's own words, such as ``12GB``.

    Raises:
        ValueError: an option that YAML cannot hold (not finite, or an object), or one called 'match', 'method' or
            'lr_factor'.
    """
    lines = _comment(f"A memadvise plan, written by memadvise {memadvise.__version__}")
    if command:
        lines += _comment(f"Make it again: {command}", wrap=False)
    if plan.budget_bytes is not None:
        given = f"{budget} = " if budget and budget != str(plan.budget_bytes) else ""
        lines += _comment(f"Budget: {given}{format_bytes(plan.budget_bytes)} for the peak of one training step")
    for note in plan.notes:
        lines += _comment(note)
    lines += ["", f"version: {plan.version}"]
    for key in ("budget_bytes", "predicted_peak_bytes", "predicted_state_bytes"):
        size = getattr(plan, key)
        if size is not None:
            lines.append(f"{key}: {size}  # {format_bytes(size)}")
    if plan.device is not None:
        lines.append(f"device: {_scalar(plan.device)}")
    lines += ["", "switches:", f"  micro_batches: {plan.switches.micro_batches}"]
    lines.append(f"  checkpoint: {_value(list(plan.switches.checkpoint))}")
    lines += ["  gradient_release: true  # step inside backward"] if plan.switches.gradient_release else []
    lines += [f"  weights: {_scalar(plan.switches.weights)}"] if plan.switches.weights else []
    lines += [
        "",
        "# The first rule that matches a parameter decides. * stands for one dotted segment, ** for any number.",
        "rules:",
    ]
    for rule in plan.rules:
        lines += _rule(rule)
    if plan.model is not None:
        lines += ["", "# The model this plan was made for; numbers in names are written *.", "model:"]
        lines.append(f"  fingerprint: {_scalar(plan.model.fingerprint)}")
        lines.append(f"  num_parameters: {plan.model.num_parameters}")
        lines.append("  shapes:" if plan.model.shapes else "  shapes: {}")
        lines += [f"    {_quoted(name)}: {_value(list(shape))}" for name, shape in plan.model.shapes.items()]
    body = "\n".join(line.rstrip() for line in lines) + "\n"
    return f"{body}{_DIGEST}{_digest(body)}\n"


def is_unedited(path: str | Path) -> bool:
    """Whether ``path`` is a plan as memadvise wrote it: it ends with the digest of all above.

    Line ends may differ, as a checkout on another system changes them.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")  # universal newlines
    except (OSError, UnicodeDecodeError):
        return False
    body, mark, digest = text.rpartition(_DIGEST)
    return bool(mark) and (not body or body.endswith("\n")) and digest.removesuffix("\n") == _digest(body)


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _rule(rule: Rule) -> list[str]:
    clash = {"match", "method", "lr_factor"} & set(rule.options)
    if clash:
        raise ValueError(f"rule '{rule.match}': an option cannot be called {clash.pop()!r}")
    lines = _comment(rule.reason, indent="  ") if rule.reason else []
    lines += [f"  - match: {_quoted(rule.match)}", f"    method: {_scalar(rule.method)}"]
    lines += [f"    lr_factor: {_scalar(rule.lr_factor)}"] if rule.lr_factor != 1 else []
    return lines + [f"    {_scalar(key)}: {_value(value)}" for key, value in rule.options.items()]


def _comment(text: str, *, indent: str = "", wrap: bool = True) -> list[str]:
    """Comment lines; characters that would end a comment or are not printable are shown escaped."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        safe = "".join(char if char.isprintable() else _escape(char) for char in paragraph)
        width = _WIDTH - len(indent) - 2
        # break_long_words would cut parameter names, which people copy.
        wrapped = textwrap.wrap(safe, width, break_long_words=False, break_on_hyphens=False) if wrap else [safe]
        lines += [f"{indent}# {line}".rstrip() for line in wrapped or [""]]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a plan cannot hold the number {value}")
        mantissa, e, exponent = repr(value).partition("e")
        # With a point and a signed exponent, readers of YAML 1.1 see a number too.
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}{e}{exponent}"
    if isinstance(value, str):
        bare = _BARE_WORD.fullmatch(value) and value.lower() not in _RESERVED and resolve(value) == value
        return value if bare else _quoted(value)
    raise ValueError(f"a plan cannot hold a value of type {type(value).__name__}: {value!r}")


def _quoted(text: str) -> str:
    out = []
    for char in text:
        if char in '"\\':
            out.append(f"\\{char}")
        else:
            out.append(char if char.isprintable() else _escape(char))
    return f'"{"".join(out)}"'


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
