"""``memadvise verify``: train a plan and AdamW side by side, and say whether the plan is worse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memadvise.cli import common
from memadvise.cli.scan import check_numbers

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memadvise.verify import Verification


def verify(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan written by memadvise recommend.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="As for memadvise scan. The file is executed.")],
    steps: Annotated[
        int, typer.Option("--steps", min=10, help="Of each run; a third of a short schedule tells.")
    ] = 300,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of AdamW; the plan's factors multiply it.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of both.")] = 0.0,
    betas: Annotated[tuple[float, float], typer.Option("--betas", metavar="B1 B2", help="Of both.")] = (0.9, 0.999),
    seeds: Annotated[int, typer.Option("--seeds", min=2, help="Pairs of runs.")] = 2,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="For hf: targets.")] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=1, help="For hf: targets.")] = None,
    dtype: common.Dtype = None,
    output: common.ResultFile = None,
    force: common.Force = False,
    format: common.FormatOption = common.Format.text,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """Train a plan and AdamW from the same starts, and report the gap against the seed noise."""
    common.configure(format=format, quiet=quiet, verbose=verbose, no_progress=no_progress)
    check_numbers(lr=lr, weight_decay=weight_decay, betas=betas)

    from memadvise.plan.load import load_plan
    from memadvise.target import load_target

    if output is not None:
        common.check_writable(output, force=force, ours=lambda path: False, kind="written by this command")
    options: dict[str, Any] = {"batch_size": batch_size, "seq_len": seq_len, "dtype": dtype}
    loaded = load_plan(plan)
    with common.interruptible(), common.show_progress() as progress:
        from memadvise.verify import verify as run

        found = load_target(target, options={name: value for name, value in options.items() if value is not None})
        result = run(
            found,
            loaded,
            num_steps=steps,
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            num_seeds=seeds,
            progress=progress,
        )
    if format is common.Format.json:
        common.deliver(common.to_json(result), output, force=force)
    elif output is not None:
        from memadvise.report.draw import render_text

        common.deliver(render_text(verification_renderables(result)), output, force=force)
    else:
        common.print_renderables(verification_renderables(result))
    raise typer.Exit(1 if result.clearly_worse else 0)


def verification_renderables(result: Verification) -> list[RenderableType]:
    """The verdict, then the pairs behind it."""
    from rich.padding import Padding
    from rich.text import Text

    from memadvise.report.draw import heading, table

    rows = [
        (
            str(pair.seed),
            f"{pair.adamw.losses[0]:.4g}" if pair.adamw.losses else "-",
            f"{pair.adamw_end:.4g}",
            "-" if pair.plan_end is None else f"{pair.plan_end:.4g}",
            pair.plan.problem or "" if pair.gap is None else f"{pair.gap:+.2g}",
        )
        for pair in result.pairs
    ]
    columns = {"seed": "number", "first loss": "number", "AdamW": "number", "plan": "number", "gap": "text"}
    parts: list[RenderableType] = [
        Text(result.words, "bold"),
        heading(f"{result.measure}, learning rate {result.lr:g}"),
        table(columns, rows),
    ]
    if result.warnings:
        parts.append(heading("Warnings"))
        parts += [Padding(Text(f"- {line}"), (0, 0, 0, 2)) for line in result.warnings]
    return parts
