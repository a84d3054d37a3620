"""How far a candidate moves a tensor's update from AdamW's, in Adam's own metric.

``abs_d1 = 1/2 sum (u_c - u)^2 sqrt(v_hat)`` with ``u = m_hat / (sqrt(v_hat) + eps)``: the loss that a quadratic model
with curvature ``sqrt(v_hat)`` assigns to the difference of two updates, learning rate factored out, so that tensors can
be compared and added up. Over several hundred training runs this ranked candidates that keep the momentum as well as
seeds allow, and said nothing of those that drop it: being different from Adam is not being worse. These are compared
over :data:`WINDOW` steps, after their learning rate was matched so that they move the weights as far: matching single
updates would leave them at a third of the way, for without momentum updates do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memadvise.ledger import FidelityValue

WINDOW = 24  # steps


def step_sums(u: Tensor, candidate: Tensor, root: Tensor, weight: Tensor | float) -> Tensor:
    """``[sum (u_c - u)^2 sqrt(v_hat), u.u_c, u_c.u_c, u.u]`` in float64; ``root`` is ``sqrt(v_hat)``."""
    error = _sum((candidate - u).square_().mul_(root), weight)
    return torch.stack([error, *(_sum(a * b, weight) for a, b in ((u, candidate), (candidate, candidate), (u, u)))])


def window_sums(x: Tensor, candidate: Tensor, root: Tensor, weight: Tensor | float) -> Tensor:
    """``[x.x, x_c.x_c]`` and, in the metric of ``root``, ``[x.x, x.x_c, x_c.x_c]``; float64."""
    plain = [_sum(a * a, weight) for a in (x, candidate)]
    return torch.stack(
        [*plain, *(_sum((a * b).mul_(root), weight) for a, b in ((x, x), (x, candidate), (candidate,) * 2))]
    )


def _sum(tensor: Tensor, weight: Tensor | float) -> Tensor:
    weighted = tensor * weight if isinstance(weight, Tensor) else tensor
    total = weighted.sum(dtype=torch.float64)
    return total if isinstance(weight, Tensor) else total * weight


@dataclass
class Scores:
    """What was measured of one candidate on one tensor, step by step and window by window."""

    steps: list[tuple[int, list[float]]] = field(default_factory=list)
    windows: list[list[float]] = field(default_factory=list)

    def value(self, candidate: str, first_step: int = 0) -> FidelityValue | None:
        """The means over the recorded steps from ``first_step`` on; None where nothing finite was recorded."""
        kept = [sums for step, sums in self.steps if step >= first_step and all(map(math.isfinite, sums))]
        if not kept:
            return None
        errors = [sums[0] / 2 for sums in kept]
        turns = [one_minus_cos(*sums) for sums in kept]
        half = len(errors) // 2
        halves = (_mean(errors[:half]), _mean(errors[half:])) if half else None
        found = [values for sums in self.windows if all(map(math.isfinite, sums)) and (values := displacement(sums))]
        d24, ratio = (_mean([v[0] for v in found]), _mean([v[1] for v in found])) if found else (None, None)
        return FidelityValue(
            candidate,
            _mean(errors),
            _mean(turns),
            abs_d24=d24,
            displacement_ratio=ratio,
            lr_multiplier=1 / ratio if ratio else None,
            half_scores=halves,
        )


def one_minus_cos(error: float, dot: float, candidate: float, reference: float) -> float:
    """From the sums of :func:`step_sums`; exactly 0 for equal updates, whatever the rounding of the sums says."""
    scale = math.sqrt(candidate * reference)
    if error == 0:
        return 0.0
    return max(0.0, 1 - dot / scale) if scale > 0 else 1.0


def displacement(sums: Sequence[float]) -> tuple[float, float] | None:
    """``abs_d24`` with the matched learning rate, and the displacement ratio; None where one of them stood still."""
    reference, candidate, aa, ab, bb = sums
    if not reference > 0 or not candidate > 0:
        return None
    ratio = math.sqrt(candidate / reference)
    return max(0.0, aa - 2 * ab / ratio + bb / ratio**2) / 2 / WINDOW**2, ratio


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties by their mean rank; None for fewer than three pairs or where all are equal."""
    if len(first) < 3:
        return None
    a, b = _ranks(first), _ranks(second)
    middle = (len(a) + 1) / 2
    products = math.fsum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    squares = math.fsum((x - middle) ** 2 for x in a) * math.fsum((y - middle) ** 2 for y in b)
    return products / math.sqrt(squares) if squares > 0 else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for position in order[start:stop]:
            ranks[position] = (start + stop + 1) / 2
        start = stop
    return ranks
