"""Lion and SGD as plain optimizers."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from memadvise.optim.classes.base import PlainOptimizer
from memadvise.optim.compose import Common
from memadvise.optim.optimizer import Params


class Lion(PlainOptimizer):
    """The sign of a momentum. ``eps`` is accepted and unused."""

    method = "lion"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, {}, foreach=foreach, fused=fused, executor=executor, common=common
        )


class SGD(PlainOptimizer):
    """Heavy-ball momentum with decoupled weight decay. ``betas`` and ``eps`` are unused."""

    method = "sgd"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.9,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, {"momentum": momentum},
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip
