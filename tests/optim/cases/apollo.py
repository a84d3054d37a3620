from __future__ import annotations

import math
from typing import Any

from reference import apollo

from cases import Case
from memadvise.optim import APOLLO
from memadvise.plan.schema import Setting


def state_bytes(shape: tuple[int, ...], options: dict[str, Any], rank: int | None = None) -> int:
    """8 n r and 12 for each matrix (the step is shared); AdamW's where a side is 1."""
    batch, rows, columns = 1, *shape[:1], math.prod(shape[1:])
    if len(shape) == 3:
        batch, rows, columns = shape
    n, m = max(rows, columns), min(rows, columns)
    if m == 1:
        return 4 + 8 * batch * n
    rank = rank or options.get("rank") or max(m // 4, 1)
    limiter = 0 if options.get("limiter", 1.01) is None else 8 if options.get("limiter_floor", 1e-6) else 4
    return 4 + batch * (8 * n * rank + limiter)


CASE = Case(
    method="apollo",
    make=APOLLO,
    settings=(
        Setting("apollo", {"rank": 4, "update_every": 3}),
        Setting("apollo", {"rank": 2, "projection": "sketch", "update_every": 3}),
        Setting("apollo", {"rank": 3, "scaling": "tensor", "limiter_on": "corrected", "scale": 2.0}),
        Setting("apollo", {"rank": 3, "projection": "sketch", "limiter": None}),
    ),
    reference=apollo.run,
    state_bytes=state_bytes,
    lr=1e-2,
    scale_invariant=True,
    random=lambda options: True,
)
