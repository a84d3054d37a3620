"""MicroAdam as a plain optimizer."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from memadvise.optim.classes.base import PlainOptimizer
from memadvise.optim.compose import Common
from memadvise.optim.optimizer import Params


class MicroAdam(PlainOptimizer):
    """Adam on a window of the largest gradients, of every parameter; what they leave out is fed back in 4 bits."""

    method = "micro_adam"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        window: int = 10,
        density: float = 0.01,
        block: int = 16384,
        bucket: int = 64,
        bias_correction: str = "paper",
        alpha: float = 0.0,
        values: str = "bf16",
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "window": window, "density": density, "block": block, "bucket": bucket,
            "bias_correction": bias_correction, "alpha": alpha, "values": values,
        }  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, options,
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip
