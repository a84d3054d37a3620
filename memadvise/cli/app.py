"""The command line: one Typer app, and the one place where exceptions become exit codes.

0 ok, 1 finding (no plan fits, a regression), 2 usage, configuration or input, 3 environment or internal, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

import memadvise
from memadvise.cli import common
from memadvise.cli.check import check
from memadvise.cli.compare_ledgers import compare_ledgers
from memadvise.cli.env import env
from memadvise.cli.fit import fit
from memadvise.cli.init import init
from memadvise.cli.optimizers import optimizers
from memadvise.cli.recommend import recommend
from memadvise.cli.report import report
from memadvise.cli.scan import scan
from memadvise.cli.verify import verify
from memadvise.errors import MemadviseError, PlanError

app = typer.Typer(
    name="memadvise",
    help="Where the bytes of a training step go, and the least harmful way to make them fit.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # exceptions are turned into sentences below
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (scan, report, recommend, fit, verify, check, compare_ledgers, optimizers, env, init):
    app.command()(command)

# Typer brings Click's exceptions under changing module names; the base of its own is always the right one.
_CLICK_ERRORS: type[Exception] = next(
    base
    for base in typer.BadParameter.__mro__
    if base.__name__ == "ClickException"  # type: ignore[misc]
)


def _version(value: bool) -> None:
    if value:
        common.print_result(f"memadvise {memadvise.__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Where the bytes of a training step go, and the least harmful way to make them fit."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    # Before torch is imported: OpenMP threads that wait by spinning slow a probe many times over on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    common.state.own_process = True
    try:
        sys.exit(run(args))
    finally:
        common.state.own_process = False


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line on ``args`` (default: those of the process); the exit code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # not a text stream of a real file
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    common.configure()
    try:
        command = typer.main.get_command(app)
        code = command.main(args=args, prog_name="memadvise", standalone_mode=False)
        # Typer answers Ctrl-C inside a command with this code instead of an exception, depending on its version.
        return _interrupted() if code == 130 else code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except MemadviseError as error:
        return _expected(error)
    except _CLICK_ERRORS as error:
        return _usage(error)
    except (MemoryError, Exception) as error:
        return _unexpected(error)


def _interrupted() -> int:
    print(common.INTERRUPTED, end="", file=sys.stderr)
    return 130


def _expected(error: MemadviseError) -> int:
    if common.state.verbosity >= 2:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, PlanError):
        number = len(error.problems)
        print(f"{error}\nerror: {number} {'mistake' if number == 1 else 'mistakes'} in the plan", file=sys.stderr)
        return error.exit_code
    common.report_error(error)
    if error.exit_code == 1 and common.state.format is common.Format.json:
        # A finding is a result: whoever asked for JSON gets it as JSON.
        common.print_result(common.to_json({"finding": error.message, "hint": error.hint}))
    return error.exit_code


def _usage(error: Any) -> int:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
        return 2
    path = context.command_path if context is not None else "memadvise"
    message = str(error.format_message()).rstrip(".")
    print(f"error: {message[:1].lower()}{message[1:]}\n  hint: {path} --help", file=sys.stderr)
    return 2


def _unexpected(error: BaseException) -> int:
    verbose = common.state.verbosity >= 2
    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        print("error: out of memory", file=sys.stderr)
        print("  hint: a smaller batch, or --no-probe, which allocates no weights", file=sys.stderr)
        return 3
    message = " ".join(str(error).split())
    print(f"error: internal error: {type(error).__name__}{f': {message}' if message else ''}", file=sys.stderr)
    if not verbose:
        print(
            "  hint: run with -vv for the traceback, and report it with the output of: memadvise env", file=sys.stderr
        )
    return 3
