"""``memadvise report``: a scan file as it was printed when it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memadvise.cli import common


def report(
    scan: Annotated[Path, typer.Argument(metavar="[SCAN]", help="A scan file.")] = Path("memadvise.scan.json"),
    output: common.ResultFile = None,
    force: common.Force = False,
    format: common.FormatOption = common.Format.text,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """Print the report of a scan file again; nothing is traced and no target is run."""
    common.configure(format=format, quiet=quiet, verbose=verbose, no_progress=no_progress)
    from memadvise.ledger import load_scan, to_json
    from memadvise.report.text import render_scan, scan_renderables

    found = load_scan(scan)
    if format is common.Format.json:
        common.deliver(to_json(found), output, force=force)
    elif output is not None:
        common.deliver(render_scan(found), output, force=force)
    else:
        common.print_renderables(scan_renderables(found))
