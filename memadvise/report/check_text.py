"""The verdicts of ``memadvise check`` as text for people: the cause first, then what moved, then totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from memadvise.baseline import ordered_categories
from memadvise.check import FINDINGS, Result, Status, growth, signed, words
from memadvise.report.draw import WIDTH_OFF_TTY, render_text, table
from memadvise.report.escape import visible
from memadvise.units import format_bytes

MAX_MOVES = 12
MOVE_COLUMNS = {
    "module": "name", "modules": "number", "category": "text", "before": "number", "now": "number", "change": "number",
}  # fmt: skip
TOTAL_COLUMNS = {"at the peak": "text", "before": "number", "now": "number", "change": "number"}
_HINTS = {
    Status.missing: "add it with: memadvise check TARGET --update-baseline",
    Status.not_comparable: "make the baseline anew in this environment with --update-baseline, or use that one",
    Status.regression: "if the growth is meant: memadvise check TARGET --update-baseline",
    Status.stale: "--strict wants it up to date: memadvise check TARGET --update-baseline",
}
_STYLES = {Status.regression: "bold red", Status.over_budget: "bold red", Status.error: "bold red"}


def render_check(results: Sequence[Result], *, width: int = WIDTH_OFF_TTY) -> str:
    """All verdicts as plain text; tables are at most ``width`` wide."""
    return render_text(check_renderables(results), width=width)


def check_renderables(results: Sequence[Result]) -> list[RenderableType]:
    """All verdicts, findings first; the last line counts them."""
    parts: list[RenderableType] = []
    for result in ordered(results):
        parts += _result(result)
    if len(results) > 1:
        parts.append(Text(tally(results)))
    return parts


def ordered(results: Iterable[Result]) -> list[Result]:
    """The gravest first, and of those the largest growth; else as the targets were given."""
    rank = {status: number for number, status in enumerate(reversed(Status))}
    return sorted(results, key=lambda r: (rank[r.status], -(r.delta_bytes or 0) if r.status in FINDINGS else 0))


def tally(results: Sequence[Result]) -> str:
    """``4 targets: 1 regression, 3 same``."""
    counts = Counter(result.status for result in results)
    parts = ", ".join(f"{counts[status]} {status}" for status in reversed(Status) if counts[status])
    return f"{len(results)} {'target' if len(results) == 1 else 'targets'}: {parts}"


def _result(result: Result) -> list[RenderableType]:
    if result.status not in (*FINDINGS, Status.missing, Status.not_comparable, Status.error):
        return [_Line(f"{result.status}: {visible(result.title)}: {visible(result.headline)}")]
    parts: list[RenderableType] = [
        _Line(visible(result.headline), _STYLES.get(result.status, "bold")),
        _Line(f"{result.status} in {visible(result.title)}"),
    ]
    if result.moves and result.status in FINDINGS:
        parts += ["", table(MOVE_COLUMNS, move_rows(result), optional=("modules", "before", "now"))]
        parts += ["", table(TOTAL_COLUMNS, total_rows(result))]
    parts += [_Line(line) for line in remarks(result)]
    return [*parts, ""]


@dataclass(frozen=True)
class _Line:
    """A sentence that stays on one line however long it is, so that it can be searched for."""

    text: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text, self.style, no_wrap=True, overflow="ignore")


def move_rows(result: Result) -> list[tuple[str, ...]]:
    """Cells of :data:`MOVE_COLUMNS`, the largest change first."""
    rows: list[tuple[str, ...]] = [
        (
            visible(move.pattern), str(move.num_modules), words(move.category),
            format_bytes(move.before_bytes), format_bytes(move.after_bytes), signed(move.delta_bytes),
        )
        for move in result.moves[:MAX_MOVES]
    ]  # fmt: skip
    if rest := result.moves[MAX_MOVES:]:
        rows.append((f"({len(rest)} smaller)", "", "", "", "", signed(sum(move.delta_bytes for move in rest))))
    return rows


def total_rows(result: Result) -> list[tuple[str, ...]]:
    """Cells of :data:`TOTAL_COLUMNS`: categories at the peak, their sum, and the peak of every phase."""
    base, entry = result.base, result.entry
    assert base is not None
    assert entry is not None
    rows = [
        (words(name), base.by_category.get(name, 0), entry.by_category.get(name, 0))
        for name in ordered_categories([*base.by_category, *entry.by_category])
    ]
    rows.append(("peak allocated", base.peak_bytes, entry.peak_bytes))
    phases = dict.fromkeys([*base.by_phase, *entry.by_phase])
    rows += [(f"peak of the {p} phase", base.by_phase.get(p, 0), entry.by_phase.get(p, 0)) for p in phases]
    return [(what, format_bytes(a), format_bytes(b), growth(a, b) if a != b else "-") for what, a, b in rows]


def remarks(result: Result) -> list[str]:
    """What else is to be said, and the way out; one line each."""
    lines = []
    if result.status in FINDINGS and result.base is not None and result.entry is not None:
        before, now = result.base.peak_phase, result.entry.peak_phase
        if before != now:
            lines.append(f"the peak was in the {before} phase, now it is in the {now} phase")
    if result.over_budget_bytes and result.status is not Status.over_budget:
        assert result.budget_bytes is not None
        over, budget = format_bytes(result.over_budget_bytes), format_bytes(result.budget_bytes)
        lines.append(f"also {over} over the budget of {budget}")
    if result.status is Status.over_budget and result.differing:
        lines.append(f"not comparable with the baseline, which has another {', '.join(sorted(result.differing))}")
    if result.status in FINDINGS:
        for key, (before_value, now_value) in sorted(result.changed.items()):
            if key.endswith("_sha256"):
                lines.append(f"changed: the file of the {key.removesuffix('_sha256')}")
            else:
                lines.append(f"changed: {key}: {before_value} -> {now_value}")
        lines += [f"renamed: {old} -> {new}" for old, new in result.renamed]
        if result.tolerance_bytes:
            lines.append(f"tolerance: {format_bytes(result.tolerance_bytes)}")
    if hint := _HINTS.get(result.status):
        lines.append(f"hint: {hint}")
    return [visible(line) for line in lines]
