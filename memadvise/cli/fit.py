"""``memadvise fit``: the largest micro-batch, and the longest sequence, that fits a budget under each switch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from memadvise.cli import budget as budgets
from memadvise.cli import common
from memadvise.errors import Infeasible
from memadvise.units import format_bytes


def fit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="file.py, file.py:name, package.module:name or hf:DIR_OR_CONFIG_JSON. The file is executed.",
        ),
    ],
    budget: budgets.Budget,
    reserve: budgets.Reserve = "0",
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="The largest micro-batch to try.")] = 4096,
    accumulate: Annotated[
        bool, typer.Option("--accumulate", help="A micro-batch is one of several whose gradients accumulate.")
    ] = False,
    seq: Annotated[
        bool, typer.Option("--seq", help="Find the longest sequence, too, at the target's (or --batch-size) batch.")
    ] = False,
    max_seq: Annotated[int, typer.Option("--max-seq", min=1, help="The longest sequence to try.")] = 1 << 20,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="With this plan only, as it is and with switches.")
    ] = None,
    device: common.DeviceOption = common.Device.cuda,
    arch: common.Arch = None,
    attention: common.Attention = None,
    assume: common.Assume = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Where the search begins.")] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=1, help="Tokens of a sample.")] = None,
    dtype: common.Dtype = None,
    output: common.ResultFile = None,
    force: common.Force = False,
    format: common.FormatOption = common.Format.text,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """Find the largest micro-batch that fits a budget, under each switch."""
    common.configure(format=format, quiet=quiet, verbose=verbose, no_progress=no_progress)
    assumed = common.device_model(device, arch, attention, assume)
    total = budgets.budget_bytes(budget)
    held = budgets.reserve_bytes(reserve, total)

    from memadvise.fit import FitOptions
    from memadvise.fit import fit as find
    from memadvise.plan.load import load_plan

    sizes: dict[str, Any] = {"batch_size": batch_size, "seq_len": seq_len, "dtype": dtype}
    options = FitOptions(
        max_batch=max_batch,
        sequences=seq,
        max_seq_len=max_seq,
        accumulate=accumulate,
        plan=load_plan(plan) if plan is not None else None,
    )
    with common.interruptible(), common.show_progress() as progress:
        result = find(
            target,
            total - held,
            target_options={name: value for name, value in sizes.items() if value is not None},
            device=assumed,
            options=options,
            progress=progress,
        )
    words = budgets.budget_words(budget, total, reserve, held)
    if format is common.Format.json:
        common.deliver(common.to_json(_document(result, budget, total, held)), output, force=force)
    elif output is not None:
        from memadvise.report.draw import render_text
        from memadvise.report.fit import fit_renderables

        common.deliver(render_text(fit_renderables(result, budget=words)), output, force=force)
    else:
        from memadvise.report.fit import fit_renderables

        common.print_renderables(fit_renderables(result, budget=words))
    if not result.fits:
        raise nothing_fits(result)


def nothing_fits(result: Any) -> Infeasible:
    """Names the smallest peak and what dominates it."""
    row = min((row for row in result.rows if row.ledger is not None), key=lambda row: row.ledger.peak_bytes)
    ledger = row.ledger
    most = sorted(ledger.by_category.items(), key=lambda item: -item[1])[:3]
    size = min(traced.size for traced in row.traces)
    return Infeasible(
        f"nothing fits {format_bytes(result.budget_bytes)}: the smallest peak is {format_bytes(ledger.peak_bytes)} "
        f"({row.name}, a micro-batch of {size}), in the {ledger.peak_phase} phase, dominated by "
        + ", ".join(f"{name.replace('_', ' ')} {format_bytes(part)}" for name, part in most),
        hint=f"raise the budget to {ledger.peak_bytes} bytes or more, shorten the sequences, or find a smaller plan "
        "with memadvise recommend",
    )


def _document(result: Any, budget: str, total: int, held: int) -> dict[str, Any]:
    """The JSON of a fit: rows with what matters of their ledgers, and the budget as given."""

    def row(record: Any) -> dict[str, Any]:
        ledger = record.ledger
        found: dict[str, Any] = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        found["ledger"] = None
        if ledger is not None:
            found["ledger"] = {
                name: getattr(ledger, name)
                for name in (
                    "optimizer", "micro_batches", "checkpoint", "gradient_release", "weights", "batch", "peak_bytes",
                    "peak_phase", "state_bytes", "by_category", "phases", "needed_bytes", "comfortable_bytes",
                )
            }  # fmt: skip
            found["margin_bytes"] = result.budget_bytes - ledger.peak_bytes
        return found

    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    fields |= {name: [row(record) for record in fields[name]] for name in ("rows", "sequences")}
    return {"budget": budget, "total_budget_bytes": total, "reserve_bytes": held, "fits": result.fits, **fields}
