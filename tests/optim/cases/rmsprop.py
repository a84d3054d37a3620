from __future__ import annotations

from reference import lowrank

from cases import Case
from memadvise.optim import RMSprop
from memadvise.plan.schema import Setting

CASE = Case(
    method="rmsprop",
    make=RMSprop,
    settings=(
        Setting("rmsprop", {"store": "dense"}),
        Setting("rmsprop", {"store": "mean", "axes": [1], "momentum": 0.9}),
        Setting("rmsprop", {"store": "factored"}),
        Setting("rmsprop", {"store": "lowrank", "rank": 2}),
    ),
    reference=lowrank.rmsprop,
    state_bytes=lowrank.stored_bytes,
    lr=1e-2,
    scale_invariant=True,
    random=lambda options: options["store"] == "lowrank",
)
