"""One declaration for each method: what the contract suite, the byte tests and the executor tests run over.

A new method adds one file here with a ``CASE``; :func:`all_cases` finds it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.plan.schema import Setting

# (p, gradients, lr, betas, eps, weight_decay, options) -> p after each step, all float64
Reference = Callable[[Tensor, Sequence[Tensor], float, tuple[float, float], float, float, dict[str, Any]], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """``settings`` fit every parameter of :class:`model.Toy` (0-D and 1-D ones by falling back to dense state)."""

    method: str
    make: type[MemadviseOptimizer]
    settings: tuple[Setting, ...]
    reference: Reference
    state_bytes: Callable[[tuple[int, ...], dict[str, Any]], int]  # closed form, float32
    lr: float
    scale_invariant: bool | Callable[[dict[str, Any]], bool]  # the options of a setting -> whether
    fused: bool = False
    random: Callable[[dict[str, Any]], bool] = lambda options: False  # draws numbers, by the parameter's name
    rare_scratch: str = ""  # why some steps need far more scratch than the second one, which is measured


def all_cases() -> tuple[Case, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"cases.{name}").CASE for name in names)


def all_settings() -> list[tuple[Case, Setting]]:
    return [(case, setting) for case in all_cases() for setting in case.settings]


SETTINGS = all_settings()
IDS = [setting.key for _, setting in SETTINGS]
every_setting = pytest.mark.parametrize(("case", "setting"), SETTINGS, ids=IDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
