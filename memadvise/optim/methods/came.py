"""CAME (arXiv 2307.02047, Algorithm 2): Adafactor's second moment, and steps weighed by how steady they are.

::

    v from row and column means of g^2 + eps1, with constant b2;   u = g / sqrt(v);   u <- u / max(1, RMS(u) / clip)
    m <- b1 m + (1 - b1) u
    S from row and column means of (u - m)^2 + eps2, with b3       (the instability, factored like v)
    p <- p (1 - lr wd) - lr m / sqrt(S)                            vectors and scalars: - lr m

State: 4 bytes a parameter for m, 8 (rows + columns) for a matrix, 4 for the step; vectors and scalars keep v in full.
Convolutions and stacks of matrices: see :mod:`.factored`.
Defaults are the paper's: betas (0.9, 0.999), beta3 0.9999, eps1 1e-30, eps2 1e-16, clip 1; it advises learning rates
0.5 to 0.9 times AdamW's. ``eps`` of the group is not used.

S starts at zero and is not corrected for that: a first step is 11 times lr (RMS), and steady gradients raise that to
50 before it falls. It wants a long warm-up; or ``correct_instability: true`` divides S by 1 - b3^t (ours, not the
paper's), which makes the first step 0.11 lr and later ones as the paper has them after many steps.

``compat: official`` does what the official code does: the last two axes of a convolution are factored (a 3x3 window
keeps most of v), and one RMS clips a whole stack or convolution. Its state has the parameter's dtype; ours does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from memadvise.optim.method import Context, Hyper, OptionProblem, Options, Part, Shape, StateSpec, Tensors, Visit
from memadvise.optim.methods.blockmean import COMPAT_HELP, check_compat
from memadvise.optim.methods.factored import (
    SIZE,
    Factored,
    check_fraction,
    check_positive,
    column_shape,
    ema,
    row_scale,
    row_shape,
)
from memadvise.optim.methods.sums import column_sums

INSTABILITY = "instability"  # a visit


@dataclass(frozen=True)
class CAMEOptions(Options):
    """See the module."""

    beta3: float = 0.9999
    correct_instability: bool = False
    clip: float = 1.0
    eps1: float = 1e-30
    eps2: float = 1e-16
    compat: str | None = None

    def __post_init__(self) -> None:
        check_fraction("beta3", self.beta3)
        if not isinstance(self.correct_instability, bool):
            raise OptionProblem(
                "correct_instability",
                f"correct_instability should be true or false, found {self.correct_instability!r}",
            )
        check_positive("clip", self.clip)
        check_positive("eps1", self.eps1)
        check_positive("eps2", self.eps2)
        check_compat(self.compat)
        if self.compat and self.correct_instability:
            raise OptionProblem(
                "correct_instability", "the official code does not correct the instability", "leave compat out"
            )


class CAME(Factored):
    """A factored second moment, a first moment, and a factored average of how much updates deviate from it."""

    name = "came"
    summary = "Adafactor with a first moment, its steps divided by a factored measure of their unsteadiness"
    source = "arXiv 2307.02047"
    options_type = CAMEOptions
    options_help: ClassVar[dict[str, str]] = {
        "beta3": "of the average of (update - first moment)^2",
        "correct_instability": "true: correct that average for its start at zero, so that first steps are small",
        "clip": "the largest RMS of an update before it is averaged",
        "eps1": "added to squared gradients",
        "eps2": "added to (update - first moment)^2",
        "compat": COMPAT_HELP,
    }
    bytes_help = "4 bytes a parameter, 8 a row and column"
    default_lr = 5e-4
    default_weight_decay = 0.0
    lr_factor = 0.5

    def view(self, shape: Shape, options: CAMEOptions) -> Shape:
        return shape if options.compat else super().view(shape, options)

    def unit(self, shape: Shape, options: CAMEOptions) -> tuple[int, ...]:
        return tuple(range(len(shape))) if options.compat else super().unit(shape, options)

    def spec(self, shape: Shape, options: CAMEOptions, dtype: torch.dtype) -> dict[str, StateSpec]:
        spec = self.second_spec(shape, dtype)
        spec["exp_avg"] = StateSpec(shape, dtype, elementwise=True, moment="first")
        if len(shape) >= 2:
            spec["exp_avg_res_row"] = StateSpec(row_shape(shape), dtype)
            spec["exp_avg_res_col"] = StateSpec(column_shape(shape), dtype)
        return spec

    def visits(self, shape: Shape, options: CAMEOptions) -> int:
        return 3 if len(shape) >= 2 else 1

    def newest(self, ctx: Context) -> float:
        return 1 - ctx.h.beta2

    def scalars(self, step: torch.Tensor, h: Hyper, options: CAMEOptions) -> Tensors:
        return {"instability": 1 - torch.pow(options.beta3, step)}

    def prepare(self, visit: Visit, state: Tensors, ctx: Context) -> tuple[Tensors, Tensors]:
        small, new = self.second_moment_scales(visit, state, ctx)
        sums = visit(SIZE, small, {"updates": self.unit_shape(ctx)})
        small["clip"] = self.clip(sums["updates"], ctx)
        if len(ctx.shape) < 2:
            return small, new
        shape, options = ctx.shape, ctx.options
        sums = visit(INSTABILITY, small, {"rows": row_shape(shape), "columns": column_shape(shape)})
        rows = ema(state["exp_avg_res_row"], sums["rows"], shape[-1], 1 - options.beta3, options.eps2)
        columns = ema(state["exp_avg_res_col"], sums["columns"], shape[-2], 1 - options.beta3, options.eps2)
        corrected = columns / ctx.scalars["instability"] if options.correct_instability else columns
        small.update({"steady_row": row_scale(rows), "steady_column": corrected.rsqrt()})
        return small, {**new, "exp_avg_res_row": rows, "exp_avg_res_col": columns}

    def stats(self, part: Part, ctx: Context, round_: Any) -> Tensors:
        if round_ != INSTABILITY:
            return super().stats(part, ctx, round_)
        u, _ = self.normalised(part, ctx)  # u - m_new = b1 (u - m_old)
        squares = u.mul_(part.small["clip"]).sub_(part.state["exp_avg"]).mul_(ctx.h.beta1)
        squares.mul_(squares)
        return {"rows": squares.sum(-1, keepdim=True), "columns": column_sums(squares)}

    def update(self, part: Part, ctx: Context) -> tuple[torch.Tensor, Tensors]:
        u, new = self.normalised(part, ctx)
        m = torch.lerp(part.state["exp_avg"], u.mul_(part.small["clip"]), 1 - ctx.h.beta1)
        step = m * ctx.h.lr
        if "steady_row" in part.small:
            step = step.mul_(part.small["steady_row"]).mul_(part.small["steady_column"])
        return step, {**new, "exp_avg": m}
