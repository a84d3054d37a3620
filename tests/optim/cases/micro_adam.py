from __future__ import annotations

import math
from typing import Any

from reference import micro_adam

from cases import Case
from memadvise.optim import MicroAdam
from memadvise.plan.schema import Setting


def state_bytes(shape: tuple[int, ...], options: dict[str, Any]) -> int:
    d, block, density = math.prod(shape), options.get("block", 16384), options.get("density", 0.01)
    full, rest = divmod(d, block)
    kept = full * math.ceil(block * density) + math.ceil(rest * density)
    ring = options.get("window", 10) * kept * (2 + {"bf16": 2, "fp32": 4}[options.get("values", "bf16")])
    return 4 + ring + math.ceil(d / 2) + 4 * math.ceil(d / options.get("bucket", 64))


CASE = Case(
    method="micro_adam",
    make=MicroAdam,
    settings=(
        Setting("micro_adam"),
        Setting("micro_adam", {"window": 3, "density": 0.06, "block": 32, "bucket": 8}),
        Setting("micro_adam", {"window": 4, "density": 0.1, "block": 10, "bucket": 20, "bias_correction": "window"}),
        Setting("micro_adam", {"window": 2, "density": 0.1, "block": 16, "bucket": 16, "alpha": 0.5, "values": "fp32"}),
    ),
    reference=micro_adam.run,
    state_bytes=state_bytes,
    lr=1e-2,
    scale_invariant=lambda options: not options.get("alpha"),
)
