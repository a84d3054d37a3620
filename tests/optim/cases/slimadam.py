from __future__ import annotations

import math

from reference import adam

from cases import Case
from memadvise.optim import SlimAdam
from memadvise.plan.schema import Setting

CASE = Case(
    method="slimadam",
    make=SlimAdam,
    settings=tuple(Setting("slimadam", {"axes": list(axes)}) for axes in ((1,), (0,), (0, 1))),
    reference=lambda p, gs, lr, betas, eps, wd, options: adam.run(
        p, gs, adam.over_axes(p.shape, options["axes"]), lr=lr, betas=betas, eps=eps, weight_decay=wd
    ),
    state_bytes=lambda shape, options: 4 + 4 * math.prod(shape) + 4 * len(adam.over_axes(shape, options["axes"])),
    lr=1e-2,
    scale_invariant=True,
)
