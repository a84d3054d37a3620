"""memadvise: where the bytes of a training step go, and the least harmful way to make it fit.

The public names load lazily, so that ``import memadvise`` and ``memadvise --help`` do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memadvise.batches import split_batch
    from memadvise.optim.create import create_optimizer
    from memadvise.plan.load import load_plan
    from memadvise.switches import apply_checkpoint
    from memadvise.target import Target, load_target

_LAZY = {
    "Target": "memadvise.target",
    "load_target": "memadvise.target",
    "load_plan": "memadvise.plan.load",
    "create_optimizer": "memadvise.optim.create",
    "apply_checkpoint": "memadvise.switches",
    "split_batch": "memadvise.batches",
}

__all__ = ["Target", "__version__", "apply_checkpoint", "create_optimizer", "load_plan", "load_target", "split_batch"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'memadvise' has no attribute '{name}'")
