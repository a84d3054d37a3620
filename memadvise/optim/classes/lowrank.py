"""Adapprox, RMSprop and Adagrad as plain optimizers: second moments as factors, means or in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

from torch import Tensor

from memadvise.optim.classes.base import PlainOptimizer
from memadvise.optim.compose import Common
from memadvise.optim.optimizer import Params


class Adapprox(PlainOptimizer):
    """Adam-like, the second moment of matrices held as factors of adaptive rank."""

    method = "adapprox"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        rank: float | str | None = None,
        rank_init: int | None = None,
        rank_min: int = 1,
        error_threshold: float = 0.01,
        adapt_every: int = 10,
        refresh_every: int = 1,
        stagger: bool = False,
        increment: str | Callable[[float], float] = "logistic",
        power_iterations: int = 5,
        oversampling: int = 5,
        truncation: str = "columns",
        warm_start: bool = False,
        clip: float = 1.0,
        guidance: bool = False,
        guidance_max: float = 2.0,
        momentum: bool = True,
        adam: bool = False,
        floor: float = 0.1,
        store: str = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "rank": rank, "rank_init": rank_init, "rank_min": rank_min, "error_threshold": error_threshold,
            "adapt_every": adapt_every, "refresh_every": refresh_every, "stagger": stagger, "increment": increment,
            "power_iterations": power_iterations, "oversampling": oversampling, "truncation": truncation,
            "warm_start": warm_start, "clip": clip, "guidance": guidance, "guidance_max": guidance_max,
            "momentum": momentum, "adam": adam, "floor": floor, "store": store,
        }  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, options,
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip


class RMSprop(PlainOptimizer):
    """torch.optim.RMSprop (``alpha`` is ``betas[1]``), the average square held in full, as means or factors."""

    method = "rmsprop"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        store: str = "dense",
        axes: Sequence[int] | None = None,
        rank: float | str | None = None,
        momentum: float = 0.0,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, {"store": store, "axes": axes, "rank": rank, "momentum": momentum},
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip


class Adagrad(PlainOptimizer):
    """torch.optim.Adagrad, the sum of squares held in full, as means or factors. ``betas`` are unused."""

    method = "adagrad"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        *,
        store: str = "dense",
        axes: Sequence[int] | None = None,
        rank: float | str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, {"store": store, "axes": axes, "rank": rank},
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip
