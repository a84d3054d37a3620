"""Optimizers with less state: one engine, every parameter its own method. Needs torch only.

The names load lazily: the registry of methods is wanted without the optimizer classes, and the other way round.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memadvise.optim import release
    from memadvise.optim.classes.adam import AdamMini, AdamW, AdamW4bit, AdamW8bit, SlimAdam
    from memadvise.optim.classes.factored import CAME, Adafactor
    from memadvise.optim.classes.first_order import SGD, Lion
    from memadvise.optim.classes.lowrank import Adagrad, Adapprox, RMSprop
    from memadvise.optim.classes.micro import MicroAdam
    from memadvise.optim.classes.projected import APOLLO, APOLLOMini, GaLore
    from memadvise.optim.create import bind_plan, create_optimizer
    from memadvise.optim.int8_weights import Int8Weight, dequantize_weights, quantize_weights
    from memadvise.optim.optimizer import MemadviseOptimizer

_LAZY = {
    "APOLLO": "classes.projected",
    "APOLLOMini": "classes.projected",
    "Adafactor": "classes.factored",
    "CAME": "classes.factored",
    "AdamMini": "classes.adam",
    "AdamW": "classes.adam",
    "AdamW4bit": "classes.adam",
    "AdamW8bit": "classes.adam",
    "Adagrad": "classes.lowrank",
    "Adapprox": "classes.lowrank",
    "GaLore": "classes.projected",
    "Lion": "classes.first_order",
    "RMSprop": "classes.lowrank",
    "SGD": "classes.first_order",
    "SlimAdam": "classes.adam",
    "MemadviseOptimizer": "optimizer",
    "MicroAdam": "classes.micro",
    "Int8Weight": "int8_weights",
    "bind_plan": "create",
    "create_optimizer": "create",
    "dequantize_weights": "int8_weights",
    "quantize_weights": "int8_weights",
}

__all__ = [
    "APOLLO",
    "CAME",
    "SGD",
    "APOLLOMini",
    "Adafactor",
    "Adagrad",
    "AdamMini",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "Adapprox",
    "GaLore",
    "Int8Weight",
    "Lion",
    "MemadviseOptimizer",
    "MicroAdam",
    "RMSprop",
    "SlimAdam",
    "bind_plan",
    "create_optimizer",
    "dequantize_weights",
    "quantize_weights",
    "release",
]


def __getattr__(name: str) -> Any:
    if name == "release":
        return importlib.import_module("memadvise.optim.release")
    if name in _LAZY:
        return getattr(importlib.import_module(f"memadvise.optim.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'memadvise.optim' has no attribute '{name}'")
