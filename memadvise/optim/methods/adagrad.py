"""Adagrad, its sum of squares held in any of the stores (Duchi, Hazan, Singer, JMLR 12, 2011; arXiv 1002.4908).

::

    v <- v + g^2;  p <- p (1 - lr wd) - lr g / (sqrt(v) + eps)

``store: dense`` is torch.optim.Adagrad. ``mean``, ``factored`` and ``lowrank`` hold less;
:mod:`memadvise.optim.methods.stores` says how, what each divides by and what a gradient with NaN does. 0-D, 1-D and
one-sided tensors are dense. With low rank ``|g| / sqrt(v) <= 1`` as with dense, whatever the factors lost.

State: for ``[M, N]``, 4 M N bytes dense, 4 a kept entry with mean, 4 (M + N) factored, 4 + 4 k (M + N) with lowrank.
Defaults are torch's: lr 1e-2, eps 1e-10, weight decay 0; in comparisons 10 times AdamW's learning rate, since the sum
only grows; rank a quarter of the smaller side as in Adapprox, by 2 power iterations from the last factors. ``betas``
are not used.

Deviations from torch: weight decay is decoupled, not added to the gradient; no ``lr_decay`` (a scheduler does that) and
no initial value of the sum; state in float32.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from memadvise.optim.method import Context, Hyper, Part, Tensors
from memadvise.optim.methods.stored import STORE_HELP, StoredMethod
from memadvise.optim.methods.stores import Mix


class Adagrad(StoredMethod):
    """Gradients over the root of the sum of their squares."""

    name = "adagrad"
    summary = "gradients over the root of the sum of their squares, which may be held as means or factors"
    source = "arXiv 1002.4908"
    options_help: ClassVar[dict[str, str]] = dict(STORE_HELP)
    bytes_help = "4 bytes a parameter; far fewer with store: mean, factored or lowrank"
    default_lr = 1e-2
    default_eps = 1e-10
    default_weight_decay = 0.0
    lr_factor = 10.0

    def mix(self, h: Hyper) -> Mix:
        return Mix(1.0, 1.0)

    def update(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        v, new = self.second(part, ctx)
        return part.g / v.sqrt().add_(ctx.h.eps) * ctx.h.lr, new

    def momentum(self, options: Any) -> bool:
        return False
