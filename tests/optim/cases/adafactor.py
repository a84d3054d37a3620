from __future__ import annotations

import math

from reference import factored

from cases import Case
from memadvise.optim import Adafactor
from memadvise.plan.schema import Setting


def means(shape: tuple[int, ...]) -> int:
    """Row and column means of the matrices of a shape; a vector has one value a coordinate."""
    if len(shape) < 2:
        return math.prod(shape)
    if len(shape) == 3:
        return shape[0] * (shape[1] + shape[2])
    return shape[0] + math.prod(shape[1:])


CASE = Case(
    method="adafactor",
    make=Adafactor,
    settings=(
        Setting("adafactor"),
        Setting("adafactor", {"step_size": "relative"}),
        Setting("adafactor", {"step_size": "scaled", "momentum": 0.9}),
    ),
    reference=factored.adafactor,
    state_bytes=lambda shape, options: 4 + 4 * means(shape) + 4 * math.prod(shape) * bool(options.get("momentum")),
    lr=3e-2,
    scale_invariant=True,
)
