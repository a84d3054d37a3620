from __future__ import annotations

import math

from reference import first_order

from cases import Case
from memadvise.optim import SGD
from memadvise.plan.schema import Setting

CASE = Case(
    method="sgd",
    make=SGD,
    settings=(Setting("sgd", {"momentum": 0.9}), Setting("sgd", {"momentum": 0})),
    reference=first_order.sgd,
    state_bytes=lambda shape, options: 4 * math.prod(shape) if options["momentum"] else 0,
    lr=1e-2,
    scale_invariant=False,
)
