"""AdamW (arXiv 1711.05101, Algorithm 2): both moments in full.

::

    p <- p (1 - lr wd);  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

State: 8 bytes a parameter (float32), whatever the parameter's dtype, and 4 for the step.
Defaults are torch.optim.AdamW's: lr 1e-3, betas (0.9, 0.999), eps 1e-8, weight decay 0.01.

Deviation: torch keeps the moments of bfloat16 and float16 parameters in their dtype, where beta2 = 0.999 freezes v
(0.999 v rounds back to v); here they are float32. float32 and float64 parameters run the very op of
``torch.optim.AdamW(fused=True)`` and agree with it bit for bit. No amsgrad, no maximize.

``compat: official`` is the AdamW inside the official C-AdamW, APOLLO and GaLore code: eps is added to sqrt(v) before
the bias correction (so it weighs ``eps / sqrt(1 - b2^t)``); their default eps is 1e-6.

With a moment held in fewer bits (``first_moment``, ``second_moment``: see :mod:`memadvise.optim.codecs`) m and v no
longer fit each other exactly, and where a gradient is small beside its block's |m| / sqrt(v) can come out tens of times
too large. No gradients at all make it larger than C(b1, b2) (:func:`.blockmean.update_bound`, 7.27 by default), so
that the update is cut there.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from memadvise.optim.method import STEP, Context, Hyper, Method, Part, Shape, StateSpec, Tensors
from memadvise.optim.methods.blockmean import COMPAT_HELP, CompatOptions, adam_scalars, update_bound


class AdamW(Method):
    """Both moments in full."""

    name = "adamw"
    summary = "both moments in full: the yardstick"
    source = "arXiv 1711.05101"
    options_type = CompatOptions
    options_help: ClassVar[dict[str, str]] = {"compat": COMPAT_HELP}
    bytes_help = "8 bytes a parameter"

    def traceable(self, shape: Shape, options: Any) -> bool:
        return True

    def spec(self, shape: Shape, options: Any, dtype: torch.dtype) -> dict[str, StateSpec]:
        return {
            "step": STEP,
            "exp_avg": StateSpec(shape, dtype, elementwise=True, moment="first"),
            "exp_avg_sq": StateSpec(shape, dtype, elementwise=True, moment="second"),
        }

    def scalars(self, step: Tensor, h: Hyper, options: Any) -> Tensors:
        return adam_scalars(step, h)

    def direction(self, part: Part, ctx: Context) -> Tensor:
        return torch.lerp(part.state["exp_avg"], part.g, 1 - ctx.h.beta1)  # divided by something positive

    def update(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        g, h, small = part.g, ctx.h, part.small
        m = torch.lerp(part.state["exp_avg"], g, 1 - h.beta1)
        v = part.state["exp_avg_sq"] * h.beta2 + (1 - h.beta2) * g * g
        if ctx.options.compat:
            u = m / (v.sqrt() + h.eps) * small["bias2_sqrt"]
        else:
            u = m / (v.sqrt() / small["bias2_sqrt"] + h.eps)
        if ctx.coded and (bound := update_bound(h.beta1, h.beta2)) < math.inf:
            return u.div_(small["bias1"]).clamp_(-bound, bound) * h.lr, {"exp_avg": m, "exp_avg_sq": v}
        return u * small["step_size"], {"exp_avg": m, "exp_avg_sq": v}

    def second_moment(self, v: Tensor, options: Any) -> Tensor | None:
        return v
