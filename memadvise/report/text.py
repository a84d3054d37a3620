"""A scan and a recommendation as text for people: the answer first, then pictures, then the tables behind it.

Functions return rich renderables, which a terminal shows in colour; :func:`render_scan` and
:func:`render_recommendation` give the plain text. Names of parameters and modules are folded, never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from memadvise.ledger import CATEGORIES, MemoryLedger, OptimizerRun, Scan
from memadvise.plan.schema import Setting
from memadvise.report.draw import WIDTH_OFF_TTY, Bar, Timeline, heading, render_text, table
from memadvise.report.summary import hessian_rows, module_rows, snr_rows, unknown_reasons
from memadvise.units import format_bytes

_MAIN_CATEGORIES = ("weights", "gradients", "optimizer_state", "activations")
_LIVE_ROWS = 8


class GroupChoiceLike(Protocol):
    """What is shown of one group of equal parameters; the advisor's record has these fields."""

    @property
    def pattern(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def setting_key(self) -> str: ...
    @property
    def state_bytes_before(self) -> int: ...
    @property
    def state_bytes_after(self) -> int: ...
    @property
    def weight_bytes_saved(self) -> int: ...
    @property
    def expected_harm(self) -> float | None: ...
    @property
    def reason(self) -> str: ...


class RecommendationLike(Protocol):
    """What is shown of a recommendation (the advisor stands a floor above the reports)."""

    @property
    def needs_compression(self) -> bool: ...
    @property
    def before(self) -> MemoryLedger: ...
    @property
    def after(self) -> MemoryLedger | None: ...
    @property
    def budget_bytes(self) -> int: ...
    @property
    def margin_bytes(self) -> int: ...
    @property
    def groups(self) -> Sequence[GroupChoiceLike]: ...
    @property
    def solver_note(self) -> str: ...
    @property
    def explanation(self) -> Sequence[str]: ...


def render_scan(scan: Scan, *, width: int = WIDTH_OFF_TTY) -> str:
    """The whole report of a scan as plain text."""
    return render_text(scan_renderables(scan), width=width)


def render_recommendation(
    recommendation: RecommendationLike, *, budget: str | None = None, width: int = WIDTH_OFF_TTY
) -> str:
    """A recommendation as plain text; ``budget`` is the budget in the user's own words."""
    return render_text(recommendation_renderables(recommendation, budget=budget), width=width)


# ---------------------------------------------------------------- a scan


def scan_renderables(scan: Scan) -> list[RenderableType]:
    """The parts of a scan's report, in reading order."""
    ledger = scan.memory[0]
    trainable = [p for p in scan.parameters if p.trainable]
    frozen = len(scan.parameters) - len(trainable)
    versions = ", ".join(f"{name} {version}" for name, version in scan.environment.items())
    parts: list[RenderableType] = [
        Text(f"{scan.target}: {format_bytes(ledger.peak_bytes)} at the peak, in the {ledger.peak_phase} phase", "bold"),
        Text(
            f"{sum(p.numel for p in trainable):,} trainable parameters in {len(trainable)} tensors"
            f"{f', {frozen} frozen tensors' if frozen else ''}; {ledger.optimizer}; {ledger.device}; "
            f"{'traced, not run' if ledger.source == 'estimate' else 'measured'}; {versions}"
        ),
    ]
    parts += memory_renderables(ledger)
    parts += _what_ifs(scan.memory)
    if scan.probe is not None:
        parts += _probe(scan)
    parts += _list("Assumptions behind these numbers", ledger.assumptions)
    warnings = dict.fromkeys(w for source in (*scan.memory, scan.probe) if source for w in source.warnings)
    parts += _list("Warnings", tuple(warnings))
    return parts


def memory_renderables(ledger: MemoryLedger) -> list[RenderableType]:
    """Where the bytes of one step go: by category, over time, by phase, by module, and what is alive at the peak."""
    peak = ledger.peak_bytes
    kinds = [c for c in CATEGORIES if ledger.by_category.get(c)] + sorted(set(ledger.by_category) - set(CATEGORIES))
    parts: list[RenderableType] = [heading("At the peak")]
    parts.append(
        table(
            {"category": "text", "bytes": "number", "share": "number", " ": "bar"},
            [
                (_words(c), format_bytes(size), _percent(size, peak), Bar(size, peak))
                for c in kinds
                if (size := ledger.by_category[c])
            ],
        )
    )
    if len(ledger.timeline) > 1:
        parts += [heading("Live bytes during the step"), Timeline(ledger.timeline)]
    shown = [c for c in CATEGORIES if any(p.by_category.get(c) for p in ledger.phases)]
    parts.append(heading("Highest point of each phase"))
    parts.append(
        table(
            {"phase": "text", "peak": "number", **{_words(c): "number" for c in shown}},
            [
                (p.phase, format_bytes(p.peak_bytes), *(_bytes_or_dash(p.by_category.get(c, 0)) for c in shown))
                for p in ledger.phases
            ],
            optional=[_words(c) for c in shown],
        )
    )
    parts.append(heading("By module, at the peak"))
    parts.append(
        table(
            {
                "module": "name", "modules": "number", "bytes": "number", "share": "number",
                **{_words(c): "number" for c in _MAIN_CATEGORIES}, "other": "number", " ": "bar",
            },
            [
                (
                    row.pattern, str(row.count), format_bytes(row.total_bytes), _percent(row.total_bytes, peak),
                    *(_bytes_or_dash(row.by_category.get(c, 0)) for c in _MAIN_CATEGORIES),
                    _bytes_or_dash(sum(s for c, s in row.by_category.items() if c not in _MAIN_CATEGORIES)),
                    Bar(row.total_bytes, peak, width=16),
                )
                for row in module_rows(ledger)
            ],
            optional=("share", "modules", "activations", "optimizer state", "gradients", "weights", "other", " "),
        )
    )  # fmt: skip
    if ledger.live_at_peak:
        parts.append(heading("Largest tensors alive at the peak"))
        parts.append(
            table(
                {
                    "bytes": "number", "category": "text", "module": "name", "made by": "text",
                    "phase": "text", "line": "name",
                },
                [
                    (format_bytes(t.num_bytes), _words(t.category), t.module or "-", t.op, t.phase, t.where or "-")
                    for t in sorted(ledger.live_at_peak, key=lambda t: -t.num_bytes)[:_LIVE_ROWS]
                ],
                optional=("line", "made by", "phase"),
            )
        )  # fmt: skip
    return parts


def _what_ifs(ledgers: Sequence[MemoryLedger]) -> list[RenderableType]:
    if len(ledgers) < 2:
        return []
    first, highest = ledgers[0], max(ledger.peak_bytes for ledger in ledgers)
    rows = [
        (
            ledger.optimizer, str(ledger.micro_batches), ", ".join(ledger.checkpoint) or "-",
            format_bytes(ledger.peak_bytes),
            "-" if ledger is first else f"{100 * (ledger.peak_bytes / first.peak_bytes - 1):+.1f} %",
            ledger.peak_phase, format_bytes(ledger.state_bytes), Bar(ledger.peak_bytes, highest, width=20),
        )
        for ledger in ledgers
    ]  # fmt: skip
    columns = {
        "optimizer": "text", "micro-batches": "number", "recomputed modules": "name",
        "peak": "number", "change": "number", "phase": "text", "optimizer state": "number",
        " ": "bar",
    }  # fmt: skip
    return [heading("What if"), table(columns, rows, optional=("optimizer state", "phase", " "))]


def _probe(scan: Scan) -> list[RenderableType]:
    probe = scan.probe
    assert probe is not None
    parts: list[RenderableType] = []
    snr = snr_rows(scan)
    if snr:
        parts.append(heading(f"Second moment: how alike it is along each axis ({probe.num_steps} AdamW steps)"))
        parts.append(
            table(
                {
                    "role": "text", "tensors": "number", "elements": "number", "best axes": "text",
                    "SNR": "number", "lowest": "number", "lost share of v": "number",
                    "other axes (SNR)": "text",
                },
                [
                    (
                        row.role, str(row.count), f"{row.numel:,}", row.best, _number(row.median_snr),
                        _number(row.lowest_snr), _number(row.error),
                        ", ".join(f"{label} {_number(value)}" for label, value in row.others) or "-",
                    )
                    for row in snr
                ],
                optional=("lowest", "lost share of v", "other axes (SNR)", "elements"),
            )
        )  # fmt: skip
        parts.append(
            _note("SNR above 1: one mean along these axes keeps most of the second moment (arXiv 2503.01843).")
        )
    hessian = hessian_rows(scan)
    if hessian:
        parts.append(heading("Hessian: is it made of blocks?"))
        parts.append(
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
                    for row in hessian
                ],
                optional=("estimator", "samples", "tensors"),
            )
        )  # fmt: skip
        parts.append(_note("1 is perfectly block diagonal, 0 is chance; +- is one standard error."))
    if probe.runs:
        parts.append(heading("Short training with each optimizer, from the same start"))
        parts.append(
            table(
                {
                    "optimizer": "text", "lr": "number", "steps": "number", "first loss": "number",
                    "last loss": "number", "optimizer state": "number", "ms/step": "number",
                    "problem": "text",
                },
                [_run_row(run) for run in probe.runs],
                optional=("steps", "lr"),
            )
        )  # fmt: skip
    unknown = [f"{count} tensors, {numel:,} elements: {reason}" for reason, count, numel in unknown_reasons(scan)]
    return parts + _list("Statistics unknown (their bytes are exact)", unknown)


def _run_row(run: OptimizerRun) -> tuple[str, ...]:
    milliseconds = "-" if run.step_seconds is None else f"{1000 * run.step_seconds:.1f}"
    return (
        Setting(run.method, run.options).key, f"{run.lr:g}", str(run.num_steps), _number(run.first_loss, digits=4),
        _number(run.last_loss, digits=4), format_bytes(run.state_bytes), milliseconds, run.problem or "-",
    )  # fmt: skip


# ---------------------------------------------------------------- a recommendation


def recommendation_renderables(
    recommendation: RecommendationLike, *, budget: str | None = None
) -> list[RenderableType]:
    """The parts of a recommendation's report, in reading order."""
    before, after = recommendation.before, recommendation.after or recommendation.before
    limit = recommendation.budget_bytes
    given = f"{budget} = " if budget else ""
    verdict = "the plan fits" if recommendation.needs_compression else "nothing needs compressing"
    parts: list[RenderableType] = [
        Text(
            f"{verdict}: {format_bytes(after.peak_bytes)} at the peak, budget {given}{format_bytes(limit)}, "
            f"margin {format_bytes(recommendation.margin_bytes)}",
            "bold",
        )
    ]
    ledgers = [("as it stands", before)]
    if recommendation.after is not None:
        ledgers.append(("with the plan", recommendation.after))
    widest = max(limit, *(ledger.peak_bytes for _, ledger in ledgers))
    rows: list[list[str | RenderableType]] = []
    for name, ledger in ledgers:
        sizes = [ledger.by_category.get(c, 0) for c in _MAIN_CATEGORIES]
        over = ledger.peak_bytes > limit
        rows.append([name, format_bytes(ledger.peak_bytes), ledger.peak_phase])
        rows[-1] += [_bytes_or_dash(size) for size in (*sizes, ledger.peak_bytes - sum(sizes))]
        rows[-1].append(Bar(ledger.peak_bytes, widest, style="red" if over else "green"))
    rows.append(["budget", format_bytes(limit), *[""] * (len(_MAIN_CATEGORIES) + 2), Bar(limit, widest, style="dim")])
    columns = {"step": "text", "peak": "number", "phase": "text"}
    columns |= {_words(c): "number" for c in (*_MAIN_CATEGORIES, "other")}
    parts += [heading("Peak of one training step"), table(columns | {" ": "bar"}, rows, optional=tuple(columns)[3:])]
    if recommendation.groups:
        parts.append(heading("Chosen for each group of equal parameters"))
        groups = sorted(recommendation.groups, key=lambda g: g.state_bytes_after - g.state_bytes_before)
        total_before = sum(g.state_bytes_before for g in groups)
        total_after = sum(g.state_bytes_after for g in groups)
        lighter = any(g.weight_bytes_saved for g in groups)  # int8 weights, which a pin asked for
        parts.append(
            table(
                {
                    "parameters": "name", "role": "text", "tensors": "number", "setting": "text",
                    "state before": "number", "after": "number",
                    **({"weights save": "number"} if lighter else {}), "expected harm": "number", "why": "text",
                },
                [
                    *(
                        (
                            g.pattern, g.role, str(g.count), g.setting_key, format_bytes(g.state_bytes_before),
                            format_bytes(g.state_bytes_after),
                            *([_bytes_or_dash(g.weight_bytes_saved)] if lighter else []),
                            _harm(g.expected_harm), g.reason,
                        )
                        for g in groups
                    ),
                    (
                        "all", "", str(sum(g.count for g in groups)), "", format_bytes(total_before),
                        format_bytes(total_after),
                        *([format_bytes(sum(g.weight_bytes_saved for g in groups))] if lighter else []), "", "",
                    ),
                ],
                optional=("role", "tensors", "expected harm"),
            )
        )  # fmt: skip
        parts.append(_note(f"solver: {recommendation.solver_note}"))
    return parts + _list("Why", recommendation.explanation)


# ---------------------------------------------------------------- cells


def _harm(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def _words(category: str) -> str:
    return category.replace("_", " ")


def _percent(part: int, whole: int) -> str:
    if not whole:
        return "-"
    return f"{100 * part / whole:.1f} %" if part == 0 or part / whole >= 0.0005 else "<0.1 %"


def _bytes_or_dash(size: int) -> str:
    return format_bytes(size) if size else "-"


def _number(value: float | None, *, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _note(text: str) -> Text:
    return Text(text, style="dim")


def _list(title: str, lines: Sequence[str]) -> list[RenderableType]:
    if not lines:
        return []
    return [heading(title), *(Padding(Text(f"- {line}"), (0, 0, 0, 2)) for line in lines)]
