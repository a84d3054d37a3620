"""Dynamic 8-bit codes in blocks of 256 (arXiv 2110.02861), those of the 8-bit Adam of bitsandbytes and torchao.

A code is the number of an entry of a table of 256: 0, 1, and seven decades, each with twice as many entries as the one
below (:func:`.mapped.dynamic_map`). For first moments with both signs, from -0.99297 to 1, the smallest magnitude
5.5e-7; for second moments none below 0, the smallest 3.25e-7. Values are held relative to the largest magnitude of
their block.

State: N + 4 R ceil(L / 256) bytes for each moment, of R rows of L (:func:`.codec.rows_of`), N = R L.
Error, rounded to nearest, relative to the largest of the block: 0.0070 for first, 0.0035 for second moments; relative
to the value itself 18 and 11 % between 1e-3 and 1e-2 of the largest.
Deviations: blocks end with rows. The scale of first moments has the sign of the value of largest magnitude, which so
is always held exactly; with the magnitude alone one that is negative would lose 0.7 % at every step. A positive second
moment never gets the code 0 (see :mod:`.int8`). Stochastic rounding: to the nearest, an average in which new values
arrive with a weight of 0.001 freezes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memadvise.optim.codecs.codec import BlockCodec, extremes
from memadvise.optim.codecs.mapped import Map, dynamic_map

SIGNED = Map(dynamic_map(7, signed=True))
UNSIGNED = Map(dynamic_map(7, signed=False))


class Dynamic8(BlockCodec):
    """Entries of the dynamic tables."""

    name = "dynamic8"
    summary = "dynamic 8-bit codes in blocks of 256: 1.02 bytes a value"
    block = 256
    arithmetic = False

    def scales(self, values: Tensor, *, signed: bool) -> Tensor:
        low, high = extremes(values, self.block)
        return torch.where(-low > high, low, high) if signed else high

    def unit(self, codes: Tensor, *, signed: bool) -> Tensor:
        return _map(signed).value(codes)

    def floor(self, x: Tensor, *, signed: bool) -> Tensor:
        return _map(signed).floor(x)

    def nearest(self, x: Tensor, *, signed: bool) -> Tensor:
        return _map(signed).nearest(x)

    def pack(self, codes: Tensor, values: Tensor, *, signed: bool) -> Tensor:
        packed = codes.to(torch.uint8)
        return packed if signed else torch.maximum(packed, values > 0, out=packed)

    def unpack(self, stored: Tensor, length: int, *, signed: bool) -> Tensor:
        return stored.to(torch.int32)

    def scratch(self) -> int:
        return 32


def _map(signed: bool) -> Map:
    return SIGNED if signed else UNSIGNED
