"""bfloat16 with stochastic rounding (arXiv 2010.06192): 2 bytes a value, no blocks, any shape.

Adding 16 random bits below the mantissa and cutting them off rounds up with the probability of the remainder, so that
an EMA whose step is below half a unit in the last place still moves on average (rounded to nearest it freezes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memadvise.optim.codecs.codec import Codec, Rows
from memadvise.optim.method import StateSpec, Tensors


def to_bfloat16(values: Tensor, noise: Tensor | None) -> Tensor:
    """Round float32 to bfloat16, at random with ``noise`` uniform in [0, 1), else to nearest; inf and NaN stay."""
    if noise is None:
        return values.to(torch.bfloat16)
    bits = values.contiguous().view(torch.int32)
    rounded = bits.add((noise * 65536.0).to(torch.int32)).bitwise_and_(-65536).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


class BFloat16(Codec):
    """bfloat16, stochastically rounded."""

    name = "bf16"
    summary = "bfloat16, stochastically rounded: 2 bytes a value"
    block = 0

    def specs(self, rows: Rows, *, signed: bool) -> dict[str, StateSpec]:
        return {"": StateSpec((rows.count, rows.length), torch.bfloat16)}

    def decode(self, stored: Tensors, length: int, *, signed: bool) -> Tensor:
        return stored[""].to(torch.float32)

    def encode(self, values: Tensor, noise: Tensor | None, *, signed: bool) -> Tensors:
        return {"": to_bfloat16(values, noise)}

    def scratch(self) -> int:
        return 20
