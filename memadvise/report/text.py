"""A scan and a recommendation as text for people: the answer first, then pictures, then the tables behind it.

Functions return rich renderables, which a terminal shows in colour; :func:`render_scan` and
:func:`render_recommendation` give the plain text. Names of parameters and modules are folded, never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import RenderableType
from rich.text import Text

from memadvise.compare import compare
from memadvise.ledger import CATEGORIES, MemoryLedger, Scan
from memadvise.plan.schema import Switches
from memadvise.report.compare import signed_percent
from memadvise.report.draw import WIDTH_OFF_TTY, Bar, Timeline, bullets, heading, note, render_text, table
from memadvise.report.probe_text import probe_renderables
from memadvise.report.summary import device_rows, module_rows
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
    def reason(self) -> str: ...
    @property
    def confidence(self) -> str: ...
    @property
    def runners_up(self) -> Sequence[str]: ...
    @property
    def lr_factor(self) -> float: ...


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


_SOURCES = {
    "estimate": "traced, not run",
    "measure": "measured",
    "bound": "an upper bound",
    "lower bound": "a lower bound",
}


def source_words(ledger: MemoryLedger) -> str:
    """Where the numbers of a ledger come from, in a few words."""
    if ledger.source == "estimate" and ledger.on_real:
        return "traced on real tensors, run on the CPU"
    return _SOURCES[ledger.source]


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
            f"{source_words(ledger)}; {versions}"
        ),
    ]
    parts += memory_renderables(ledger)
    if scan.asked is not None:
        parts += _asked(scan.memory[0], scan.asked)
    parts += _what_ifs((*scan.memory, *([scan.asked] if scan.asked else ())))
    parts += _beside(scan)
    if scan.probe is not None:
        parts += probe_renderables(scan)
    parts += bullets("Assumptions behind these numbers", ledger.assumptions)
    sources = (*scan.memory, scan.measured, scan.compiled, scan.asked, scan.probe)
    warnings = dict.fromkeys(w for source in sources if source for w in source.warnings)
    parts += bullets("Warnings", tuple(warnings))
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
    parts += device_renderables(ledger)
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


def device_renderables(ledger: MemoryLedger, *, budget_bytes: int | None = None) -> list[RenderableType]:
    """What the device must hold, part by part, at least and to be comfortable; nothing for the CPU."""
    rows = device_rows(ledger)
    if not rows:
        return []
    cells: list[tuple[str, ...]] = [
        (row.name, _bytes_or_dash(row.needed_bytes), _bytes_or_dash(row.comfortable_bytes), row.source) for row in rows
    ]
    cells.append(("together", format_bytes(ledger.needed_bytes), format_bytes(ledger.comfortable_bytes), ""))
    if budget_bytes is not None:
        verdicts = (_verdict(size, budget_bytes) for size in (ledger.needed_bytes, ledger.comfortable_bytes))
        cells.append((f"were {format_bytes(budget_bytes)} the whole device", *verdicts, ""))
    columns = {"on the device": "text", "needs at least": "number", "comfortable": "number", "from": "text"}
    return [heading("What the device must hold"), table(columns, cells, optional=("from",))]


def _verdict(size: int, budget_bytes: int) -> str:
    return "fits" if size <= budget_bytes else f"{format_bytes(size - budget_bytes)} over"


def _asked(before: MemoryLedger, asked: MemoryLedger) -> list[RenderableType]:
    how = " with ".join(part for part in (asked.optimizer, asked.switches.describe()) if part)
    change = 100 * (asked.peak_bytes / before.peak_bytes - 1)
    said = f"As asked: {how}: {format_bytes(asked.peak_bytes)} at the peak, in the {asked.peak_phase} phase"
    new = tuple(line for line in asked.assumptions if line not in before.assumptions)
    return [heading(f"{said} ({change:+.1f} %)"), *memory_renderables(asked), *bullets("Assumed beside the above", new)]


def _what_ifs(ledgers: Sequence[MemoryLedger]) -> list[RenderableType]:
    if len(ledgers) < 2:
        return []
    first, highest = ledgers[0], max(ledger.peak_bytes for ledger in ledgers)
    rows: list[list[RenderableType]] = [
        [
            ledger.optimizer, str(ledger.micro_batches), ", ".join(ledger.checkpoint) or "-", _besides(ledger),
            format_bytes(ledger.peak_bytes),
            "-" if ledger is first else f"{100 * (ledger.peak_bytes / first.peak_bytes - 1):+.1f} %",
            ledger.peak_phase, format_bytes(ledger.state_bytes), Bar(ledger.peak_bytes, highest, width=20),
        ]
        for ledger in ledgers
    ]  # fmt: skip
    columns = {
        "optimizer": "text", "micro-batches": "number", "recomputed modules": "name", "besides": "text",
        "peak": "number", "change": "number", "phase": "text", "optimizer state": "number",
        " ": "bar",
    }  # fmt: skip
    if all(_besides(ledger) == "-" for ledger in ledgers):
        del columns["besides"]
        rows = [[*row[:3], *row[4:]] for row in rows]
    return [heading("What if"), table(columns, rows, optional=("optimizer state", "phase", " "))]


def _besides(ledger: MemoryLedger) -> str:
    """The switches that have no column of their own."""
    return Switches(gradient_release=ledger.gradient_release, weights=ledger.weights).describe() or "-"


def _beside(scan: Scan) -> list[RenderableType]:
    """The same step as it ran, and as ``torch.compile`` would run it at most."""
    parts: list[RenderableType] = []
    others = (("Measured", scan.measured), ("Under torch.compile: an upper bound", scan.compiled))
    for title, ledger in others:
        if ledger is None:
            continue
        diff = compare(scan.memory[0], ledger)
        rows = [
            (row.name, format_bytes(row.before_bytes), format_bytes(row.after_bytes), signed_percent(row))
            for row in (diff.peak, *diff.phases)
        ]
        column = "measured" if ledger.source == "measure" else "at most"
        columns = {"": "text", "estimate": "number", column: "number", "relative": "number"}
        parts += [heading(title), table(columns, rows), *(note(said) for said in ledger.assumptions)]
        parts += [note(f"reserved: {format_bytes(r.peak_reserved_bytes)} ({r.settings})") for r in ledger.reserved]
        parts += [note(f"{o.name}: {format_bytes(o.low_bytes)} ({o.source})") for o in ledger.overhead]
    return parts


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
    parts += device_renderables(after, budget_bytes=limit)
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
                    **({"weights save": "number"} if lighter else {}), "confidence": "text", "why": "text",
                },
                [
                    *(
                        (
                            g.pattern, g.role, str(g.count), _with_rate(g), format_bytes(g.state_bytes_before),
                            format_bytes(g.state_bytes_after),
                            *([_bytes_or_dash(g.weight_bytes_saved)] if lighter else []),
                            g.confidence, g.reason,
                        )
                        for g in groups
                    ),
                    (
                        "all", "", str(sum(g.count for g in groups)), "", format_bytes(total_before),
                        format_bytes(total_after),
                        *([format_bytes(sum(g.weight_bytes_saved for g in groups))] if lighter else []), "", "",
                    ),
                ],
                optional=("role", "tensors", "confidence"),
            )
        )  # fmt: skip
        parts.append(note(f"solver: {recommendation.solver_note}"))
        parts += bullets(
            "Runners-up that would have fitted as well",
            [f"{g.pattern}: {', '.join(g.runners_up)}" for g in groups if g.runners_up],
        )
    return parts + bullets("Why", recommendation.explanation)


# ---------------------------------------------------------------- cells


def _with_rate(group: GroupChoiceLike) -> str:
    rate = "" if group.lr_factor == 1 else f", learning rate x {group.lr_factor:g}"
    return f"{group.setting_key}{rate}"


def _words(category: str) -> str:
    return category.replace("_", " ")


def _percent(part: int, whole: int) -> str:
    if not whole:
        return "-"
    return f"{100 * part / whole:.1f} %" if part == 0 or part / whole >= 0.0005 else "<0.1 %"


def _bytes_or_dash(size: int) -> str:
    return format_bytes(size) if size else "-"
