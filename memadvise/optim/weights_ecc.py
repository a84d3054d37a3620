"""Weights with an error-correcting byte, or two (after FlashOptim, arXiv 2602.23349): a bfloat16 or float16 parameter,
and in the optimizer's state an integer that says where within its rounding interval the true weight lies.

The paper stores ``round(127 (w - p) / (ulp(p) / 2))``. Here weight and correction are one number, the bits of w: the
parameter is their upper part, rounded to the nearest, the correction what is left, with sign ::

    bits of |w|, lower ones rounded off       (bfloat16: 8 of 16 are left to 8 bits, all 16 to 16;
    p  = (bits + half) >> 16                   float16: 8 of 13, or all 13)
    c  = bits - (p << 16)

Nothing is multiplied or divided, so that nothing overflows, or depends on how a device treats subnormal numbers;
splitting and joining is exact, weights that do not move keep their bits, and a bfloat16 parameter with 16 bits is a
float32 weight to the bit. The error of 8 bits, rounded to nearest, is at most ulp / 512 (the paper's: ulp / 508), and
ulp / 496 for subnormal float16 weights, below 6e-5, which are multiples of 2^-37 here.

8 bits are rounded at random: to the nearest, an update below that error is lost at every step (1000 updates of -1e-4 to
a weight of 1 end at 0.893, of +1e-5 at 1). Weights that are inf or NaN, or too large for the parameter's dtype, are inf
or NaN and stay so, as without a correction.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of a float32 mantissa that a dtype has not
_INF = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_SHIFT = 112 << 23  # between the exponents of float16 and float32
_NORMAL = 1 << 23  # of a float16 number, with that shift: below it they are subnormal


def join(p: Tensor, correction: Tensor) -> Tensor:
    """The weights, float32, of a parameter and its correction.

    A parameter that something else wrote to keeps its correction, which is at most half of its last place.
    """
    drop = _DROPPED[p.dtype]
    held = p.view(torch.int16).to(torch.int32)
    bits = (held & 0x7FFF).bitwise_left_shift_(drop)
    shift = drop - 8 if correction.dtype == torch.int8 else 0
    bits = bits.add_(correction, alpha=1 << shift).clamp_(min=0)
    if p.dtype == torch.float16:
        bits = _from_half(bits)
    w = bits.bitwise_or_(held.bitwise_and_(-0x8000).bitwise_left_shift_(16)).view(torch.float32)
    return torch.where(p.isfinite(), w, p)


def split(w: Tensor, p: Tensor, correction: Tensor, noise: Tensor | None) -> None:
    """Write float32 weights to a parameter and its correction; with ``noise``, uniform in [0, 1), right on average."""
    drop = _DROPPED[p.dtype]
    bits = w.view(torch.int32) & _MAGNITUDE
    if p.dtype == torch.float16:
        bits = _to_half(bits)
    if correction.dtype == torch.int8:
        shift = drop - 8
        bits += 1 << (shift - 1) if noise is None else (noise * float(1 << shift)).to(torch.int32)
        bits = bits.bitwise_right_shift_(shift).bitwise_left_shift_(shift)
    else:
        shift = 0
    upper = (bits + (1 << (drop - 1))).bitwise_right_shift_(drop)
    bits -= upper << drop
    finite = w.isfinite().logical_and_(upper < _INF[p.dtype])
    correction.copy_(bits.bitwise_right_shift_(shift).mul_(finite))
    upper |= (w.view(torch.int32) >> 16) & -0x8000
    p.copy_(torch.where(finite, upper.to(torch.int16).view(p.dtype), w.to(p.dtype)))


# A float16 number's bits, continued with those of its float32 value: subnormal numbers are multiples of 2^-37 there.


def _to_half(bits: Tensor) -> Tensor:
    small = bits.view(torch.float32).clamp(max=2.0**-14).mul_(2.0**37).round_().to(torch.int32)
    return torch.where(bits < _NORMAL + _SHIFT, small, bits - _SHIFT)


def _from_half(bits: Tensor) -> Tensor:
    small = bits.clamp(max=_NORMAL).to(torch.float32).mul_(2.0**-37).view(torch.int32)
    return torch.where(bits < _NORMAL, small, bits + _SHIFT)
