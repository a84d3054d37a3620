"""Companded 8-bit codes in blocks of 64 (after FlashOptim, arXiv 2602.23349): what the paper needs instead of linear
codes, with which training diverged.

With ``s`` the largest magnitude of a block, and c the code::

    first moment    int8,  c = 127 y,  y = 2 x / (1 + |x|),  x = m / s       m = s c / (254 - |c|)
    second moment   uint8, c = 255 sqrt(v / s)                               v = s (c / 255)^2

A positive v never gets the code 0, even if it is nearer: an update m / sqrt(v) whose v was lost and whose m was not is
larger than any true one by orders of magnitude.

State: N + 4 R ceil(L / 64) bytes for each moment, of R rows of L (:func:`.codec.rows_of`), N = R L.
Error, rounded to nearest: of m at most 0.002 s near 0 and 0.0079 s near s; of sqrt(v) at most s / 510 (and v >= s /
65025 where it is not 0).
Deviations: one float32 scale for 64 elements instead of a float16 one for 32 (as many bytes; below 3e-8 float16 scales
are 0, above 65504 inf), of v instead of sqrt(v), so that the largest is held exactly; the minimum code of v; stochastic
rounding, right on average in value, without which slow averages freeze and small ones never decay to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memadvise.optim.codecs.codec import BlockCodec, Rows
from memadvise.optim.method import StateSpec


class Int8(BlockCodec):
    """Softsign codes for first moments, square-root codes for second moments."""

    name = "int8"
    summary = "companded 8-bit codes in blocks of 64: 1.06 bytes a value"
    block = 64

    def codes(self, rows: Rows, *, signed: bool) -> StateSpec:
        return StateSpec((rows.count, rows.length), torch.int8 if signed else torch.uint8)

    def unit(self, codes: Tensor, *, signed: bool) -> Tensor:
        if signed:
            return codes / (254.0 - codes.abs())
        return (codes * codes).div_(65025.0)

    def floor(self, x: Tensor, *, signed: bool) -> Tensor:
        return _companded(x, signed).floor_()

    def beyond(self, x: Tensor, codes: Tensor, *, signed: bool) -> Tensor:
        # (x - unit(c)) / (unit(c + 1) - unit(c)), multiplied out: a division costs as much as ten other operations
        if signed:
            a, b = 254.0 - codes.abs(), 254.0 - (codes + 1.0).abs()
            return a.mul_(x).sub_(codes).mul_(b).mul_(1 / 254)
        return (x * 65025.0).sub_(codes * codes).div_(codes * 2.0 + 1.0)

    def nearest(self, x: Tensor, *, signed: bool) -> Tensor:
        return _companded(x, signed).add_(0.5).floor_()

    def pack(self, codes: Tensor, values: Tensor, *, signed: bool) -> Tensor:
        if signed:
            return codes.to(torch.int8)
        return torch.maximum(codes, values > 0, out=codes).to(torch.uint8)

    def unpack(self, stored: Tensor, length: int, *, signed: bool) -> Tensor:
        return stored.to(torch.float32)

    def scratch(self) -> int:
        return 36


def _companded(x: Tensor, signed: bool) -> Tensor:
    if not signed:
        return x.sqrt_().mul_(255.0)
    return torch.div(x, x.abs().add_(1.0), out=x).mul_(254.0)
