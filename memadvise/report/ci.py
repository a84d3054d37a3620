"""The verdicts of ``memadvise check`` for machines that watch a repository: JSON, Markdown, annotations, JUnit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from memadvise.check import FINDINGS, UNDECIDED, Result, Status, growth, words
from memadvise.report.check_text import (
    MOVE_COLUMNS,
    TOTAL_COLUMNS,
    move_rows,
    ordered,
    remarks,
    render_check,
    tally,
    total_rows,
)
from memadvise.report.escape import annotation, log_line, shortened, visible, xml
from memadvise.report.markdown import code, markdown_table
from memadvise.units import format_bytes

MAX_ANNOTATIONS = 5  # a workflow shows ten of a kind a step; the first few are what people read
MAX_MARKDOWN = 60_000  # characters; a comment holds 65,536, a step summary 1 MiB
DOCUMENT_VERSION = 1
MARKER = "<!-- memadvise check -->"  # by which a bot finds the comment that it made before
_TITLES = {
    Status.regression: "Memory regression",
    Status.over_budget: "Memory over budget",
    Status.stale: "Memory baseline is stale",
    Status.improved: "Memory baseline is stale",
    Status.not_comparable: "Memory baseline is not comparable",
    Status.missing: "No memory baseline",
    Status.error: "Memory check failed",
}
_MARKS = {Status.same: ":white_check_mark:", Status.updated: ":white_check_mark:", Status.new: ":new:"}


def document(results: Sequence[Result]) -> dict[str, Any]:
    """One JSON document; bytes are integers."""
    return {"schema_version": DOCUMENT_VERSION, "results": [_record(result) for result in results]}


def _record(result: Result) -> dict[str, Any]:
    entry, base = result.entry, result.base
    record: dict[str, Any] = {"title": result.title, "status": result.status.value, "headline": result.headline}
    if entry is not None:
        for name in ("target", "plan", "options", "batch", "source", "environment", "information"):
            record[name] = getattr(entry, name)
        for name in ("peak_bytes", "peak_phase", "state_bytes", "by_phase", "by_category"):
            record[name] = getattr(entry, name)
            record[f"baseline_{name}"] = getattr(base, name) if base is not None else None
    for name in ("delta_bytes", "tolerance_bytes", "budget_bytes", "over_budget_bytes"):
        record[name] = getattr(result, name)
    record["causes"] = [dataclasses.asdict(cause) for cause in result.causes]
    record["moves"] = [{**dataclasses.asdict(move), "delta_bytes": move.delta_bytes} for move in result.moves]
    record["renamed"] = [list(pair) for pair in result.renamed]
    for name in ("differing", "changed"):
        record[name] = {key: {"before": old, "now": new} for key, (old, new) in getattr(result, name).items()}
    if result.error is not None:
        where = str(result.error.where) if result.error.where is not None else None
        record["error"] = {"message": result.error.message, "where": where, "hint": result.error.hint}
    return record


# ---------------------------------------------------------------- Markdown


def markdown(results: Sequence[Result]) -> str:
    """A comment on a pull request: a table of the targets, and what moved for each finding, folded away."""
    chosen = ordered(results)
    rows, length = [], 0
    for result in chosen:
        row = _row(result)
        length += sum(map(len, row)) + 20
        if length > MAX_MARKDOWN // 2:
            break
        rows.append(row)
    columns = {"verdict": "markdown", "target": "name", "peak": "number", "change": "number", "cause": "markdown"}
    blocks = [f"{MARKER}\n### memadvise check: {tally(results)}\n", markdown_table(columns, rows)]
    if rest := len(chosen) - len(rows):
        blocks.append(f"\n{rest} more {'is' if rest == 1 else 'are'} not shown.")
    for result in chosen[: len(rows)]:
        if result.status in FINDINGS and result.moves:
            block = _details(result)
            length += len(block) + 1
            if length > MAX_MARKDOWN:
                break
            blocks.append(block)
    return "\n".join(blocks) + "\n"


def _row(result: Result) -> tuple[str, ...]:
    """Everything that comes from the model or the repository is set as code."""
    entry, base = result.entry, result.base
    peak = format_bytes(entry.peak_bytes) if entry is not None else "-"
    change = "-"
    if entry is not None and base is not None and result.status is not Status.not_comparable:
        change = growth(base.peak_bytes, entry.peak_bytes)
    mark = _MARKS.get(result.status, ":x:" if result.status in FINDINGS else ":warning:")
    said = "" if result.status is Status.same else code(shortened(result.headline))
    if result.causes:
        cause = result.causes[0]
        notes = ", ".join(code(shortened(note.replace("`", ""))) for note in (cause.detail, cause.where) if note)
        said = f"{words(cause.category)} of {code(shortened(cause.module))}{f' ({notes})' if notes else ''}"
    return f"{mark} {result.status}", shortened(result.title), peak, change, said


def _details(result: Result) -> str:
    parts = [
        f"\n<details><summary>What moved in <code>{xml(visible(shortened(result.title)))}</code></summary>\n",
        markdown_table(MOVE_COLUMNS, [tuple(map(shortened, row)) for row in move_rows(result)]),
        "",
        markdown_table(TOTAL_COLUMNS, total_rows(result)),
        "",
        *(f"- {code(shortened(line))}" for line in remarks(result)),
        "\n</details>",
    ]
    return "\n".join(parts)


# ---------------------------------------------------------------- annotations of a workflow


def github(results: Sequence[Result], *, folder: str | None = None) -> str:
    """The text report, none of whose lines is a command, and up to five annotations.

    Args:
        results: the verdicts.
        folder: the checkout's top folder (``GITHUB_WORKSPACE``), relative to which annotations name files.
    """
    lines = [log_line(line) for line in render_check(results).splitlines()]
    noted = [result for result in ordered(results) if result.status in _TITLES]
    for result in noted[:MAX_ANNOTATIONS]:
        file, line = _place(result, folder)
        level = "warning" if result.status is Status.improved else "error"
        message = f"{result.headline} [{result.title}]"
        lines.append(annotation(level, message, file=file, line=line, title=_TITLES[result.status]))
    return "\n".join(lines) + "\n"


def _place(result: Result, folder: str | None) -> tuple[str | None, int | None]:
    """The line that made what grew, else the target's own."""
    file, line = result.place or (None, None)
    where = result.causes[0].where if result.causes else None
    if result.error is not None and result.error.where is not None:
        file, line = result.error.where.path, result.error.where.line
    elif where is not None:
        file, _, number = where.rpartition(":")
        line = int(number)
    if file is not None:
        relative = os.path.relpath(os.path.realpath(file), os.path.realpath(folder or os.curdir))
        file = file if relative.startswith("..") else relative.replace(os.sep, "/")
    return file, line


# ---------------------------------------------------------------- JUnit


def junit(results: Sequence[Result]) -> str:
    """One test case an entry: a finding is a failure; what could not be compared, or broke, is an error."""
    failures = sum(result.status in FINDINGS for result in results)
    errors = sum(result.status in (*UNDECIDED, Status.error) for result in results)
    counts = f'tests="{len(results)}" failures="{failures}" errors="{errors}" skipped="0"'
    lines = ['<?xml version="1.0" encoding="utf-8"?>', f"<testsuites {counts}>"]
    lines.append(f'<testsuite name="memadvise" {counts}>')
    for result in results:
        name = result.entry.target if result.entry is not None else result.title
        case = f'<testcase classname="memadvise.check" name="{xml(result.title)}" file="{xml(name.partition(":")[0])}"'
        kind = "failure" if result.status in FINDINGS else "error"
        if result.status in (*FINDINGS, *UNDECIDED, Status.error):
            text = render_check([result])
            lines.append(f"{case}>")
            message = xml(result.headline)
            lines.append(f'<{kind} type="{xml(result.status.value)}" message="{message}">{xml(text)}</{kind}>')
            lines.append("</testcase>")
        else:
            lines.append(f"{case}><system-out>{xml(result.headline)}</system-out></testcase>")
    return "\n".join([*lines, "</testsuite>", "</testsuites>"]) + "\n"
