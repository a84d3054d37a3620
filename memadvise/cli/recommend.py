"""``memadvise recommend``: from a scan and a budget to a plan."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memadvise.cli import common
from memadvise.errors import PlanError, UsageError
from memadvise.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from memadvise.plan.schema import Setting

_PIN = re.compile(r"(?P<pattern>.+?)=(?P<method>[A-Za-z_]\w*)(\((?P<options>.*)\))?", re.DOTALL)
_PIN_HINT = "write PATTERN=METHOD, for example --pin 'lm_head.*=adamw' or --pin 'h.*.mlp.*=slimadam(axes=[1])'"


def recommend(
    budget: Annotated[
        str,
        typer.Option(
            "--budget", metavar="SIZE", help="12GB (12*10^9), 12GiB (12*2^30), or 'device' for what the GPU has free."
        ),
    ],
    scan: Annotated[Path, typer.Option("--scan", metavar="FILE", help="The scan file of memadvise scan.")] = Path(
        "memadvise.scan.json"
    ),
    output: common.Output = Path("memadvise.yaml"),
    reserve: Annotated[
        str,
        typer.Option(
            "--reserve",
            metavar="SIZE",
            help="Held back from the budget, for the CUDA context and fragmentation: 1GiB, 8%.",
        ),
    ] = "0",
    pin: Annotated[
        list[str] | None,
        typer.Option("--pin", metavar="PATTERN=METHOD", help="Decide for these parameters yourself; repeatable."),
    ] = None,
    forbid: Annotated[
        list[str] | None, typer.Option("--forbid", metavar="METHOD", help="Never choose this method; repeatable.")
    ] = None,
    force: common.Force = False,
    format: common.FormatOption = common.Format.text,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """Write the least harmful plan that fits a budget."""
    common.configure(format=format, quiet=quiet, verbose=verbose, no_progress=no_progress)
    total = _budget(budget)
    held = _reserve(reserve, total)
    limit = total - held
    pins = [parse_pin(text) for text in pin or ()]

    from memadvise.plan.emit import emit_plan, is_unedited

    kind = "a plan as memadvise wrote it (you may have edited it)"
    common.check_writable(output, force=force, ours=is_unedited, kind=kind)

    from memadvise.ledger import load_scan, write_whole

    scanned = load_scan(scan)

    from memadvise.advise.recommend import recommend as solve
    from memadvise.scan import plan_tracer

    with common.interruptible(), common.show_progress() as progress:
        progress("loading the target", 0, 1)
        trace, warnings = plan_tracer(scanned)
        for warning in warnings:
            common.note(f"warning: {warning}")
        progress("choosing, and tracing the plan", 0, 1)
        result = solve(scanned, limit, trace=trace, pins=pins, forbidden=tuple(forbid or ()))

    words = _words(budget, total, reserve, held)
    command = _command(budget, scan, output, reserve, pin or [], forbid or [])
    write_whole(output, emit_plan(result.plan, command=command, budget=words))
    if format is common.Format.json:
        common.print_result(common.to_json(_document(result, budget, total, held)))
    else:
        from memadvise.report.text import recommendation_renderables

        common.print_renderables(recommendation_renderables(result, budget=words))
    common.note(f"\nWrote {output}")
    common.note(f'next: optimizer = memadvise.create_optimizer(model, "{output}", lr=...)')


def _budget(text: str) -> int:
    if text.strip().lower() == "device":
        from memadvise.memory.device import device_free_bytes

        return device_free_bytes()
    if text.strip().startswith("-"):
        raise UsageError(f"a budget cannot be negative: '{text}'", hint="give at least one byte, for example 12GB")
    return parse_bytes(text)


def _reserve(text: str, total: int) -> int:
    """Bytes held back: a size, or a share of the budget such as ``8%``; ``0`` is none."""
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if share:
        held = round(total * float(share.group(1)) / 100)
    else:
        held = 0 if re.fullmatch(r"\s*0+(\.0+)?\s*[A-Za-z]*\s*", text) else parse_bytes(text)
    if held >= total:
        raise UsageError(
            f"the reserve of {format_bytes(held)} leaves nothing of the budget of {format_bytes(total)}",
            hint="give a smaller --reserve, for example 5%",
        )
    return held


def parse_pin(text: str) -> tuple[str, Setting]:
    """``PATTERN=METHOD`` or ``PATTERN=METHOD(option=value, ...)``, values as in a plan.

    Raises:
        UsageError: not of that form. Whether the method and its options exist is checked by the advisor.
    """
    from memadvise.plan.load import parse_plan
    from memadvise.plan.schema import Setting

    match = _PIN.fullmatch(text)
    if match is None or text.count("(") != text.count(")"):
        raise UsageError(f"--pin '{text}' cannot be read", hint=_PIN_HINT)
    options: dict[str, Any] = {}
    if match["options"]:
        pairs = re.sub(r"(\w+)\s*=", r"\1: ", match["options"])
        try:
            rule = parse_plan(f'version: 1\nrules:\n  - {{match: "**", method: x, {pairs}}}\n').rules[0]
        except PlanError as error:
            raise UsageError(f"--pin '{text}': {error.problems[0].message}", hint=_PIN_HINT) from error
        if rule.lr_factor != 1:
            raise UsageError(f"--pin '{text}': a pin has no lr_factor", hint="write it into the plan, below its method")
        options = rule.options
    return match["pattern"], Setting(match["method"], options)


def _words(budget: str, total: int, reserve: str, held: int) -> str:
    words = f"device ({format_bytes(total)} free)" if budget.strip().lower() == "device" else budget.strip()
    return f"{words} less a reserve of {reserve.strip()}" if held else words


def _command(budget: str, scan: Path, output: Path, reserve: str, pins: list[str], forbid: list[str]) -> str:
    """The command line that makes the same plan again."""
    words = ["memadvise", "recommend", "--budget", budget, "--scan", str(scan), "-o", str(output)]
    words += ["--reserve", reserve] if reserve != "0" else []
    for flag, values in (("--pin", pins), ("--forbid", forbid)):
        for value in values:
            words += [flag, value]
    return shlex.join(words)


def _document(result: Any, budget: str, total: int, held: int) -> dict[str, Any]:
    """The JSON of a recommendation: its own fields, the plan without places in files, and the budget as given."""
    plan = replace(result.plan, rules=tuple(replace(rule, marks={}) for rule in result.plan.rules), marks={})
    document: dict[str, Any] = common.plain(replace(result, plan=plan))
    for place in (document["plan"], *document["plan"]["rules"]):
        del place["marks"]
    return {"budget": budget, "total_budget_bytes": total, "reserve_bytes": held, **document}
