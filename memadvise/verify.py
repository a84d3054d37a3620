"""Does a plan train like AdamW? The whole plan and AdamW side by side from the same start, on the same batches.

Scores of single tensors miss how compressed tensors act together; only training the whole plan shows that. Both sides
of a pair have one start and the same batches (:mod:`memadvise.paired`). Their gap at the end is compared with the noise
that was measured: the largest of the spread of AdamW's end losses over the seeds, that of the gaps, and what one run's
own fluctuation leaves.

AdamW is also run at half and at twice the learning rate: where that ends lower, the reference is not tuned, and then
compression may even seem to help (a damped update is what a too large rate needs).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from memadvise.errors import UsageError
from memadvise.paired import PairedRuns, Progress, Side, end_window, few_steps
from memadvise.plan.schema import Plan
from memadvise.target import Target

_RATES = (0.5, 2.0)


@dataclass(frozen=True)
class Pair:
    """AdamW and the plan from one start. ``gap``: the plan's end loss less AdamW's; None if the plan's run failed."""

    seed: int
    adamw: Side
    plan: Side
    adamw_end: float
    plan_end: float | None
    gap: float | None


@dataclass(frozen=True)
class Verification:
    """What was found.

    ``gap``: mean over the seeds of the pairs' gaps in end loss, in the loss's own unit. ``noise``: see the module.
    ``measure``: what is compared at the end. ``verdict``: "clearly worse", "perhaps worse", "no difference seen" or
    "better"; ``words`` say it in a sentence.
    """

    num_steps: int
    window: int
    measure: str
    lr: float
    pairs: tuple[Pair, ...]
    gap: float | None
    noise: float
    verdict: str
    words: str
    warnings: tuple[str, ...]

    @property
    def clearly_worse(self) -> bool:
        return self.verdict == "clearly worse"


def verify(
    target: Target,
    plan: Plan,
    *,
    num_steps: int = 300,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    num_seeds: int = 2,
    progress: Progress | None = None,
) -> Verification:
    """Train ``plan`` and AdamW from the same starts; both runs of a pair see the same batches in the same order.

    Args:
        target: its model is built for every run; one is alive at a time.
        plan: executed as it would be: rules, learning-rate factors and switches.
        num_steps: of each run; the learning rate rises over the first tenth.
        lr: AdamW's; a rule's ``lr_factor`` multiplies it.
        weight_decay: of both.
        betas: of both.
        num_seeds: pairs, at least 2.
        progress: called with (what, done, total).

    Raises:
        UsageError: fewer than 2 seeds or 10 steps, or AdamW itself diverges at ``lr``.
        TargetError, TargetRaised, PlanError: the target cannot be trained, or the plan does not fit it.
    """
    if num_seeds < 2 or num_steps < 10:
        raise UsageError(
            f"{num_steps} steps with {num_seeds} seeds show no noise", hint="at least 10 steps and 2 seeds"
        )
    report = progress or (lambda what, done, total: None)
    runs = PairedRuns(target, num_steps, weight_decay, betas)
    window = end_window(num_steps)
    total = 2 * num_seeds + len(_RATES)
    pairs = []
    for seed in range(num_seeds):
        report(f"verifying: AdamW, seed {seed}", 2 * seed, total)
        adamw = runs.adamw(seed, lr)
        report(f"verifying: the plan, seed {seed}", 2 * seed + 1, total)
        pairs.append(_pair(seed, adamw, runs.plan(seed, lr, plan), window, lr))
    noise = _noise(pairs, window)
    warnings = _warnings(target, pairs, num_steps, noise)
    for done, factor in enumerate(_RATES):
        report(f"verifying: AdamW at {factor:g} times the learning rate", 2 * num_seeds + done, total)
        other = runs.adamw(0, lr * factor).end(window)
        if other is not None and other < pairs[0].adamw_end - noise:
            warnings.append(
                f"the reference looks badly tuned: AdamW at learning rate {lr * factor:g} ends at {other:.4g}, at "
                f"{lr:g} at {pairs[0].adamw_end:.4g}. Tune it first: beside an untuned reference compression can look "
                "better, or worse, than it is"
            )
    report("verifying", total, total)
    gaps = [pair.gap for pair in pairs if pair.gap is not None]
    gap = math.fsum(gaps) / len(gaps) if len(gaps) == len(pairs) else None
    verdict, words = _verdict(pairs, gap, noise)
    held_out = pairs[0].adamw.validation is not None
    measure = (
        f"Validation loss after {num_steps} steps"
        if held_out
        else f"Mean loss of the last {window} of {num_steps} steps"
    )
    return Verification(num_steps, window, measure, lr, tuple(pairs), gap, noise, verdict, words, tuple(warnings))


# ---------------------------------------------------------------- what it means


def _pair(seed: int, adamw: Side, plan: Side, window: int, lr: float) -> Pair:
    reference = adamw.end(window)
    if reference is None:
        raise UsageError(
            f"AdamW itself does not train at learning rate {lr:g}: {adamw.problem}", hint="give a smaller --lr"
        )
    end = plan.end(window)
    return Pair(seed, adamw, plan, reference, end, None if end is None else end - reference)


def _noise(pairs: Sequence[Pair], window: int) -> float:
    """See the module; a pair whose plan failed counts with its AdamW alone."""
    ends = [pair.adamw_end for pair in pairs]
    gaps = [pair.gap for pair in pairs if pair.gap is not None]
    own = [
        statistics.stdev(a - b for a, b in zip(p.plan.losses[-window:], p.adamw.losses[-window:], strict=True))
        / math.sqrt(window)
        for p in pairs
        if p.gap is not None and p.plan.validation is None
    ]
    return max(statistics.stdev(ends), statistics.stdev(gaps) if len(gaps) > 1 else 0.0, *own, 0.0)


def _verdict(pairs: Sequence[Pair], gap: float | None, noise: float) -> tuple[str, str]:
    if gap is None:
        failed = next(pair for pair in pairs if pair.gap is None)
        return "clearly worse", f"clearly worse: the plan does not train, {failed.plan.problem} (seed {failed.seed})"
    size = f"the plan ends {abs(gap):.2g} {'above' if gap > 0 else 'below'} AdamW"
    compared = f"{abs(gap) / noise:.1f} times the seed noise of {noise:.2g}" if noise > 0 else "no noise was measured"
    everywhere = all(pair.gap is not None and pair.gap > 0 for pair in pairs)
    if gap > 2 * noise and everywhere:
        return "clearly worse", f"clearly worse: {size}, {compared}, on every seed"
    if gap > noise:
        return "perhaps worse", f"perhaps worse: {size}, {compared}; more seeds or steps would tell"
    if gap < -2 * noise and not any(pair.gap is None or pair.gap >= 0 for pair in pairs):
        return "better", f"better here: {size}, {compared}; often a sign of a reference that is not tuned"
    return "no difference seen", f"no difference seen: {size}, {compared}"


def _warnings(target: Target, pairs: Sequence[Pair], num_steps: int, noise: float) -> list[str]:
    few = few_steps(num_steps)
    warnings = [few] if few else []
    told = [pair for pair in pairs if pair.adamw.losses]  # not where only a validation loss is known
    for pair in told:
        if pair.adamw_end >= pair.adamw.losses[0]:
            warnings.append(
                f"the reference looks badly tuned: AdamW did not lower the loss ({pair.adamw.losses[0]:.4g} -> "
                f"{pair.adamw_end:.4g}, seed {pair.seed})"
            )
    if len({pair.adamw.losses[0] for pair in told}) == 1:
        warnings.append(
            f"the seeds change nothing in {target.spec}: it seeds itself and its batches are all alike, so the noise "
            "is understated"
        )
    return warnings
