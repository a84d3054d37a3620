from __future__ import annotations

import math

from reference import adam

from cases import Case
from memadvise.optim import AdamW
from memadvise.plan.schema import Setting

CASE = Case(
    method="adamw",
    make=AdamW,
    settings=(Setting("adamw"),),
    reference=lambda p, gs, lr, betas, eps, wd, options: adam.run(
        p, gs, adam.each(p.shape), lr=lr, betas=betas, eps=eps, weight_decay=wd
    ),
    state_bytes=lambda shape, options: 4 + 8 * math.prod(shape),
    lr=1e-2,
    scale_invariant=True,
    fused=True,
)
