"""The largest micro-batch, and the longest sequence, that fits a budget: for the target as it stands, and under every
switch that it can run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from memadvise.batches import batch_size, default_size, resized, takes, tensors_in
from memadvise.errors import OptimizerError, TargetError, UsageError
from memadvise.ledger import MemoryLedger
from memadvise.plan.schema import Plan, Setting, Switches
from memadvise.sizing import Fit, FitRow, largest
from memadvise.switches import checkpoint_patterns
from memadvise.target import Target, load_target
from memadvise.whatif import WhatIf, how_to, refusal, trace_what_if, weight_variants

if TYPE_CHECKING:
    from torch import nn

    from memadvise.memory.architecture import DeviceModel

Progress = Callable[[str, int, int], None]
MAX_BATCH, MAX_SEQ_LEN, SEQ_UNIT = 4096, 1 << 20, 64
_BATCH_MEMORY = 1 << 30  # of this machine, for the tensors of one batch; a trace makes a few of them
_ACCUMULATED = "A micro-batch is one of several: it runs while the gradients of those before it are kept."
_EIGHT_BIT = Setting("adamw", {"first_moment": "dynamic8", "second_moment": "dynamic8"})


@dataclass(frozen=True)
class FitOptions:
    """What to look for.

    Args:
        max_batch: the largest micro-batch to try.
        sequences: look for the longest sequence, too, at the batch size of the target.
        max_seq_len: the longest to try.
        accumulate: a micro-batch is one of several whose gradients accumulate.
        plan: only this plan, as it is and with further switches.
    """

    max_batch: int = MAX_BATCH
    sequences: bool = False
    max_seq_len: int = MAX_SEQ_LEN
    accumulate: bool = False
    plan: Plan | None = None


@dataclass(frozen=True)
class _Way:
    name: str
    what_if: WhatIf
    how: str = ""
    refused: str | None = None


def fit(
    spec: str,
    budget_bytes: int,
    *,
    target_options: dict[str, Any] | None = None,
    device: str | DeviceModel = "cuda",
    options: FitOptions | None = None,
    progress: Progress | None = None,
) -> Fit:
    """Find what fits ``budget_bytes``, the limit on the peak of one step.

    Args:
        spec: a target, as :func:`memadvise.target.load_target` takes it.
        budget_bytes: for everything the step holds.
        target_options: ``batch_size`` (where the search begins), ``seq_len``, ``dtype``.
        device: whose memory.
        options: what to look for.
        progress: called with (what, done, total).

    Raises:
        TargetError, TargetRaised: the target's code is at fault, or its batches cannot be of other sizes.
        PlanError: the plan does not fit the model.
    """
    from memadvise.memory.architecture import device_model
    from memadvise.memory.session import fake_session

    options, assumed = options or FitOptions(), device_model(device)
    report = progress or (lambda what, done, total: None)
    report("loading the target", 0, 1)
    target = load_target(spec, options=target_options)
    with fake_session(target, assumed, batches=1) as session:
        model, batch = session.model, session.batches[0]
        ways = _ways(target, model, batch, options)
        start = _start(target, batch)
        per_sample = max(1, sum(t.nbytes for t in tensors_in(batch)) // start)
    limit, warnings = options.max_batch, []
    if per_sample * limit > _BATCH_MEMORY:
        limit = max(start, _BATCH_MEMORY // per_sample)
        warnings.append(f"batches beyond {limit} samples are not tried: their tensors would fill this machine's memory")
    finder = _Finder(target, ways, budget_bytes, assumed, start, report, len(ways) * (2 if options.sequences else 1))
    of_batches = finder.rows("batch_size", "a micro-batch of", start=start, limit=limit)
    length = (target_options or {}).get("seq_len") or default_size(target.build_batches, "seq_len")
    of_sequences: tuple[FitRow, ...] = ()
    if options.sequences:
        of_sequences = finder.rows("seq_len", "a sequence of", **_sequence_bounds(target, length, options))
    first = next((row.ledger for row in of_batches if row.ledger is not None), None)
    if first is None:
        raise UsageError(f"no way to run {spec} is open: {of_batches[0].problem}", hint="leave out --accumulate")
    assumptions = (*first.assumptions, *([_ACCUMULATED] if options.accumulate else []))
    return Fit(
        target=spec,
        device=assumed.device,
        budget_bytes=budget_bytes,
        rows=of_batches,
        sequences=of_sequences,
        seq_len=length,
        batch_size=start,
        assumptions=assumptions,
        warnings=tuple(dict.fromkeys((*warnings, *first.warnings))),
    )


class _Finder:
    """Finds the largest size for every way."""

    def __init__(
        self,
        target: Target,
        ways: list[_Way],
        budget: int,
        device: DeviceModel,
        batch_size: int,
        report: Progress,
        total: int,
    ) -> None:
        self._target, self._ways, self._budget, self._device = target, ways, budget, device
        self._batch_size = batch_size
        self._report, self._total, self._done = report, total, 0

    def rows(self, size_name: str, what: str, **bounds: int) -> tuple[FitRow, ...]:
        """One row for every way; the first one has to run."""
        found = []
        batches: dict[int, tuple[str, ...]] = {}  # what they were like, by size
        for number, way in enumerate(self._ways):
            found.append(self._row(way, size_name, what, batches, bounds, must_run=number == 0))
            self._done += 1
        return tuple(found)

    def _row(
        self,
        way: _Way,
        size_name: str,
        what: str,
        batches: dict[int, tuple[str, ...]],
        bounds: dict[str, int],
        *,
        must_run: bool,
    ) -> FitRow:
        if way.refused is not None:
            return FitRow(way.name, way.how, problem=way.refused)

        def trace(size: int) -> MemoryLedger:
            self._report(f"{way.name}: tracing {what} {size}", self._done, self._total)
            parts = way.what_if.switches.micro_batches
            sizes = {"batch_size": parts * size} if size_name == "batch_size" else {"seq_len": size}
            if size_name == "seq_len" and parts > 1:
                sizes["batch_size"] = parts * self._batch_size
            ledger = trace_what_if(self._target.sized(**sizes), way.what_if, device=self._device)
            batches[size] = ledger.batch
            _check_heeded(batches, size_name, self._target.spec)
            return ledger

        try:
            return largest(way.name, way.how, trace, self._budget, **bounds)
        except (TargetError, UsageError, OptimizerError) as error:
            if must_run:
                raise
            return FitRow(way.name, way.how, problem=error.message)


def _start(target: Target, batch: Any) -> int:
    """The number of samples in a batch of the target's own.

    Raises:
        TargetError: there is none that could be changed.
    """
    size = default_size(target.build_batches, "batch_size") or batch_size(batch)
    if not size:
        raise TargetError(
            f"a batch of {target.spec} has no size that could be changed: its tensors have no common first dimension",
            hint="give build_batches a keyword batch_size: def build_batches(batch_size=8)",
        )
    return size


def _check_heeded(sizes: dict[int, tuple[str, ...]], name: str, spec: str) -> None:
    """Raise TargetError if two sizes gave the same batches: whoever takes the keyword may still not heed it."""
    if len(sizes) > 1 and len(set(sizes.values())) == 1:
        first, second = sorted(sizes)[:2]
        raise TargetError(
            f"build_batches of {spec} gives the same batches for {name}={first} and {name}={second}: "
            f"{', '.join(next(iter(sizes.values())))}",
            hint=f"let it make batches of the {name} that it is given",
        )


def _sequence_bounds(target: Target, length: int | None, options: FitOptions) -> dict[str, int]:
    if not takes(target.build_batches, "seq_len"):
        target.sized(seq_len=1)  # raises
    if length is None:
        raise UsageError(
            f"where to begin with the sequence length of {target.spec} is not known",
            hint="give --seq-len, or build_batches a default: def build_batches(batch_size=8, seq_len=512)",
        )
    unit = SEQ_UNIT if length % SEQ_UNIT == 0 else 1
    return {"start": length, "limit": options.max_seq_len, "unit": unit}


# ---------------------------------------------------------------- the ways


def _ways(target: Target, model: nn.Module, batch: Any, options: FitOptions) -> list[_Way]:
    """What is tried, in the order of the table: nothing changed, what costs time, then what costs precision."""
    patterns = checkpoint_patterns(model)
    checkpointed = Switches(checkpoint=patterns)
    released = Switches(gradient_release=True)
    both = replace(released, checkpoint=patterns)
    tried = {
        "as it stands": WhatIf(),
        "fused": WhatIf(implementation="fused"),
        "fused, checkpointing": WhatIf(checkpointed, implementation="fused"),
        "gradient release": WhatIf(released),
        "gradient release, checkpointing": WhatIf(both),
        "8-bit state": WhatIf(plan=_EIGHT_BIT),
        "8-bit state, checkpointing": WhatIf(checkpointed, _EIGHT_BIT),
        "8-bit state, gradient release, checkpointing": WhatIf(both, _EIGHT_BIT),
    }
    if "int8" in weight_variants(model):
        least = WhatIf(replace(both, weights="int8"), _EIGHT_BIT)
        tried["int8 weights, 8-bit state, gradient release, checkpointing"] = least
    if options.plan is not None:
        own = options.plan.switches
        tried = {"the plan": WhatIf(own, options.plan)}
        tried["the plan, checkpointing"] = WhatIf(replace(own, checkpoint=own.checkpoint or patterns), options.plan)
        if own.micro_batches == 1:
            tried["the plan, gradient release"] = WhatIf(replace(own, gradient_release=True), options.plan)
            full = Switches(1, own.checkpoint or patterns, True, own.weights)
            tried["the plan, gradient release, checkpointing"] = WhatIf(full, options.plan)
    ways: list[_Way] = []
    for name, what_if in tried.items():
        if any(what_if == way.what_if for way in ways):  # nothing to checkpoint, or in the plan already
            continue
        spoken = name if what_if.switches.checkpoint else name.removesuffix(", checkpointing")
        ways.append(_accumulated(_Way(spoken, what_if, how_to(what_if)), target, model, batch, options))
    return ways


def _accumulated(way: _Way, target: Target, model: nn.Module, batch: Any, options: FitOptions) -> _Way:
    """``way`` with gradients that accumulate, if that was asked for; refused where it cannot be run so."""
    switches = way.what_if.switches
    if options.accumulate and switches.gradient_release:
        return replace(way, refused="gradients that are released cannot accumulate")
    if options.accumulate and switches.micro_batches == 1:
        switches = replace(switches, micro_batches=2)
    parts = switches.micro_batches
    enough = resized(batch, parts) if batch_size(batch) else batch
    refused = refusal(target, model, enough, switches)
    return replace(way, what_if=replace(way.what_if, switches=switches), refused=refused)
