"""What a probe says of itself: whether its numbers can be trusted, and whether the training it watched went well."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from memadvise.advise.candidates import tier
from memadvise.ledger import FidelityValue
from memadvise.optim.convert import setting_of
from memadvise.plan.schema import Setting
from memadvise.probe.fidelity import spearman

AGREEMENT = 0.95  # rank correlation of the two halves of the window
EIGHT_BIT = 0.01  # 1 - cos at which a shadow in 8 bits would not be what it should
_EIGHT_BITS = ("int8", "dynamic8")
_SPIKE = 1.1


def is_eight_bit(setting: Setting) -> bool:
    """AdamW with both moments in 8 bits: known to train as in full, so known what its score should be."""
    moments = [setting.options.get(option) for option in ("first_moment", "second_moment")]
    return setting.method == "adamw" and all(moment in _EIGHT_BITS for moment in moments)


def eight_bit_problems(values: Mapping[str, Sequence[FidelityValue]]) -> list[str]:
    """One sentence for every tensor whose 8-bit shadow strayed from AdamW; ``values`` by parameter."""
    return [
        f"self-check failed: on {name}, AdamW in 8 bits ({value.candidate}) turns the update by 1-cos = "
        f"{value.one_minus_cos:.2g}, above {EIGHT_BIT}; do not trust what was measured of this tensor"
        for name, found in values.items()
        for value in found
        if is_eight_bit(setting_of(value.candidate)) and not value.one_minus_cos < EIGHT_BIT
    ]


def rank_agreement(values: Iterable[FidelityValue]) -> float | None:
    """Spearman's correlation of ``abs_d1`` in the first and in the second half of the window, candidates of tier 1."""
    halves = [v.half_scores for v in values if v.half_scores is not None and tier(setting_of(v.candidate)) == 1]
    return spearman([first for first, _ in halves], [second for _, second in halves])


def training_problems(losses: Sequence[float], warmup: int, lr: float, *, from_start: bool = True) -> list[str]:
    """What a loss curve says against the run it comes from; sentences, none for a run that looks well.

    ``from_start``: the run began with fresh weights, so that its loss should fall.

    Advice holds for the training that was watched: after too short a warm-up or with too high a rate, damping Adam
    anywhere helps, and compression looks better than it is.
    """
    count = max(1, len(losses) // 10)
    if len(losses) < 2 * count or len(losses) < 4:
        return []
    first, last = (math.fsum(part) / count for part in (losses[:count], losses[-count:]))
    if last > first + 0.1 * abs(first):
        return [
            f"the loss rose from {first:.4g} to {last:.4g} at learning rate {lr:g}: the statistics describe a "
            "diverging run; probe with a smaller learning rate"
        ]
    found = []
    noise = _noise(losses)
    resolved = max(noise * math.sqrt(2 / count), 1e-3 * abs(first))
    if from_start and len(losses) >= 20 and last > first - resolved:
        found.append(
            f"the loss did not fall ({first:.4g} to {last:.4g} in {len(losses)} steps at learning rate {lr:g}): "
            "is the learning rate right? Advice is for the training that was watched"
        )
    after = list(losses[warmup:])
    if len(after) >= 10:
        lowest = after[0]
        for step, loss in enumerate(after[1:], start=warmup + 1):
            if loss > lowest + max(6 * noise, 0.25 * abs(first - min(losses))) and loss > _SPIKE * lowest:
                found.append(
                    f"the loss jumped from {lowest:.4g} to {loss:.4g} at step {step}, after the warm-up: the learning "
                    "rate looks too high or the warm-up too short, and compression then looks better than it is"
                )
                break
            lowest = min(lowest, loss)
    return found


def _noise(losses: Sequence[float]) -> float:
    """Standard deviation from step to step, its trend left out: of differences of neighbours, by their median."""
    differences = [abs(b - a) for a, b in itertools.pairwise(losses)]
    return statistics.median(differences) / 0.954 if differences else 0.0  # median of |N(0, 2 s^2)| is 0.954 s


def idle_problem(updates: int, idle: int) -> str | None:
    """What a learning rate of 0 means for the probe."""
    if not idle:
        return None
    if idle == updates:
        return (
            "the learning rate was 0 in every step: the weights never moved, so the statistics are of the start alone; "
            "give the schedule a rate above 0, or probe further into it"
        )
    return f"the learning rate was 0 in {idle} of {updates} steps: the weights stood still in these"
