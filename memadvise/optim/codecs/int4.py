"""4-bit codes in blocks of 128, two a byte (arXiv 2309.01507).

Values are held relative to the largest magnitude s of their block::

    first moment    0, 1, -1, +-{0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625}, 0.8875
    second moment   1/16, 2/16, ..., 1: no zero

The second moment's map has no zero because an update m / sqrt(v) whose v was lost and whose m was not is larger than
any true one by orders of magnitude; the smallest v of a block is s / 16 instead (a block of zeros is still zeros).

The first moment's map is the dynamic one of three decades with its lowest entry, -0.8875, moved to -1. As published,
every value in [-1, -0.8875) is pulled towards zero, at every step, which stochastic rounding cannot mend: measured on
averages of gaussian gradients, 1.3 % of a mean were lost, after the move none. A linear map of -7/7 ... 7/7 has a
smaller error where a block's values are alike (0.36 of their size against 0.47) but 3.7 times this one's where they
spread over a decade or two, as gradients do.

State: R ceil(L / 2) + 4 R ceil(L / 128) bytes for each moment, of R rows of L (:func:`.codec.rows_of`).
Other deviations: blocks end with rows, no rank-1 normalisation (nor has torchao), stochastic rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memadvise.optim.codecs.codec import BlockCodec, Rows
from memadvise.optim.codecs.mapped import Map, dynamic_map
from memadvise.optim.method import StateSpec
from memadvise.optim.tracing import in_kernel

SIGNED = Map((-1.0, *dynamic_map(3, signed=True)[1:]))


class Int4(BlockCodec):
    """Nearly symmetric dynamic codes for first moments, linear ones without zero for second moments."""

    name = "int4"
    summary = "4-bit codes in blocks of 128, no zero in second moments: 0.53 bytes a value"
    block = 128
    arithmetic = False

    def codes(self, rows: Rows, *, signed: bool) -> StateSpec:
        return StateSpec((rows.count, -(-rows.length // 2)), torch.uint8)

    def unit(self, codes: Tensor, *, signed: bool) -> Tensor:
        return SIGNED.value(codes) if signed else codes.to(torch.float32).add_(1.0).mul_(0.0625)

    def floor(self, x: Tensor, *, signed: bool) -> Tensor:
        return SIGNED.floor(x) if signed else _linear(x)

    def nearest(self, x: Tensor, *, signed: bool) -> Tensor:
        return SIGNED.nearest(x) if signed else _linear(x.add_(1 / 32))

    def pack(self, codes: Tensor, values: Tensor, *, signed: bool) -> Tensor:
        if in_kernel():  # in one expression
            even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2))
            return (even[..., 0] | (even[..., 1] << 4)).to(torch.uint8)
        narrow = codes.to(torch.uint8)
        packed = narrow[:, ::2].contiguous()
        high = narrow[:, 1::2] << 4
        packed[:, : high.shape[1]] |= high
        return packed

    def unpack(self, stored: Tensor, length: int, *, signed: bool) -> Tensor:
        if in_kernel():
            pairs = torch.stack([stored & 15, stored >> 4], -1).to(torch.int32)
            return pairs.flatten(1)[:, :length]
        codes = torch.empty((stored.shape[0], length), dtype=torch.int32, device=stored.device)
        codes[:, ::2] = stored & 15
        codes[:, 1::2] = (stored >> 4)[:, : length // 2]
        return codes

    def part(self, suffix: str, stored: Tensor, first: int, last: int, start: int, stop: int) -> Tensor:
        if suffix:
            return super().part(suffix, stored, first, last, start, stop)
        return stored[first:last, start // 2 : -(-stop // 2)]

    def scratch(self) -> int:
        return 36


def _linear(x: Tensor) -> Tensor:
    """The number of the largest of 1/16, ..., 16/16 below ``x``, or 0; int32. NaN has none: any will do."""
    return x.mul_(16.0).sub_(1.0).clamp_(0.0, 15.0).nan_to_num_(0.0).to(torch.int32)
