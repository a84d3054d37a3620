"""Adafactor (arXiv 1804.04235, Algorithms 4 and 5): the second moment of a matrix as row and column means.

::

    w = t^-0.8                                                 the newest gradient's weight: beta2_t = 1 - w
    R_i <- (1 - w) R_i + w mean_j(g_ij^2 + eps1)               C_j the same over rows;  v_ij = R_i C_j / mean(R)
    u = g / sqrt(v);   u <- u / max(1, RMS(u) / clip)
    m <- b1 m + (1 - b1) u;  u <- m                            only with ``momentum`` b1
    p <- p (1 - lr wd) - alpha u

beta2 is 0 in the first step, so nothing is bias-corrected. ``step_size`` is one of three conventions:

* ``lr`` (default): alpha = lr. With lr 1e-3 and clip 1 the recipe of T5; comparable with AdamW's learning rate, so
  that one plan can mix them: hence the default.
* ``relative``: alpha = max(eps2, RMS(p)) min(lr, 1/sqrt(t)). With lr 1e-2 this is the paper's rho_t; its warm-up
  (1e-6 t) is a schedule of lr.
* ``scaled``: alpha = lr max(eps2, RMS(p)).

How others differ. torch.optim.Adafactor has ``relative`` only; its eps1 (the dtype's resolution) bounds mean(R) from
below and, squared, v, where the paper's 1e-30 is added to g^2: below gradients of about 3e-4 v is too small and only
clip sizes its updates, below 1e-7 it is too large and they vanish. With ``eps=(1e-30, 1e-3)`` and matrices it agrees
with ours to rounding; it factors the last two axes of convolutions, and takes one RMS for a whole stack of matrices.
Hugging Face's has all three (``relative_step``, ``scale_parameter``; its ``relative`` has the 1e-2 fixed), decays by
alpha wd instead of lr wd, and applies alpha before the average of ``momentum``, so that a learning rate of 0 still
moves the weights: here alpha multiplies the averaged u, as in AdamW.

State: 4 (rows + columns) bytes a matrix, 4 more a parameter with ``momentum``; 4 for the step. Vectors and scalars keep
v in full (4 bytes a parameter). Convolutions and stacks: see :mod:`.factored`. ``betas`` and ``eps`` of the group are
not used. Defaults are the paper's: eps1 1e-30, eps2 1e-3, clip 1, no momentum, no decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memadvise.optim.method import (
    Context,
    Hyper,
    OptionProblem,
    Options,
    Part,
    Shape,
    StateSpec,
    Tensors,
    Visit,
    is_number,
)
from memadvise.optim.methods.factored import SIZE, Factored, check_fraction, check_positive

STEP_SIZES = ("lr", "relative", "scaled")


@dataclass(frozen=True)
class AdafactorOptions(Options):
    """See the module; ``beta2_decay`` is the exponent of t in the newest gradient's weight, negative as in torch."""

    step_size: str = "lr"
    momentum: float = 0.0
    clip: float = 1.0
    beta2_decay: float = -0.8
    eps1: float = 1e-30
    eps2: float = 1e-3

    def __post_init__(self) -> None:
        if self.step_size not in STEP_SIZES:
            raise OptionProblem("step_size", f"step_size '{self.step_size}' is none of {', '.join(STEP_SIZES)}")
        check_fraction("momentum", self.momentum)
        check_positive("clip", self.clip)
        if not is_number(self.beta2_decay) or not -1 <= self.beta2_decay < 0:
            raise OptionProblem(
                "beta2_decay",
                f"beta2_decay should be a number from -1 up to, not including, 0, found {self.beta2_decay!r}",
            )
        check_positive("eps1", self.eps1)
        check_positive("eps2", self.eps2)
        if self.step_size == "lr" and self.eps2 != AdafactorOptions.eps2:
            raise OptionProblem(
                "eps2",
                "eps2 would do nothing: with step_size lr the size of the weights does not count",
                "remove eps2, or use step_size: relative or scaled",
            )


class Adafactor(Factored):
    """A factored second moment, updates clipped by their RMS, and no first moment unless asked for."""

    name = "adafactor"
    summary = "the second moment of a matrix as row and column means; no first moment unless asked for"
    source = "arXiv 1804.04235"
    options_type = AdafactorOptions
    options_help: ClassVar[dict[str, str]] = {
        "step_size": "lr (the learning rate itself), relative (the paper's) or scaled (lr times the weights' RMS)",
        "momentum": "of an average of the updates, 0 for none",
        "clip": "the largest RMS of an update",
        "beta2_decay": "the second moment's newest weight is t to this power",
        "eps1": "added to squared gradients",
        "eps2": "the least RMS of weights that step_size relative and scaled count with",
    }
    bytes_help = "0 bytes a parameter, 4 a row and column; 4 more a parameter with momentum"
    default_weight_decay = 0.0

    def spec(self, shape: Shape, options: AdafactorOptions, dtype: torch.dtype) -> dict[str, StateSpec]:
        spec = self.second_spec(shape, dtype)
        if options.momentum:
            spec["exp_avg"] = StateSpec(shape, dtype, elementwise=True, moment="first")
        return spec

    def scalars(self, step: Tensor, h: Hyper, options: AdafactorOptions) -> Tensors:
        return {"newest": torch.pow(step, options.beta2_decay), "relative": step.rsqrt()}

    def visits(self, shape: Shape, options: AdafactorOptions) -> int:
        return 2 if len(shape) >= 2 else 1

    def newest(self, ctx: Context) -> Tensor:
        return ctx.scalars["newest"]

    def prepare(self, visit: Visit, state: Tensors, ctx: Context) -> tuple[Tensors, Tensors]:
        small, new = self.second_moment_scales(visit, state, ctx)
        unit = self.unit_shape(ctx)
        shapes = {"updates": unit, "weights": unit} if ctx.options.step_size != "lr" else {"updates": unit}
        sums = visit(SIZE, small, shapes)
        clip, rate = self.clip(sums["updates"], ctx), self._rate(sums.get("weights"), ctx)
        if ctx.options.momentum:
            return {**small, "clip": clip, "rate": rate + torch.zeros_like(clip)}, new
        return {**small, "clip": clip * rate}, new

    def stats(self, part: Part, ctx: Context, round_: Any) -> Tensors:
        found = super().stats(part, ctx, round_)
        if round_ == SIZE and ctx.options.step_size != "lr":
            found["weights"] = self.unit_sum(part.p * part.p, ctx)
        return found

    def _rate(self, weights: Tensor | None, ctx: Context) -> float | Tensor:
        """Alpha; ``weights``: the sum of p^2."""
        lr = ctx.h.lr
        if weights is None:
            return lr
        if ctx.options.step_size == "relative":
            most = ctx.scalars["relative"]
            lr = torch.minimum(lr.to(most), most) if isinstance(lr, Tensor) else most.clamp(max=lr)
        return (weights / self.unit_numel(ctx)).sqrt_().clamp_(min=ctx.options.eps2) * lr

    def update(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        u, new = self.normalised(part, ctx)
        u.mul_(part.small["clip"])
        if not ctx.options.momentum:
            return u, new
        m = torch.lerp(part.state["exp_avg"], u, 1 - ctx.options.momentum)
        return m * part.small["rate"], {**new, "exp_avg": m}

    def momentum(self, options: AdafactorOptions) -> bool:
        return options.momentum > 0
