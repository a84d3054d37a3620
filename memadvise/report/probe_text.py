"""What the probe measured, as text: second moments, layer by layer, blocks of the Hessian, runs of optimizers."""

from __future__ import annotations

from rich.console import RenderableType

from memadvise.ledger import OptimizerRun, ProbeLedger, Scan
from memadvise.plan.schema import Setting
from memadvise.report.draw import bullets, heading, note, number, table
from memadvise.report.summary import depth_rows, hessian_rows, partition_rows, snr_rows, unknown_reasons
from memadvise.units import format_bytes

_RULES = {"cutoff": "most compression with SNR above 1", "official": "highest SNR, if above 1"}


def probe_renderables(scan: Scan) -> list[RenderableType]:
    """The probe's part of a scan's report."""
    probe = scan.probe
    assert probe is not None
    unknown = [f"{count} tensors, {numel:,} elements: {reason}" for reason, count, numel in unknown_reasons(scan)]
    return [
        *_second_moments(scan, probe),
        *_hessian(scan),
        *_runs(probe),
        *bullets("The probe", _how(probe)),
        *bullets("Statistics unknown (their bytes are exact)", unknown),
    ]


def _second_moments(scan: Scan, probe: ProbeLedger) -> list[RenderableType]:
    rows = snr_rows(scan)
    if not rows:
        return []
    parts: list[RenderableType] = [
        heading(f"Second moment: how alike it is along each axis ({probe.num_steps} AdamW steps)"),
        table(
            {
                "role": "text", "tensors": "number", "elements": "number", "best axes": "text",
                "SNR": "number", "lowest": "number", "lost share of v": "number",
                "other axes (SNR)": "text",
            },
            [
                (
                    row.role, str(row.count), f"{row.numel:,}", row.best, number(row.median_snr),
                    number(row.lowest_snr), number(row.error),
                    ", ".join(f"{label} {number(value)}" for label, value in row.others) or "-",
                )
                for row in rows
            ],
            optional=("lowest", "lost share of v", "other axes (SNR)", "elements"),
        ),
        note("SNR above 1: one mean along these axes keeps most of the second moment (arXiv 2503.01843)."),
    ]  # fmt: skip
    depth = depth_rows(scan)
    if depth:
        parts += [
            heading(f"SNR from the first layer to the last, and what the rule averages ({_RULES[probe.snr_rule]})"),
            table(
                {"role": "text", "axes": "text", "SNR by layer": "text", "averaged": "text"},
                [
                    (row.role, row.axes, "  ".join(number(value, digits=2) for value in row.snr), row.averaged)
                    for row in depth
                ],
            ),
        ]
    return parts


def _hessian(scan: Scan) -> list[RenderableType]:
    rows = hessian_rows(scan)
    if not rows:
        return []
    parts: list[RenderableType] = [
        heading("Hessian: is it made of blocks?"),
        table(
            {
                "role": "text", "partition": "text", "estimator": "text", "tensors": "number",
                "samples": "number", "score": "number",
            },
            [
                (
                    row.role, row.partition, row.estimator, str(row.count), str(row.num_samples),
                    f"{row.score:.3f} +- {row.stderr:.3f}",
                )
                for row in rows
            ],
            optional=("estimator", "samples", "tensors"),
        ),
        note("1 is perfectly block diagonal, 0 is chance; +- is one standard error."),
    ]  # fmt: skip
    chosen = partition_rows(scan)
    if chosen:
        parts += [
            heading("Blocks that may share a second moment"),
            table(
                {"role": "text", "tensors": "number", "blocks": "text", "because": "text"},
                [(row.role, str(row.count), row.partition, row.evidence) for row in chosen],
            ),
            note("clear: the score stays at 0.5 or above two standard errors below; elsewhere the papers' prior."),
        ]
    return parts


def _runs(probe: ProbeLedger) -> list[RenderableType]:
    if not probe.runs:
        return []
    return [
        heading("Short training with each optimizer, from the same start"),
        table(
            {
                "optimizer": "text", "lr": "number", "steps": "number", "first loss": "number",
                "last loss": "number", "optimizer state": "number", "ms/step": "number",
                "problem": "text",
            },
            [_run_row(run) for run in probe.runs],
            optional=("steps", "lr"),
        ),
    ]  # fmt: skip


def _run_row(run: OptimizerRun) -> tuple[str, ...]:
    milliseconds = "-" if run.step_seconds is None else f"{1000 * run.step_seconds:.1f}"
    return (
        Setting(run.method, run.options).key, f"{run.lr:g}", str(run.num_steps), number(run.first_loss, digits=4),
        number(run.last_loss, digits=4), format_bytes(run.state_bytes), milliseconds, run.problem or "-",
    )  # fmt: skip


def _how(probe: ProbeLedger) -> list[str]:
    """What was done, and how far it can be trusted."""
    lines = list(probe.notes)
    watched = [p for p in probe.parameters if len(p.fidelity) > 1]
    if watched:
        shadows = sum(len(p.fidelity) - 1 for p in watched)
        sampled = sum(p.sampled is not None for p in watched)
        lines.append(
            f"{shadows} shadows of {len(watched)} tensors ran beside AdamW and were compared at "
            f"{len(probe.recorded_steps)} of its steps"
            + (f"; of {sampled} large tensors a part stood for the whole" if sampled else "")
        )
    if probe.rank_agreement is not None:
        lines.append(
            "how alike the two halves of the window rank the candidates: Spearman "
            f"{probe.rank_agreement:.3f} (0.95 wanted)"
        )
    return lines
