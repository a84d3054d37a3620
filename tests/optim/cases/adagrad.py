from __future__ import annotations

from reference import lowrank

from cases import Case
from memadvise.optim import Adagrad
from memadvise.plan.schema import Setting

CASE = Case(
    method="adagrad",
    make=Adagrad,
    settings=(
        Setting("adagrad", {"store": "dense"}),
        Setting("adagrad", {"store": "lowrank", "rank": 2}),
    ),
    reference=lowrank.adagrad,
    state_bytes=lowrank.stored_bytes,
    lr=3e-2,
    scale_invariant=True,
    random=lambda options: options["store"] == "lowrank",
)
