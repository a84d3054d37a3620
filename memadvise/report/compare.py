"""Two ledgers side by side, as text for people and as Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from memadvise.compare import Difference, LedgerDiff
from memadvise.report.draw import heading, table
from memadvise.report.markdown import code, markdown_table
from memadvise.units import format_bytes

_MODULE_ROWS, _TENSOR_ROWS = 16, 8
_Rows = list[tuple[str, ...]]


def headline(diff: LedgerDiff, labels: tuple[str, str]) -> str:
    """One sentence: both peaks and how they differ."""
    before, after = labels
    peak = diff.peak
    return (
        f"peak: {before} {format_bytes(peak.before_bytes)}, {after} {format_bytes(peak.after_bytes)} "
        f"({signed_bytes(peak.change_bytes)}, {signed_percent(peak)})"
    )


def compare_renderables(diff: LedgerDiff, labels: tuple[str, str]) -> list[RenderableType]:
    """The comparison as text; ``labels`` are the names of the two ledgers."""
    parts: list[RenderableType] = [Text(headline(diff, labels), "bold")]
    for title, columns, rows, note in _sections(diff, labels):
        parts.append(heading(title))
        if rows:
            parts.append(table(columns, rows))
        if note:
            parts.append(Text(f"  {note}", "dim"))
    return parts


def compare_markdown(diff: LedgerDiff, labels: tuple[str, str]) -> str:
    """The comparison as Markdown, names of modules escaped."""
    parts = [f"**{headline(diff, tuple(code(label) for label in labels))}**"]  # type: ignore[arg-type]
    for title, columns, rows, note in _sections(diff, labels):
        parts.append(f"### {title}")
        if rows:
            parts.append(markdown_table(columns, rows))
        if note:
            parts.append(note)
    return "\n\n".join(parts) + "\n"


def signed_bytes(size: int) -> str:
    """``+412.0 MiB``, ``-3 B``, ``0 B``."""
    return f"{'+' if size > 0 else ''}{format_bytes(size)}"


def signed_percent(row: Difference) -> str:
    """``+6.13 %``; ``new`` where there was nothing before, ``-`` where there is nothing at all."""
    if row.change is None:
        return "new" if row.after_bytes else "-"
    return f"{100 * row.change:+.2f} %"


_NUMBERS = {"change": "number", "relative": "number"}


def _sections(diff: LedgerDiff, labels: tuple[str, str]) -> list[tuple[str, dict[str, str], _Rows, str]]:
    """(title, columns, rows, note) of each table."""
    sides = dict.fromkeys(_distinct(labels), "number")
    sections: list[tuple[str, dict[str, str], _Rows, str]] = []
    if diff.settings:
        columns = {"setting": "text", **dict.fromkeys(_distinct(labels), "text")}
        sections.append(("What differs in the settings", columns, [(k, *v) for k, v in diff.settings.items()], ""))
    totals: _Rows = [(row.name, *_cells(row)) for row in (diff.peak, *diff.phases, diff.state)]
    sections.append(("Peak, by phase, and optimizer state", {"": "text", **sides, **_NUMBERS}, totals, ""))
    kinds: _Rows = [(row.name.replace("_", " "), *_cells(row)) for row in diff.categories]
    sections.append(("By category, at the peak", {"category": "text", **sides, **_NUMBERS}, kinds, ""))
    moved = [row for row in diff.modules if row.change_bytes]
    shown = moved[:_MODULE_ROWS]
    modules: _Rows = [(row.name, str(row.count), *_cells(row)) for row in shown]
    sections.append(
        (
            "By module, at the peak",
            {"module": "name", "modules": "number", **sides, **_NUMBERS},
            modules,
            _rest(len(moved) - len(shown), len(diff.modules) - len(moved)),
        )
    )
    if diff.tensors:
        tensors: _Rows = [
            (
                row.category.replace("_", " "), row.name or "-", " ".join(part for part in (row.op, row.dtype) if part),
                f"{row.before_count} / {row.after_count}", *_cells(row), row.where or "-",
            )
            for row in diff.tensors[:_TENSOR_ROWS]
        ]  # fmt: skip
        columns = {
            "category": "text", "module": "name", "made by": "text", "count": "number", **sides, **_NUMBERS,
            "line": "name",
        }  # fmt: skip
        note = _rest(len(diff.tensors) - len(tensors), 0)
        sections.append(("Tensors alive at the peak", columns, tensors, note))
    return sections


def _cells(row: Difference) -> tuple[str, str, str, str]:
    before, after = (format_bytes(size) if size else "-" for size in (row.before_bytes, row.after_bytes))
    return before, after, signed_bytes(row.change_bytes), signed_percent(row)


def _rest(more: int, equal: int) -> str:
    told = ([f"{more} more differ less"] if more else []) + ([f"{equal} are equal"] if equal else [])
    return ", ".join(told)


def _distinct(labels: Sequence[str]) -> tuple[str, str]:
    """The labels as titles of columns, which must differ."""
    before, after = labels
    return (before, after) if before != after else (f"{before} (first)", f"{after} (second)")
