from __future__ import annotations

from functools import partial

from reference import apollo

from cases import Case
from cases.apollo import state_bytes
from memadvise.optim import APOLLOMini
from memadvise.plan.schema import Setting

CASE = Case(
    method="apollo_mini",
    make=APOLLOMini,
    settings=(
        Setting("apollo_mini", {"update_every": 3}),
        Setting("apollo_mini", {"projection": "sketch", "limiter_floor": 0.0}),
    ),
    reference=partial(apollo.run, mini=True),
    state_bytes=partial(state_bytes, rank=1),
    lr=3e-3,  # the scale of 128 is meant for sides of some hundreds
    scale_invariant=True,
    random=lambda options: True,
)
