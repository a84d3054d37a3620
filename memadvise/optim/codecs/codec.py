"""The contract of a codec: a float32 moment in, integer codes and a few scales out, and back.

A moment is seen as a matrix of rows: a row is what lies behind one index of its leading axes, so that a chunk or a
shard of whole rows holds whole blocks. Each row is cut in blocks of ``block`` neighbours (the last may be shorter), and
each block has one scale of its own. :class:`Rows` does the cutting, a codec only encodes and decodes blocks.

What block codecs share (:class:`BlockCodec`): the scale of a block is its largest magnitude in float32 (half precision
loses blocks below 3e-8, and overflows), a block of zeros decodes to zeros, and a block with inf or NaN in it to inf and
NaN throughout: the state is as lost as torch.optim.AdamW's would be, and stays so; no value of it becomes finite again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memadvise.optim.method import Shape, StateSpec, Tensors
from memadvise.optim.tracing import in_kernel

_EXACT = 2.0**-14  # of the way between two codes: more than float32 loses on the way there


@dataclass(frozen=True)
class Rows:
    """``count`` rows of ``length`` elements, in row-major order."""

    count: int
    length: int


def rows_of(shape: Shape, block: int) -> Rows:
    """The rows of a tensor: of the fewest trailing axes that hold a block, but of all axes only where rows are tiny."""
    numel, length = math.prod(shape), 1
    for axis in reversed(range(len(shape))):
        length *= shape[axis]
        if axis > 0 and length >= block:
            return Rows(math.prod(shape[:axis]), length)
    first = shape[0] if len(shape) > 1 else 1
    if first and numel // first * 4 >= block:  # rows of a quarter block still pay for a scale of their own
        return Rows(first, numel // first)
    return Rows(1, numel)


class Codec(ABC):
    """How one kind of moment ("first": signed, "second": not negative) is held.

    ``block`` elements share a scale; 0 for codecs without one. ``signed`` chooses between the two forms of a codec.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    block: ClassVar[int]
    moments: ClassVar[tuple[str, ...]] = ("first", "second")
    arithmetic: ClassVar[bool] = True  # computed, not looked up: what a compiler can vectorise for a CPU

    @abstractmethod
    def specs(self, rows: Rows, *, signed: bool) -> dict[str, StateSpec]:
        """Suffix ("" for the codes, "_scale") -> the tensor that holds it; its first axis has one entry a row."""

    @abstractmethod
    def decode(self, stored: Tensors, length: int, *, signed: bool) -> Tensor:
        """``stored`` of some rows -> float32 [rows, length]."""

    @abstractmethod
    def encode(self, values: Tensor, noise: Tensor | None, *, signed: bool) -> Tensors:
        """float32 [rows, length] -> what is stored. With ``noise``, uniform in [0, 1) and of the same shape, codes are
        rounded up or down at random so that the decoded value is right on average; without, to the nearest.
        """

    def part(self, suffix: str, stored: Tensor, first: int, last: int, start: int, stop: int) -> Tensor:
        """The view of ``stored`` that holds rows ``first:last``, elements ``start:stop`` (multiples of the block)."""
        rows = stored[first:last]
        return rows[:, start:stop] if suffix == "" else rows[:, start // self.block : -(-stop // self.block)]

    def scratch(self) -> int:
        """Bytes an element that encoding allocates at most, noise and all; decoding takes no more."""
        return 40


class BlockCodec(Codec):
    """A codec of codes with one float32 scale a block.

    A code stands for a fraction of the scale, :meth:`unit`, which rises with it. Stochastic rounding asks how far a
    value lies on the way to the next code (:meth:`beyond`); what is within :data:`_EXACT` of a code has that code, so
    that a value that has one keeps it, whatever the noise, and whatever the rounding of this arithmetic.
    """

    def specs(self, rows: Rows, *, signed: bool) -> dict[str, StateSpec]:
        blocks = -(-rows.length // self.block)
        return {"": self.codes(rows, signed=signed), "_scale": StateSpec((rows.count, blocks), torch.float32)}

    def codes(self, rows: Rows, *, signed: bool) -> StateSpec:
        """The tensor of codes."""
        return StateSpec((rows.count, rows.length), torch.uint8)

    @abstractmethod
    def unit(self, codes: Tensor, *, signed: bool) -> Tensor:
        """The fractions of the scale that ``codes`` (and the largest code + 1) stand for; a new float32 tensor."""

    @abstractmethod
    def floor(self, x: Tensor, *, signed: bool) -> Tensor:
        """The largest codes that stand for at most ``x`` in [-1, 1] (or the smallest code), give or take one by the
        rounding of ``x``. ``x`` may be overwritten.
        """

    @abstractmethod
    def nearest(self, x: Tensor, *, signed: bool) -> Tensor:
        """The codes nearest to ``x``, which may be overwritten."""

    @abstractmethod
    def pack(self, codes: Tensor, values: Tensor, *, signed: bool) -> Tensor:
        """``codes`` as they are stored; ``values`` are what they stand for."""

    @abstractmethod
    def unpack(self, stored: Tensor, length: int, *, signed: bool) -> Tensor:
        """Stored codes as :meth:`unit` takes them, [rows, length]."""

    def scales(self, values: Tensor, *, signed: bool) -> Tensor:
        """The scale of each block, [rows, blocks]: its largest magnitude."""
        low, high = extremes(values, self.block)
        return torch.maximum(high, -low)

    def beyond(self, x: Tensor, codes: Tensor, *, signed: bool) -> Tensor:
        """How far ``x`` lies from ``codes`` on the way to the next ones: 0 to 1, give or take its rounding."""
        lower = self.unit(codes, signed=signed)
        return (x - lower).div_(self.unit(codes + 1, signed=signed).sub_(lower))

    def decode(self, stored: Tensors, length: int, *, signed: bool) -> Tensor:
        values = self.unit(self.unpack(stored[""], length, signed=signed), signed=signed)
        return times_(values, stored["_scale"], self.block)

    def _relative(self, values: Tensor, scale: Tensor) -> Tensor:
        """``values`` in units of their scales; a new tensor."""
        power = _normal(scale)
        size = torch.where(scale == 0, 1.0, scale * power)
        return times_(times_(values.clone(), power, self.block), size.reciprocal(), self.block)

    def encode(self, values: Tensor, noise: Tensor | None, *, signed: bool) -> Tensors:
        scale = self.scales(values, signed=signed)
        x = self._relative(values, scale)
        if noise is None:
            codes = self.nearest(x, signed=signed)
        else:
            codes = self.floor(x.clone(), signed=signed)
            codes += self.beyond(x, codes, signed=signed) > noise.clamp(_EXACT, 1 - _EXACT)
        return {"": self.pack(codes, values, signed=signed), "_scale": scale}


def _normal(scale: Tensor) -> Tensor:
    """Powers of two that bring scales to where a reciprocal is a normal number."""
    size = scale.abs()
    return torch.where(size < 2.0**-64, 2.0**64, torch.where(size > 2.0**64, 2.0**-64, 1.0))


def pieces(values: Tensor, block: int) -> Iterator[tuple[Tensor, slice]]:
    """Views [rows, blocks, block] of ``values`` ([rows, length]) and which blocks they are: the whole blocks, and what
    is left of the rows.
    """
    length = values.shape[1]
    blocks = length // block
    if blocks:
        yield values[:, : blocks * block].unflatten(1, (blocks, block)), slice(0, blocks)
    if blocks * block < length:
        yield values[:, blocks * block :].unsqueeze(1), slice(blocks, blocks + 1)


def extremes(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest value of each block, [rows, blocks]; NaN where there is one."""
    found = [torch.aminmax(piece, dim=2) for piece, _ in pieces(values, block)]
    return torch.cat([low for low, _ in found], 1), torch.cat([high for _, high in found], 1)


def times_(values: Tensor, factors: Tensor, block: int) -> Tensor:
    """``values`` [rows, length] times the ``factors`` [rows, blocks] of their blocks, in place (not in a kernel)."""
    if in_kernel():  # there an expression costs nothing, but writing to parts of a tensor needs the tensor
        spread = factors.unsqueeze(-1).expand(-1, -1, block).flatten(1)
        return values * spread[:, : values.shape[1]]
    for piece, columns in pieces(values, block):
        piece.mul_(factors[:, columns, None])
    return values
