"""Markdown in which a name can be anything: nothing in it is read as markup."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from memadvise.report.escape import visible

_PLAIN = re.compile(r"[\w .,*()/\[\]{}+=:;%'-]*", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


def escape(text: str) -> str:
    """``text`` as itself, on one line: no markup, HTML, table cell, mention or link begins in it."""
    line = _CONTROL.sub(" ", text)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", line)
    return line.replace("@", "&#64;").replace("://", ":&#47;&#47;")


def code(text: str) -> str:
    """A name or a message as code on one line, fit for a cell of a table: a code span where plain, else ``<code>``
    with every special character as an entity. No mention, link or emoji is made of what stands in code.
    """
    text = visible(text)
    if text.strip() and _PLAIN.fullmatch(text):
        return f"`{text}`"
    return f"<code>{re.sub(r'[^A-Za-z0-9 ]', lambda match: f'&#{ord(match[0])};', text)}</code>"


def markdown_table(columns: Mapping[str, str], rows: Sequence[Sequence[str]]) -> str:
    """A table; ``columns`` maps titles to kinds as in :func:`memadvise.report.draw.table`: a "name" is set as code,
    and "markdown" is taken as it is.
    """
    kinds = list(columns.values())
    lines = [_line([escape(title) for title in columns])]
    lines.append(_line(["---:" if kind == "number" else "---" for kind in kinds]))
    for row in rows:
        lines.append(_line([_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True)]))
    return "\n".join(lines)


def _cell(text: str, kind: str) -> str:
    if kind in ("markdown", "number"):
        return text
    return code(text) if kind == "name" and text != "-" else escape(text)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
