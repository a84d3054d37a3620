"""``memadvise compare-ledgers``: two ledgers side by side, the largest differences first."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memadvise.cli import common
from memadvise.errors import UsageError

if TYPE_CHECKING:
    from memadvise.ledger import MemoryLedger, Scan

WHICH = ("estimate", "measured", "compiled")


class ComparisonFormat(StrEnum):
    """How a comparison is printed."""

    text = "text"
    json = "json"
    markdown = "markdown"


def compare_ledgers(
    before: Annotated[
        str,
        typer.Argument(metavar="A", help="A scan file; FILE:measured, FILE:compiled or FILE:2 is a ledger in it."),
    ],
    after: Annotated[
        str | None, typer.Argument(metavar="B", help="Another one. Without it: A's estimate beside its measurement.")
    ] = None,
    fail_above: Annotated[
        str | None,
        typer.Option("--fail-above", metavar="PERCENT", help="Exit 1 when the peaks differ by more, such as 1%."),
    ] = None,
    format: Annotated[
        ComparisonFormat, typer.Option("--format", help="text, json or markdown.")
    ] = ComparisonFormat.text,
    output: common.ResultFile = None,
    force: common.Force = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """Lay two ledgers side by side: peak, phases, categories, modules, the largest differences first."""
    json_wanted = format is ComparisonFormat.json
    shown = common.Format.json if json_wanted else common.Format.text
    common.configure(format=shown, quiet=quiet, verbose=verbose, no_progress=no_progress)
    limit = _percent(fail_above) if fail_above is not None else None

    from memadvise.compare import compare
    from memadvise.report.compare import compare_markdown, compare_renderables, headline

    labels, (first, second) = _both(before, after)
    diff = compare(first, second)
    if json_wanted:
        common.deliver(
            common.to_json({"before": labels[0], "after": labels[1], **common.plain(diff)}), output, force=force
        )
    elif format is ComparisonFormat.markdown:
        common.deliver(compare_markdown(diff, labels), output, force=force)
    elif output is not None:
        from memadvise.report.draw import render_text

        common.deliver(render_text(compare_renderables(diff, labels)), output, force=force)
    else:
        common.print_renderables(compare_renderables(diff, labels))
    if limit is not None and (diff.peak.change is None or abs(diff.peak.change) > limit):
        common.note(f"the peaks differ by more than {fail_above}: {headline(diff, labels)}")
        raise typer.Exit(1)


def _percent(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%?\s*", text)
    if match is None:
        raise UsageError(f"--fail-above {text}: not a percentage", hint="for example --fail-above 1%")
    return float(match.group(1)) / 100


def _both(before: str, after: str | None) -> tuple[tuple[str, str], tuple[MemoryLedger, MemoryLedger]]:
    """The labels and the ledgers of the two arguments."""
    first, which = _read(before)
    if after is None:
        if which is not None:
            raise UsageError(
                f"{before} names one ledger; another one is needed beside it",
                hint="give a second FILE[:LEDGER], or the file alone for its estimate beside its measurement",
            )
        return ("estimate", "measured"), (_ledger(first, "estimate", before), _ledger(first, "measured", before))
    second, other = _read(after)
    ledgers = _ledger(first, which or "estimate", before), _ledger(second, other or "estimate", after)
    return (before, after), ledgers


def _read(argument: str) -> tuple[Scan, str | None]:
    """The scan file of ``FILE`` or ``FILE:LEDGER``, and the ledger's name."""
    from memadvise.ledger import load_scan

    path, _, which = argument.rpartition(":")
    if path and (which in WHICH or which.isdecimal()) and not Path(argument).exists():
        return load_scan(path), which
    return load_scan(argument), None


def _ledger(scan: Scan, which: str, argument: str) -> MemoryLedger:
    if which.isdecimal():
        if not 1 <= int(which) <= len(scan.memory):
            raise UsageError(
                f"{argument}: there are {len(scan.memory)} traced ledgers, counted from 1",
                hint="the first is the target as it stands, the others are its what-ifs",
            )
        return scan.memory[int(which) - 1]
    found = {"estimate": scan.memory[0], "measured": scan.measured, "compiled": scan.compiled}[which]
    if found is None:
        flag = "--measure" if which == "measured" else "--compile"
        raise UsageError(
            f"{argument.removesuffix(f':{which}')} holds no {which} ledger",
            hint=f"write one with: memadvise scan {scan.target} {flag}",
        )
    return found
