"""Adafactor and CAME as plain optimizers."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from memadvise.optim.classes.base import PlainOptimizer
from memadvise.optim.compose import Common
from memadvise.optim.optimizer import Params


class Adafactor(PlainOptimizer):
    """A factored second moment for matrices, a full one for vectors. ``betas`` and ``eps`` are unused."""

    method = "adafactor"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        step_size: str = "lr",
        momentum: float = 0.0,
        clip: float = 1.0,
        beta2_decay: float = -0.8,
        eps1: float = 1e-30,
        eps2: float = 1e-3,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "step_size": step_size, "momentum": momentum, "clip": clip,
            "beta2_decay": beta2_decay, "eps1": eps1, "eps2": eps2,
        }  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, options,
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip


class CAME(PlainOptimizer):
    """A factored second moment and instability for matrices, a full second moment for vectors. ``eps`` is unused."""

    method = "came"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 5e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        beta3: float = 0.9999,
        correct_instability: bool = False,
        clip: float = 1.0,
        eps1: float = 1e-30,
        eps2: float = 1e-16,
        compat: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "beta3": beta3, "correct_instability": correct_instability, "clip": clip,
            "eps1": eps1, "eps2": eps2, "compat": compat,
        }  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, options,
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip
