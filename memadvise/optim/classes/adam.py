"""AdamW, SlimAdam and Adam-mini as plain optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

from torch import Tensor

from memadvise.optim.classes.base import PlainOptimizer
from memadvise.optim.compose import Common
from memadvise.optim.optimizer import Params


class AdamW(PlainOptimizer):
    """torch.optim.AdamW, bit for bit (fused), with float32 state for every parameter dtype."""

    method = "adamw"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        compat: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, {"compat": compat},
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip


class AdamW8bit(AdamW):
    """AdamW with both moments of matrices in 8 bits (arXiv 2110.02861, :mod:`memadvise.optim.codecs.dynamic8`)."""

    preset: ClassVar[Common] = {"first_moment": "dynamic8", "second_moment": "dynamic8"}


class AdamW4bit(AdamW):
    """AdamW with both moments of matrices in 4 bits (arXiv 2309.01507, :mod:`memadvise.optim.codecs.int4`)."""

    preset: ClassVar[Common] = {"first_moment": "int4", "second_moment": "int4"}


class SlimAdam(PlainOptimizer):
    """Adam with the second moment of matrices averaged over ``axes``; 0-D and 1-D tensors keep dense AdamW state."""

    method = "slimadam"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        axes: Sequence[int] = (1,),
        compat: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, {"axes": axes, "compat": compat},
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip


class AdamMini(PlainOptimizer):
    """Adam with one second moment a block of matrices; 0-D and 1-D tensors keep dense AdamW state."""

    method = "adam_mini"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        partition: str = "row",
        heads: int | None = None,
        segments: Sequence[Sequence[int]] = (),
        axis: int = 0,
        compat: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        options = {"partition": partition, "heads": heads, "segments": segments, "axis": axis, "compat": compat}
        super().__init__(
            params, lr, betas, eps, weight_decay, options,
            foreach=foreach, fused=fused, executor=executor, common=common,
        )  # fmt: skip
