"""What fits a budget, as text: one row for every way to run the step."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from memadvise.report.draw import Bar, heading, table
from memadvise.report.text import source_words
from memadvise.sizing import Fit, FitRow
from memadvise.units import format_bytes


def _how(fit: Fit) -> str:
    ledgers = [row.ledger for row in (*fit.rows, *fit.sequences) if row.ledger is not None]
    return ", ".join(dict.fromkeys(source_words(ledger) for ledger in ledgers)) or "traced, not run"


def fit_renderables(fit: Fit, *, budget: str) -> list[RenderableType]:
    """The parts of the report, the answer first; ``budget`` is the budget in the user's own words."""
    best = max((row for row in fit.rows if row.size is not None), key=lambda row: row.size or 0, default=None)
    same = budget.isdigit() and int(budget) == fit.budget_bytes
    limit = f"{'' if same else f'{budget} = '}{format_bytes(fit.budget_bytes)}"
    answer = f"a micro-batch of up to {best.size} ({best.name})" if best is not None else "no micro-batch at all"
    parts: list[RenderableType] = [Text(f"{fit.target}: {answer} fits {limit}; {fit.device}, {_how(fit)}", "bold")]
    length = f", sequences of {fit.seq_len}" if fit.seq_len else ""
    parts += [heading(f"Largest micro-batch{length}"), _table("micro-batch", fit.rows, fit.budget_bytes)]
    if fit.sequences:
        title = f"Longest sequence, a micro-batch of {fit.batch_size}"
        parts += [heading(title), _table("sequence", fit.sequences, fit.budget_bytes)]
    parts += _list("How to run so", [f"{row.name}: {row.how}" for row in fit.rows if row.how and row.ledger])
    parts += _list("Not open, or no further", [f"{row.name}: {row.problem}" for row in fit.rows if row.problem])
    beyond = [f"{row.name}: {row.problem}" for row in fit.sequences if row.problem]
    parts += _list("Of the sequences", beyond)
    parts += _list("Assumptions behind these numbers", fit.assumptions)
    parts += _list("Warnings", fit.warnings)
    return parts


def _table(what: str, rows: Sequence[FitRow], budget: int) -> RenderableType:
    cells: list[Sequence[str | RenderableType]] = []
    most = max((row.size or 0 for row in rows), default=0) or 1
    for row in rows:
        if row.ledger is None:
            cells.append((row.name, "-", "-", "-", "-", "-", "-", ""))
            continue
        size = "none" if row.size is None else f"{row.size}{' (limit)' if row.at_limit else ''}"
        above = "-" if row.next_peak_bytes is None else f"{format_bytes(row.next_peak_bytes - budget)} over"
        cells.append(
            (
                row.name, size, format_bytes(row.ledger.peak_bytes), row.ledger.peak_phase,
                format_bytes(budget - row.ledger.peak_bytes), above, format_bytes(row.ledger.needed_bytes),
                Bar(row.size or 0, most, width=16),
            )
        )  # fmt: skip
    columns = {
        "step": "name", what: "number", "peak": "number", "phase": "text", "margin": "number", "one more": "number",
        "device needs": "number", " ": "bar",
    }  # fmt: skip
    return table(columns, cells, optional=("device needs", "one more", " "))


def _list(title: str, lines: Sequence[str]) -> list[RenderableType]:
    return [heading(title), *(Padding(Text(f"- {line}"), (0, 0, 0, 1)) for line in lines)] if lines else []
