from __future__ import annotations

import math

from reference import factored

from cases import Case
from cases.adafactor import means
from memadvise.optim import CAME
from memadvise.plan.schema import Setting

CASE = Case(
    method="came",
    make=CAME,
    settings=(
        Setting("came", {"correct_instability": True}),
        Setting("came", {"beta3": 0.999}),
    ),
    reference=factored.came,
    state_bytes=lambda shape, options: 4 + 4 * math.prod(shape) + 4 * means(shape) * (2 if len(shape) > 1 else 1),
    lr=3e-3,
    scale_invariant=True,
)
