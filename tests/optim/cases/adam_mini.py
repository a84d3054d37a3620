from __future__ import annotations

import math

from reference import adam

from cases import Case
from memadvise.optim import AdamMini
from memadvise.plan.schema import Setting

CASE = Case(
    method="adam_mini",
    make=AdamMini,
    settings=(
        Setting("adam_mini", {"partition": "row"}),
        Setting("adam_mini", {"partition": "column"}),
        Setting("adam_mini", {"partition": "whole"}),
        Setting("adam_mini", {"partition": "head", "heads": 4}),
        Setting("adam_mini", {"partition": "row", "axis": 1}),
    ),
    reference=lambda p, gs, lr, betas, eps, wd, options: adam.run(
        p, gs, adam.partition(p.shape, **options), lr=lr, betas=betas, eps=eps, weight_decay=wd
    ),
    state_bytes=lambda shape, options: 4 + 4 * math.prod(shape) + 4 * len(adam.partition(shape, **options)),
    lr=1e-2,
    scale_invariant=True,
)
