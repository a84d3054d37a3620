from __future__ import annotations

import math

from reference import first_order

from cases import Case
from memadvise.optim import Lion
from memadvise.plan.schema import Setting

CASE = Case(
    method="lion",
    make=Lion,
    settings=(Setting("lion"),),
    reference=first_order.lion,
    state_bytes=lambda shape, options: 4 * math.prod(shape),
    lr=1e-3,
    scale_invariant=True,
)
