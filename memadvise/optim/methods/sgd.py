"""SGD with heavy-ball momentum: the memory floor, a yardstick.

::

    b <- mu b + g;  p <- p (1 - lr wd) - lr b          mu = ``momentum``; with mu = 0 there is no b

State: 4 bytes a parameter, none with ``momentum: 0``. Default lr 1e-3 (torch's), weight decay 0; in comparisons we
take 100 times AdamW's learning rate: the customary 0.1 with momentum 0.9 beside 1e-3. ``betas`` and ``eps`` are
not used.

Deviation from torch.optim.SGD: weight decay is decoupled (SGDW, arXiv 1711.05101, Algorithm 1), because one plan has
one weight decay for all its methods. Without momentum or without decay the two are the same. No dampening, no Nesterov.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memadvise.optim.method import Context, Method, OptionProblem, Options, Part, Shape, StateSpec, Tensors


@dataclass(frozen=True)
class SGDOptions(Options):
    """``momentum`` in [0, 1)."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not isinstance(self.momentum, int | float) or isinstance(self.momentum, bool) or not 0 <= self.momentum < 1:
            raise OptionProblem("momentum", f"momentum should be a number in [0, 1), found {self.momentum!r}")


class SGD(Method):
    """Heavy-ball momentum, or none."""

    name = "sgd"
    summary = "momentum only, or nothing at all: the memory floor"
    source = "arXiv 1711.05101"
    options_type = SGDOptions
    options_help: ClassVar[dict[str, str]] = {"momentum": "heavy-ball momentum, 0 for none"}
    bytes_help = "4 bytes a parameter; none with momentum: 0"
    default_weight_decay = 0.0
    lr_factor = 100.0

    def traceable(self, shape: Shape, options: Any) -> bool:
        return True

    def spec(self, shape: Shape, options: SGDOptions, dtype: torch.dtype) -> dict[str, StateSpec]:
        spec = StateSpec(shape, dtype, elementwise=True, moment="first")
        return {"momentum_buffer": spec} if options.momentum else {}

    def update(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        if not ctx.options.momentum:
            return part.g * ctx.h.lr, {}
        buffer = part.state["momentum_buffer"] * ctx.options.momentum + part.g
        return buffer * ctx.h.lr, {"momentum_buffer": buffer}

    def momentum(self, options: SGDOptions) -> bool:
        return options.momentum > 0
