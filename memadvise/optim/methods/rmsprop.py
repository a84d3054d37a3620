"""RMSprop (Tieleman and Hinton 2012, Lecture 6.5; arXiv 1308.0850), its second moment held in any of the stores.

::

    v <- b2 v + (1 - b2) g^2;  p <- p (1 - lr wd) - lr g / (sqrt(v) + eps)
    with momentum mu:          b <- mu b + g / (sqrt(v) + eps);  p <- p (1 - lr wd) - lr b

``store: dense`` is torch.optim.RMSprop with ``alpha = b2`` (no bias correction, eps outside the root). ``mean``,
``factored`` and ``lowrank`` hold less; :mod:`memadvise.optim.methods.stores` says how, what each divides by and what
a gradient with NaN does. 0-D, 1-D and one-sided tensors are dense.

State: for ``[M, N]``, 4 M N bytes dense, 4 a kept entry with mean, 4 (M + N) factored, 4 + 4 k (M + N) with lowrank;
4 M N more with momentum. b1 is not used.
Defaults are torch's: lr 1e-2, alpha 0.99 (betas (0.9, 0.99)), eps 1e-8, weight decay 0; rank a quarter of the smaller
side as in Adapprox, by 2 power iterations from the last factors (as good as Adapprox's 5 from random ones).

Deviations from torch: weight decay is decoupled, not added to the gradient; no ``centered``; state in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memadvise.optim.method import Context, Hyper, Part, Shape, StateSpec, Tensors
from memadvise.optim.methods.sgd import SGDOptions
from memadvise.optim.methods.stored import STORE_HELP, StoredMethod, StoreOptions
from memadvise.optim.methods.stores import Mix


@dataclass(frozen=True)
class RMSpropOptions(StoreOptions):
    """``momentum`` in [0, 1), beside those of the store."""

    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        SGDOptions(self.momentum)


class RMSprop(StoredMethod):
    """Gradients over the root of their average square."""

    name = "rmsprop"
    summary = "gradients over the root of their average square, which may be held as means or factors"
    source = "arXiv 1308.0850"
    options_type = RMSpropOptions
    options_help: ClassVar[dict[str, str]] = {**STORE_HELP, "momentum": "heavy-ball momentum, 0 for none"}
    bytes_help = "4 bytes a parameter; far fewer with store: mean, factored or lowrank"
    default_lr = 1e-2
    default_betas = (0.9, 0.99)
    default_weight_decay = 0.0

    def mix(self, h: Hyper) -> Mix:
        return Mix(h.beta2, 1 - h.beta2)

    def spec(self, shape: Shape, options: RMSpropOptions, dtype: torch.dtype) -> dict[str, StateSpec]:
        spec = super().spec(shape, options, dtype)
        if options.momentum:
            spec["momentum_buffer"] = StateSpec(shape, dtype, elementwise=True, moment="first")
        return spec

    def update(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        v, new = self.second(part, ctx)
        u = part.g / v.sqrt().add_(ctx.h.eps)
        if ctx.options.momentum:
            u = new["momentum_buffer"] = part.state["momentum_buffer"] * ctx.options.momentum + u
        return u * ctx.h.lr, new

    def momentum(self, options: Any) -> bool:
        return bool(options.momentum > 0)
