"""YAML text -> a small tree of nodes that know their place; nothing is given a type here.

PyYAML's own loaders lose what a strict reader needs: they keep the last of two equal keys, read ``1e-3`` as a string
and ``no`` as False. Only its event parser is used; which type a scalar has is decided by the field it is read for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from memadvise.errors import FileFormatError, Mark, MemadviseError, PlanError

MAX_DEPTH = 12
_STAR_HINT = 'a pattern that starts with * needs quotes, as in match: "*.weight"'


@dataclass(frozen=True)
class Node:
    """One YAML value. ``kind`` is "scalar", "list", "map" or "invalid" (already reported).

    ``plain`` is True for a scalar without quotes.
    """

    kind: str
    mark: Mark
    text: str = ""
    plain: bool = False
    items: tuple[Node, ...] = ()
    pairs: tuple[tuple[Node, Node], ...] = ()

    def describe(self) -> str:
        """What the user wrote, for 'expected an integer, found ...'."""
        if self.kind == "map":
            return "a mapping"
        if self.kind == "list":
            return "a list"
        if self.plain and self.text == "":
            return "nothing"
        shown = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        return f"'{shown}'" if self.plain else f"the string {shown!r}"


@dataclass
class Source:
    """The text of a plan and how to point into it."""

    text: str
    path: str
    problems: list[MemadviseError] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The line breaks of YAML 1.1, which PyYAML counts; str.splitlines() knows a few more.
        normal = self.text.replace("\r\n", "\n").replace("\r", "\n")
        for char in ("\x85", "\u2028", "\u2029"):
            normal = normal.replace(char, "\n")
        self.lines = normal.split("\n")

    def mark(self, line: int, column: int | None) -> Mark:
        """A place from PyYAML's zero-based line and column."""
        text = self.lines[line] if line < len(self.lines) else ""
        return Mark(self.path, line + 1, None if column is None else column + 1, text)

    def problem(self, message: str, where: Mark | None, hint: str | None = None) -> None:
        """Note one mistake; reading goes on, so that all of them are shown at once."""
        self.problems.append(FileFormatError(message, where=where, hint=hint))


def compose(source: Source) -> Node | None:
    """The one document of ``source``, None when it is empty. Aliases, anchors and tags are noted as problems.

    Raises:
        PlanError: the text is not YAML at all, nests too deeply, or holds several documents.
    """
    try:
        try:
            events: list[Any] = list(yaml.parse(source.text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        except yaml.YAMLError:
            # The C parser words its errors in its own way: the pure one decides, so that messages do not vary.
            events = list(yaml.parse(source.text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        _syntax_error(source, error)
        raise PlanError(source.problems) from error
    starts: list[Any] = [event.start_mark for event in events if isinstance(event, yaml.DocumentStartEvent)]
    if not starts:
        return None
    if len(starts) > 1:
        mark = source.mark(starts[1].line, starts[1].column)
        source.problem("a second YAML document starts here", mark, "a plan is one document: remove the '---' line")
        raise PlanError(source.problems)
    stream = iter(events[2:])
    return _build(source, next(stream), stream, 0)


def _build(source: Source, event: Any, stream: Iterator[Any], depth: int) -> Node:
    mark = source.mark(event.start_mark.line, event.start_mark.column)
    if depth > MAX_DEPTH:
        source.problem("the YAML nests too deeply for a plan", mark)
        raise PlanError(source.problems)
    if isinstance(event, yaml.AliasEvent):
        source.problem(f"YAML aliases (*{event.anchor}) are not used in plans", mark, _STAR_HINT)
        return Node("invalid", mark)
    if event.anchor is not None:
        source.problem(
            f"YAML anchors (&{event.anchor}) are not used in plans", mark, "write the value out, or put it in quotes"
        )
    if event.tag is not None:
        source.problem(
            f"YAML tags ({_short_tag(event.tag)}) are not used in plans",
            mark,
            "remove the tag, or put the value in quotes",
        )
    if isinstance(event, yaml.ScalarEvent):
        return Node("scalar", mark, event.value, plain=not event.style)
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(child := next(stream), yaml.SequenceEndEvent):
            items.append(_build(source, child, stream, depth + 1))
        return Node("list", mark, items=tuple(items))
    pairs = []
    while not isinstance(child := next(stream), yaml.MappingEndEvent):
        key = _build(source, child, stream, depth + 1)
        value = _build(source, next(stream), stream, depth + 1)
        if value.kind == "scalar" and value.plain and not value.text:
            value = replace(value, mark=key.mark)  # nothing is there to point at, and the two parsers disagree where
        pairs.append((key, value))
    return Node("map", mark, pairs=tuple(pairs))


def _short_tag(tag: str) -> str:
    prefix = "tag:yaml.org,2002:"
    return "!!" + tag[len(prefix) :] if tag.startswith(prefix) else tag


def _syntax_error(source: Source, error: yaml.YAMLError) -> None:
    """Translate PyYAML's words into what to change."""
    if isinstance(error, yaml.reader.ReaderError):
        line = source.text.count("\n", 0, error.position)
        column = error.position - (source.text.rfind("\n", 0, error.position) + 1)
        code = error.character if isinstance(error.character, int) else ord(error.character)
        source.problem(
            f"the character U+{code:04X} may not stand in a YAML file",
            Mark(source.path, line + 1, column + 1),
            "remove it",
        )
        return
    mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None) or error)
    if "'\\t'" in problem or "tab" in problem:
        for number, line_text in enumerate(source.lines):
            indent = line_text[: len(line_text) - len(line_text.lstrip(" \t"))]
            if "\t" in indent and line_text.strip():
                source.problem(
                    "a tab is used for indentation", source.mark(number, indent.index("\t")), "indent with spaces"
                )
        if source.problems:
            return
        problem = "a tab stands where YAML wants a space"
    hint = None
    where = source.mark(mark.line, mark.column) if mark is not None else None
    if "expected alphabetic or numeric character" in problem and "alias" in str(getattr(error, "context", "")):
        start = getattr(error, "context_mark", None) or mark
        where = source.mark(start.line, start.column) if start is not None else None
        problem, hint = "an unquoted * stands at the start of a value", _STAR_HINT
    elif "mapping values are not allowed here" in problem:
        hint = "check the indentation, and quote values that hold ': '"
    elif "expected <block end>" in problem or "could not find expected ':'" in problem:
        hint = "check the indentation here and on the line above; every key ends with ':'"
    elif "expected ',' or ']'" in problem or "expected ',' or '}'" in problem:
        hint = "a bracket is not closed"
    source.problem(f"this is not valid YAML: {problem}" if hint != _STAR_HINT else problem, where, hint)
