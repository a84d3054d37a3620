"""Read a plan strictly: every mistake with file, line and column, all of them at once.

Only the structure is checked here. Which options a method has, and whether a rule matches a parameter, is checked by
:mod:`memadvise.optim` when the plan meets a model; the marks kept in each rule let it point at the same places.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from memadvise.errors import FileFormatError, Mark, PlanError, UsageError
from memadvise.names import pattern_regex
from memadvise.plan.nodes import Node, Source, compose
from memadvise.plan.schema import PLAN_VERSION, WEIGHT_FORMS, ModelShape, Plan, Rule, Switches

MAX_FILE_BYTES = 5_000_000
_WRITE_HINT = "write one with: memadvise recommend --budget 12GB"
_KEYS = (
    "version", "budget_bytes", "predicted_peak_bytes", "predicted_state_bytes", "device", "switches", "rules", "model",
)  # fmt: skip
_INTEGER = re.compile(r"[-+]?[0-9]{1,30}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    "null": None, "Null": None, "NULL": None, "~": None,
}  # fmt: skip

T = TypeVar("T")


def load_plan(path: str | Path) -> Plan:
    """Read the plan file ``path``.

    Raises:
        PlanError: mistakes in it, all at once. FileFormatError: missing, unreadable, too large, or not UTF-8.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise FileFormatError(
                f"{path} has {size:,} bytes; a plan has at most {MAX_FILE_BYTES:,}", hint=f"is it a plan? {_WRITE_HINT}"
            )
        data = path.read_bytes()
    except OSError as error:
        raise FileFormatError(f"cannot read the plan {path}: {error.strerror}", hint=_WRITE_HINT) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FileFormatError(
            f"not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}",
            where=Mark(str(path), line),
            hint="save the plan as UTF-8",
        ) from error
    return parse_plan(text, path=str(path))


def parse_plan(text: str, path: str = "<text>") -> Plan:
    """Read a plan from ``text``; ``path`` is the name shown in messages.

    Raises:
        PlanError: mistakes, all at once.
    """
    source = Source(text, path)
    root = compose(source)
    plan = None
    if root is None or (root.kind == "scalar" and root.plain and not root.text):
        source.problem("the plan is empty", Mark(path, 1, 1), _WRITE_HINT)
    elif root.kind != "map":
        source.problem(
            f"a plan is a mapping that starts with 'version: 1', found {root.describe()}", root.mark, _WRITE_HINT
        )
    else:
        plan = _plan(source, root)
    if source.problems or plan is None:
        raise PlanError(sorted(source.problems, key=_position))
    return plan


def resolve(text: str) -> Any:
    """The value of a plain scalar, close to YAML 1.2: ``1e-3`` is a float; ``no``, ``on`` and ``1_0`` are strings.

    Raises:
        ValueError: a number that is infinite, not a number, or has too many digits.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if text.lstrip("+-").isdigit() and text.isascii():
        raise ValueError("an integer of more than 30 digits")
    if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and abs(float(text)) == float("inf")):
        raise ValueError("not a finite number")
    return float(text) if _FLOAT.fullmatch(text) else text


def _position(problem: Any) -> tuple[int, int]:
    return (problem.where.line, problem.where.column or 0) if problem.where else (0, 0)


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint naming the closest of ``known``, None when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else None


# ---------------------------------------------------------------- the walker


def _plan(source: Source, root: Node) -> Plan | None:
    fields = _keys(source, root, "the plan")
    if "version" not in fields:
        hint = next((did_you_mean(key, ["version"]) for key in fields if did_you_mean(key, ["version"])), None)
        source.problem("the plan has no 'version'", root.mark, hint or f"its first line is: version: {PLAN_VERSION}")
    else:
        version = _integer(source, fields["version"], "version", minimum=1)
        if version is not None and version != PLAN_VERSION:
            written = re.search(r"^#.*written by (memadvise \S+)", source.text, re.MULTILINE)
            by = f", written by {written.group(1)}," if written else ""
            # The rest follows rules this version does not know: more messages would only mislead.
            source.problem(
                f"this plan{by} has version {version}; this memadvise reads version {PLAN_VERSION}",
                fields["version"].mark,
                "update memadvise, or make the plan again with memadvise recommend",
            )
            return None
    for key, node in fields.items():
        if key not in _KEYS:
            source.problem(f"unknown key '{key}' in the plan", _key_mark(root, key), did_you_mean(key, _KEYS))
        elif node.kind == "scalar" and node.plain and not node.text:
            source.problem(f"'{key}' has no value", node.mark, "give one, or remove the line")

    def read(key: str, reader: Callable[..., T | None], default: T, **limits: Any) -> T:
        node = fields.get(key)
        if node is None or _is_empty(node):
            return default
        value = reader(source, node, key, **limits)
        return default if value is None else value

    if "rules" not in fields:
        source.problem("the plan has no 'rules'", root.mark, 'for example: rules: [{match: "**", method: adamw}]')
    return Plan(
        rules=read("rules", _rules, ()),
        switches=read("switches", _switches, Switches()),
        model=read("model", _model, None),
        budget_bytes=read("budget_bytes", _integer, None, minimum=1),
        predicted_state_bytes=read("predicted_state_bytes", _integer, None, minimum=0),
        predicted_peak_bytes=read("predicted_peak_bytes", _integer, None, minimum=0),
        device=read("device", _string, None),
        path=source.path,
        marks={key: _key_mark(root, key) for key in fields if key in _KEYS},
    )


def _is_empty(node: Node) -> bool:
    return node.kind == "scalar" and node.plain and (not node.text or node.text in ("null", "Null", "NULL", "~"))


def _keys(source: Source, node: Node, where: str) -> dict[str, Node]:
    """The entries of a mapping; keys that are not strings, or come twice, are noted."""
    fields: dict[str, Node] = {}
    first: dict[str, Mark] = {}
    for key, value in node.pairs:
        if key.kind != "scalar":
            if key.kind != "invalid":
                source.problem(f"a key of {where} is {key.describe()}, not a word", key.mark)
        elif key.text in fields:
            source.problem(
                f"duplicate key '{key.text}' in {where}",
                key.mark,
                f"it stands first on line {first[key.text].line}: keep one",
            )
        else:
            fields[key.text], first[key.text] = value, key.mark
    return fields


def _key_mark(node: Node, name: str) -> Mark:
    return next(key.mark for key, _ in node.pairs if key.kind == "scalar" and key.text == name)


def _mapping(source: Source, node: Node, where: str, known: tuple[str, ...]) -> dict[str, Node] | None:
    if not _expect(source, node, "map", "a mapping", where):
        return None
    fields = _keys(source, node, where)
    for key in fields:
        if key not in known:
            source.problem(f"unknown key '{key}' in {where}", _key_mark(node, key), did_you_mean(key, known))
    return fields


def _expect(source: Source, node: Node, kind: str, words: str, where: str) -> bool:
    if node.kind == kind:
        return True
    if node.kind != "invalid":
        source.problem(f"{where} should be {words}, found {node.describe()}", node.mark)
    return False


def _integer(source: Source, node: Node, where: str, *, minimum: int) -> int | None:
    value: Any = None
    if node.kind == "scalar" and node.plain and _INTEGER.fullmatch(node.text):
        value = int(node.text)
        if value >= minimum:
            return value
    if node.kind != "invalid":
        hint = "write the number of bytes, without a unit" if where.endswith("_bytes") else None
        source.problem(f"{where} should be an integer of at least {minimum}, found {node.describe()}", node.mark, hint)
    return None


def _string(source: Source, node: Node, where: str) -> str | None:
    """A string whatever it looks like: the field decides, so ``device: no`` is the text 'no'."""
    return node.text if _expect(source, node, "scalar", "a string", where) else None


def _strings(source: Source, node: Node, where: str) -> tuple[str, ...] | None:
    if not _expect(source, node, "list", "a list", where):
        return None
    values = [_string(source, item, f"{where}[{i}]") for i, item in enumerate(node.items)]
    return tuple(value for value in values if value is not None)


def _boolean(source: Source, node: Node, where: str) -> bool | None:
    if node.kind == "scalar" and node.plain and isinstance(_WORDS.get(node.text), bool):
        return _WORDS[node.text]
    if node.kind != "invalid":
        source.problem(f"{where} should be true or false, found {node.describe()}", node.mark)
    return None


def _weight_form(source: Source, node: Node, where: str) -> str | None:
    text = None if _is_empty(node) else _string(source, node, where)
    if text is None or text in WEIGHT_FORMS:
        return text
    hint = did_you_mean(text, WEIGHT_FORMS) or "to change nothing, remove the line"
    source.problem(f"{where} '{text}' is none of {', '.join(WEIGHT_FORMS)}", node.mark, hint)
    return None


def _switches(source: Source, node: Node, where: str) -> Switches | None:
    fields = _mapping(source, node, where, ("micro_batches", "checkpoint", "gradient_release", "weights"))
    if fields is None:
        return None

    def read(key: str, reader: Callable[..., T | None], **limits: Any) -> T | None:
        return reader(source, fields[key], f"switches.{key}", **limits) if key in fields else None

    micro_batches, checkpoint = read("micro_batches", _integer, minimum=1), read("checkpoint", _strings)
    release, weights = read("gradient_release", _boolean), read("weights", _weight_form)
    try:
        return Switches(micro_batches or 1, checkpoint or (), release or False, weights)
    except UsageError as error:  # each value is in range: two of them exclude each other
        source.problem(error.message, _key_mark(node, "gradient_release"), error.hint)
        return None


def _model(source: Source, node: Node, where: str) -> ModelShape | None:
    fields = _mapping(source, node, where, ("fingerprint", "num_parameters", "shapes"))
    if fields is None:
        return None
    for key in ("fingerprint", "num_parameters"):
        if key not in fields:
            source.problem(f"{where} has no '{key}'", node.mark, "without it, remove the whole 'model' entry")
    fingerprint = _string(source, fields["fingerprint"], "model.fingerprint") if "fingerprint" in fields else None
    count = (
        _integer(source, fields["num_parameters"], "model.num_parameters", minimum=0)
        if "num_parameters" in fields
        else None
    )
    shapes: dict[str, tuple[int, ...]] = {}
    if "shapes" in fields and _expect(source, fields["shapes"], "map", "a mapping of names to shapes", "model.shapes"):
        for name, value in _keys(source, fields["shapes"], "model.shapes").items():
            if _expect(source, value, "list", "a list of sizes", f"the shape of '{name}'"):
                sizes = [_integer(source, item, f"a size of '{name}'", minimum=0) for item in value.items]
                shapes[name] = tuple(size for size in sizes if size is not None)
    return ModelShape(fingerprint or "", count or 0, shapes)


def _rules(source: Source, node: Node, where: str) -> tuple[Rule, ...] | None:
    if not _expect(source, node, "list", "a list of rules", where):
        return None
    if not node.items:
        source.problem("'rules' is empty", node.mark, 'for example: - {match: "**", method: adamw}')
    rules = [_rule(source, item, f"rules[{i}]") for i, item in enumerate(node.items)]
    return tuple(rule for rule in rules if rule is not None)


def _rule(source: Source, node: Node, where: str) -> Rule | None:
    if not _expect(source, node, "map", "a mapping with 'match' and 'method'", where):
        return None
    fields = _keys(source, node, where)
    marks: dict[str, Mark] = {}
    required: dict[str, str] = {}
    for name in ("match", "method"):
        if name not in fields:
            likely = [key for key in fields if key not in ("match", "method") and did_you_mean(key, [name])]
            if likely:
                source.problem(
                    f"unknown key '{likely[0]}' in {where}", _key_mark(node, likely[0]), f"did you mean '{name}'?"
                )
                del fields[likely[0]]
            else:
                source.problem(f"{where} has no '{name}'", node.mark, "every rule has 'match' and 'method'")
            continue
        value = fields.pop(name)
        marks[name] = value.mark
        text = _string(source, value, f"'{name}' of {where}")
        if text == "":
            source.problem(f"'{name}' of {where} is empty", value.mark)
        elif text is not None and name == "match":
            _check_pattern(source, text, value.mark)
        required[name] = text or ""
    factor = 1.0
    if "lr_factor" in fields:
        value = fields.pop("lr_factor")
        marks["lr_factor"] = value.mark
        factor = _factor(source, value, f"'lr_factor' of {where}")
    options: dict[str, Any] = {}
    for key, value in fields.items():
        marks[key] = value.mark
        options[key] = _option(source, value, f"option '{key}' of {where}")
    return Rule(required.get("match", ""), required.get("method", ""), options, marks=marks, lr_factor=factor)


def _factor(source: Source, node: Node, where: str) -> float:
    """A positive number; 1 where it is none, which is then noted."""
    value: Any = None
    if node.kind == "scalar" and node.plain:
        with contextlib.suppress(ValueError):
            value = resolve(node.text)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    if node.kind != "invalid":
        hint = "it multiplies the learning rate of create_optimizer: 10 for apollo, 0.1 for lion, for example"
        source.problem(f"{where} should be a finite number above 0, found {node.describe()}", node.mark, hint)
    return 1.0


def _check_pattern(source: Source, pattern: str, mark: Mark) -> None:
    try:
        pattern_regex(pattern)
    except re.error as error:
        kind = "regular expression" if pattern.startswith("re:") else "pattern"
        source.problem(f"'{pattern}' is not a {kind}: {error.msg}", mark)


def _option(source: Source, node: Node, where: str) -> Any:
    """An option's value: a scalar, or a list of values; lists nest (``segments`` of adam_mini are lists of lists)."""
    if node.kind == "list":
        return [_option(source, item, f"{where}[{i}]") for i, item in enumerate(node.items)]
    if not _expect(source, node, "scalar", "a scalar or a list", where):
        return None
    if not node.plain:
        return node.text
    if not node.text:
        source.problem(f"{where} has no value", node.mark, "give one, or remove the key")
        return None
    try:
        return resolve(node.text)
    except ValueError as error:
        source.problem(f"{where} is {error}: {node.text[:60]}", node.mark)
        return None
