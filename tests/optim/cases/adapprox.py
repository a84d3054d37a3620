from __future__ import annotations

from reference import lowrank

from cases import Case
from memadvise.optim import Adapprox
from memadvise.plan.schema import Setting

CASE = Case(
    method="adapprox",
    make=Adapprox,
    settings=(
        Setting("adapprox", {"rank": 3, "error_threshold": 0.3, "adapt_every": 2}),
        Setting("adapprox", {"rank": 2, "momentum": False, "adapt_every": 0, "oversampling": 2, "truncation": "svd"}),
        Setting("adapprox", {"rank": 2, "adam": True, "increment": "one_shot", "warm_start": True}),
        Setting("adapprox", {"rank": 3, "error_threshold": 0.3, "adapt_every": 2, "refresh_every": 3}),
        Setting("adapprox", {"rank": 3, "guidance": True, "clip": 0.5, "increment": "double", "stagger": True}),
    ),
    reference=lowrank.adapprox,
    state_bytes=lowrank.adapprox_bytes,
    lr=1e-2,
    scale_invariant=True,
    random=lambda options: True,
)
