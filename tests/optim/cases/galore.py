from __future__ import annotations

import math
from typing import Any

from reference import galore

from cases import Case
from memadvise.optim import GaLore
from memadvise.plan.schema import Setting


def state_bytes(shape: tuple[int, ...], options: dict[str, Any]) -> int:
    """4 (2 n r + m r) for each matrix, and the step; AdamW's where a side is 1."""
    batch, rows, columns = 1, *shape[:1], math.prod(shape[1:])
    if len(shape) == 3:
        batch, rows, columns = shape
    n, m = max(rows, columns), min(rows, columns)
    if m == 1:
        return 4 + 8 * batch * n
    rank = options.get("rank") or max(m // 4, 1)
    return 4 + 4 * batch * rank * (2 * n + m)


CASE = Case(
    method="galore",
    make=GaLore,
    settings=(
        Setting("galore", {"rank": 4, "update_every": 9}),
        Setting("galore", {"rank": 3, "update_every": 3}),
        Setting("galore", {"rank": 2, "update_every": 2, "stagger": False, "scale": 1.0}),
    ),
    reference=galore.run,
    state_bytes=state_bytes,
    lr=1e-2,
    scale_invariant=True,
    random=lambda options: options.get("stagger", True),
    rare_scratch="a new subspace takes m x m matrices, once in 200 steps",
)
