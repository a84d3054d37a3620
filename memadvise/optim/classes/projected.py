"""APOLLO, APOLLO-Mini and GaLore as plain optimizers."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from memadvise.optim.classes.base import PlainOptimizer
from memadvise.optim.compose import Common
from memadvise.optim.optimizer import Params


class APOLLO(PlainOptimizer):
    """One step size a channel, from a randomly projected gradient; 0-D and 1-D tensors keep dense AdamW state.

    Every matrix is projected, embedding tables and output heads too, which the paper leaves to AdamW: the class knows
    parameters, not what they are for. Give those a group of their own::

        APOLLO([{"params": hidden}, {"params": tables, "method": "adamw", "lr": 1e-3}])
    """

    method = "apollo"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        scaling: str = "channel",
        scale: float = 1.0,
        projection: str = "gaussian",
        update_every: int = 200,
        limiter: float | None = 1.01,
        limiter_floor: float = 1e-6,
        limiter_on: str = "raw",
        compat: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "compat": compat, "rank": rank, "scaling": scaling, "scale": scale, "projection": projection,
            "update_every": update_every, "limiter": limiter, "limiter_floor": limiter_floor, "limiter_on": limiter_on,
        }  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, options,
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip


class APOLLOMini(PlainOptimizer):
    """One step size a matrix, from a gradient projected to rank 1; 0-D and 1-D tensors keep dense AdamW state.

    Every matrix is projected, embedding tables and output heads too, which the paper leaves to AdamW: the class knows
    parameters, not what they are for. Give those a group of their own::

        APOLLOMini([{"params": hidden}, {"params": tables, "method": "adamw", "lr": 1e-3}])
    """

    method = "apollo_mini"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        scale: float = 128.0,
        projection: str = "gaussian",
        update_every: int = 200,
        limiter: float | None = 1.01,
        limiter_floor: float = 1e-6,
        limiter_on: str = "raw",
        compat: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "compat": compat, "scale": scale, "projection": projection, "update_every": update_every,
            "limiter": limiter, "limiter_floor": limiter_floor, "limiter_on": limiter_on,
        }  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, options,
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip


class GaLore(PlainOptimizer):
    """Adam in the gradient's leading singular subspace; 0-D and 1-D tensors keep dense AdamW state.

    Every matrix is projected, embedding tables and output heads too, which the paper leaves to AdamW: the class knows
    parameters, not what they are for. Give those a group of their own::

        GaLore([{"params": hidden}, {"params": tables, "method": "adamw", "lr": 1e-3}])
    """

    method = "galore"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        scale: float = 0.25,
        update_every: int = 200,
        stagger: bool = True,
        compat: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "compat": compat, "rank": rank, "scale": scale, "update_every": update_every, "stagger": stagger,
        }  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, options,
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip
