"""Lion (arXiv 2302.06675, Algorithm 2): the sign of a momentum, a yardstick with one moment.

::

    p <- p (1 - lr wd);  p <- p - lr sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g          sign(0) = 0

State: 4 bytes a parameter, no step (nothing is bias-corrected). Defaults are the paper's: lr 1e-4,
betas (0.9, 0.99), weight decay 0; it wants a learning rate 3 to 10 times smaller than AdamW's (we compare at 0.1),
and a weight decay as many times larger. ``eps`` is not used. Deviation: m in float32 whatever the parameter's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memadvise.optim.method import Context, Method, Part, Shape, StateSpec, Tensors


class Lion(Method):
    """The sign of a momentum."""

    name = "lion"
    summary = "the sign of a momentum: one moment, smaller learning rates"
    source = "arXiv 2302.06675"
    bytes_help = "4 bytes a parameter"
    default_lr = 1e-4
    default_betas = (0.9, 0.99)
    default_weight_decay = 0.0
    lr_factor = 0.1

    def traceable(self, shape: Shape, options: Any) -> bool:
        return True

    def spec(self, shape: Shape, options: Any, dtype: torch.dtype) -> dict[str, StateSpec]:
        return {"exp_avg": StateSpec(shape, dtype, elementwise=True, moment="first")}

    def direction(self, part: Part, ctx: Context) -> Tensor:
        return torch.lerp(part.state["exp_avg"], part.g, 1 - ctx.h.beta1)

    def update(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        m, h = part.state["exp_avg"], ctx.h
        u = torch.lerp(m, part.g, 1 - h.beta1).sign()
        return u * h.lr, {"exp_avg": torch.lerp(m, part.g, 1 - h.beta2)}
