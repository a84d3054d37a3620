"""``memadvise recommend``: from a scan and a budget to a plan."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memadvise.cli import budget as budgets
from memadvise.cli import common
from memadvise.errors import PlanError, UsageError
from memadvise.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from memadvise.advise.contest import Contest
    from memadvise.advise.recommend import Advisor, Recommendation
    from memadvise.advise.sweep import SweepRow
    from memadvise.ledger import Scan
    from memadvise.plan.schema import Plan, Setting
    from memadvise.verify import Verification

_PIN = re.compile(r"(?P<pattern>.+?)=(?P<method>[A-Za-z_]\w*)(\((?P<options>.*)\))?", re.DOTALL)
_PIN_HINT = "write PATTERN=METHOD, for example --pin 'lm_head.*=adamw' or --pin 'h.*.mlp.*=slimadam(axes=[1])'"


class Objective(StrEnum):
    """What is best among plans one can be equally sure of."""

    quality = "quality"
    speed = "speed"


def recommend(
    budget: budgets.OptionalBudget = None,
    scan: Annotated[Path, typer.Option("--scan", metavar="FILE", help="The scan file of memadvise scan.")] = Path(
        "memadvise.scan.json"
    ),
    output: common.Output = Path("memadvise.yaml"),
    reserve: budgets.Reserve = "0",
    pin: Annotated[
        list[str] | None,
        typer.Option("--pin", metavar="PATTERN=METHOD", help="Decide for these parameters yourself; repeatable."),
    ] = None,
    forbid: Annotated[
        list[str] | None,
        typer.Option("--forbid", metavar="METHOD", help="Never choose this method or codec (int4); repeatable."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="RULE", help="Set a hard rule aside, such as 'projection'; repeatable."),
    ] = None,
    objective: Annotated[
        Objective,
        typer.Option("--objective", help="speed: the least step time among plans one can be as sure of."),
    ] = Objective.quality,
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="NAME_OR_FILE", help="Scores of other models, for what was not probed."),
    ] = None,
    proxy: Annotated[
        bool,
        typer.Option("--proxy", help="Probe the target's build_model(scale='proxy') for what was not probed."),
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="A table of what each budget buys; without --budget, no plan is written.")
    ] = False,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials", min=10, metavar="STEPS", help="Train every plan that fits for STEPS; the best one is written."
        ),
    ] = None,
    verify: Annotated[
        int | None,
        typer.Option("--verify", min=10, metavar="STEPS", help="Then train the plan and AdamW side by side."),
    ] = None,
    force: common.Force = False,
    format: common.FormatOption = common.Format.text,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """Write the least harmful plan that fits a budget."""
    common.configure(format=format, quiet=quiet, verbose=verbose, no_progress=no_progress)
    if budget is None and not sweep:
        raise UsageError(
            "recommend needs a budget", hint="for example --budget 12GB, or --sweep for a table of budgets"
        )
    for flag, steps in (("--verify", verify), ("--trials", trials)):
        if budget is None and steps is not None:
            raise UsageError(f"{flag} trains a plan, and only a budget makes one", hint="add --budget 12GB")
    if profile and proxy:
        raise UsageError("--profile and --proxy exclude each other", hint="choose where scores are borrowed from")
    total = None if budget is None else budgets.budget_bytes(budget)
    held = 0 if total is None else budgets.reserve_bytes(reserve, total)
    pins = [parse_pin(text) for text in pin or ()]

    from memadvise.plan.emit import emit_plan, is_unedited

    if total is not None:
        kind = "a plan as memadvise wrote it (you may have edited it)"
        common.check_writable(output, force=force, ours=is_unedited, kind=kind)

    from memadvise.ledger import load_scan, write_whole

    scanned = load_scan(scan)

    from memadvise.advise.profile import load_profile
    from memadvise.advise.recommend import Advisor, Wishes
    from memadvise.scan import plan_tracer, proxy_profile

    wishes = Wishes(tuple(pins), tuple(forbid or ()), tuple(allow or ()), objective.value)
    borrowed = load_profile(profile) if profile else None
    result, contest, rows, verified = None, None, None, None
    with common.interruptible(), common.show_progress() as progress:
        progress("loading the target", 0, 1)
        trace, warnings = plan_tracer(scanned)
        for warning in warnings:
            common.note(f"warning: {warning}")
        if proxy:
            borrowed = proxy_profile(scanned, progress)
        progress("choosing, and tracing the plan", 0, 1)
        advisor = Advisor(scanned, trace=trace, wishes=wishes, profile=borrowed)
        if total is not None:
            result = advisor.recommend(total - held)
        if sweep:
            from memadvise.advise.sweep import sweep as run_sweep

            largest = scanned.memory[0].peak_bytes
            rows = run_sweep(advisor, largest, min(largest, advisor.smallest_peak()), progress=progress)

    words = ""
    if result is not None and budget is not None and total is not None:
        words = budgets.budget_words(budget, total, reserve, held)
        lists = {"--pin": pin, "--forbid": forbid, "--allow": allow}
        extra = {"--objective": "" if objective is Objective.quality else objective.value, "--profile": profile or ""}
        command = _command(budget, scan, output, reserve, lists, extra) + (" --proxy" if proxy else "")
        write_whole(output, emit_plan(result.plan, command=command, budget=words))
        if trials is not None:  # it takes long, and who stops it keeps this plan
            common.note(f"Wrote {output}: the plan by scores, until the contest has ended")
            with common.interruptible(), common.show_progress() as progress:
                result, contest = _contested(scanned, advisor, total - held, trials, progress)
            write_whole(output, emit_plan(result.plan, command=f"{command} --trials {trials}", budget=words))
    if result is not None and verify is not None:
        with common.interruptible(), common.show_progress() as progress:
            verified = _verified(scanned, result.plan, verify, progress)
    if format is common.Format.json:
        document = {} if result is None else _document(result, budget or "", total or 0, held)
        document |= {} if contest is None else {"contest": common.plain(contest)}
        document |= {} if rows is None else {"sweep": common.plain(rows)}
        document |= {} if verified is None else {"verification": common.plain(verified)}
        common.print_result(common.to_json(document))
    else:
        common.print_renderables(_renderables(result, contest, words, rows, verified))
    if result is not None:
        common.note(f"\nWrote {output}")
        common.note(f'next: optimizer = memadvise.create_optimizer(model, "{output}", lr=...)')
    if verified is not None and verified.clearly_worse:
        raise typer.Exit(1)


def _verified(scanned: Scan, plan: Plan, steps: int, progress: common.Progress) -> Verification:
    """The plan beside AdamW."""
    from memadvise.target import load_target
    from memadvise.verify import verify

    target = load_target(scanned.target, options=scanned.target_options)
    return verify(target, plan, num_steps=steps, progress=progress, **_hyper(scanned))


def _contested(
    scanned: Scan, advisor: Advisor, budget: int, steps: int, progress: common.Progress
) -> tuple[Recommendation, Contest]:
    """The recommendation after every plan that fits was trained."""
    from memadvise.advise.contest import contested
    from memadvise.paired import contest_trainer, few_steps
    from memadvise.target import load_target

    if few := few_steps(steps):
        common.note(f"warning: {few}")
    target = load_target(scanned.target, options=scanned.target_options)
    train = contest_trainer(target, num_steps=steps, progress=progress, **_hyper(scanned))
    return contested(advisor, budget, train)


def _hyper(scanned: Scan) -> dict[str, Any]:
    """The hyper-parameters of the probe, where there was one."""
    if scanned.probe is None:
        return {}
    given = scanned.probe.options
    hyper: dict[str, Any] = {"lr": scanned.probe.lr}
    hyper |= {name: given[name] for name in ("weight_decay", "betas") if name in given}
    return hyper | ({"betas": tuple(hyper["betas"])} if "betas" in hyper else {})


def _renderables(
    result: Recommendation | None,
    contest: Contest | None,
    words: str,
    rows: Sequence[SweepRow] | None,
    verified: Verification | None,
) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if result is not None:
        from memadvise.report.text import recommendation_renderables

        parts += recommendation_renderables(result, budget=words)
    if contest is not None:
        from memadvise.report.contest import contest_renderables

        parts += contest_renderables(contest)
    if rows is not None:
        parts += sweep_renderables(rows)
    if verified is not None:
        from memadvise.cli.verify import verification_renderables

        parts += verification_renderables(verified)
    return parts


def sweep_renderables(rows: Sequence[SweepRow]) -> list[RenderableType]:
    """The Pareto table."""
    from rich.text import Text

    from memadvise.optim.step_costs import SOURCE
    from memadvise.report.draw import heading, table

    columns = {
        "budget": "number", "peak": "number", "state": "number", "confidence": "text", "optimizer step": "number",
        "passes": "number", "switches": "text", "settings": "text",
    }  # fmt: skip
    cells = [
        (
            format_bytes(row.budget_bytes),
            "-" if row.peak_bytes is None else format_bytes(row.peak_bytes),
            "-" if row.state_bytes is None else format_bytes(row.state_bytes),
            row.confidence or "no plan fits",
            "-" if row.optimizer_time is None else f"{row.optimizer_time:.1f} x",
            "-" if row.pass_time is None else f"{row.pass_time:.2f} x",
            row.switches or "-",
            ", ".join(f"{key} x {count}" for key, count in row.settings.items()),
        )
        for row in rows
    ]
    footnote = f"Times over AdamW's. Optimizer step: {SOURCE}; forward and backward passes: by arithmetic."
    return [heading("What each budget buys"), table(columns, cells), Text(footnote, style="dim")]


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


def _command(
    budget: str, scan: Path, output: Path, reserve: str, lists: dict[str, list[str] | None], extra: dict[str, str]
) -> str:
    """The command line that makes the same plan again."""
    words = ["memadvise", "recommend", "--budget", budget, "--scan", str(scan), "-o", str(output)]
    words += ["--reserve", reserve] if reserve != "0" else []
    for flag, values in lists.items():
        for value in values or ():
            words += [flag, value]
    for flag, value in extra.items():
        words += [flag, value] if value else []
    return shlex.join(words)


def _document(result: Any, budget: str, total: int, held: int) -> dict[str, Any]:
    """The JSON of a recommendation: its own fields, the plan without places in files, and the budget as given."""
    plan = replace(result.plan, rules=tuple(replace(rule, marks={}) for rule in result.plan.rules), marks={})
    document: dict[str, Any] = common.plain(replace(result, plan=plan))
    for place in (document["plan"], *document["plan"]["rules"]):
        del place["marks"]
    return {"budget": budget, "total_budget_bytes": total, "reserve_bytes": held, **document}
