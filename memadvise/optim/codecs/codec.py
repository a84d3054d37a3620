"""The contract of a codec: a float32 moment in, integer codes and a few scales out, and back.

A moment is seen as a matrix of rows: a row is what lies behind one index of its leading axes, so that a chunk or a
shard of whole rows holds whole blocks. Each row is cut in blocks of ``block`` neighbours (the last may be shorter), and
each block has one scale of its own. :class:`Rows` does the cutting, a codec only encodes and decodes blocks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memadvise.optim.method import Shape, StateSpec, Tensors


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

    @abstractmethod
    def specs(self, rows: Rows) -> dict[str, StateSpec]:
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
        return rows if suffix == "" else rows[:, start // self.block : -(-stop // self.block)]

    def scratch(self) -> int:
        """Bytes an element that encoding and decoding allocate at most, with noise."""
        return 64


def stochastic(lower: Tensor, upper: Tensor, value: Tensor, noise: Tensor) -> Tensor:
    """True where ``value`` between two neighbours goes up, with the probability that is right on average."""
    return noise * (upper - lower) < value - lower


def to_blocks(values: Tensor, block: int) -> Tensor:
    """[rows, length] -> [rows, blocks, block], the last block padded with zeros."""
    length = values.shape[1]
    padded = -(-length // block) * block if length else 0
    if padded != length:
        values = torch.nn.functional.pad(values, (0, padded - length))
    return values.reshape(values.shape[0], padded // block, block)
