"""What executors share: one parameter's work in a step, and boxes that cut it in pieces of bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from memadvise.optim.method import Box, Method, Shape, StateSpec, Tensors, broadcast_part


@dataclass
class Work:
    """One parameter in one step. ``state`` is changed in place; ``scalars`` are 0-dim tensors of this step."""

    p: Tensor
    g: Tensor
    state: Tensors
    method: Method
    options: Any
    specs: dict[str, StateSpec]
    scalars: Tensors

    @property
    def shape(self) -> Shape:
        return tuple(self.p.shape)

    def elementwise(self) -> Tensors:
        """The state that is cut like the parameter."""
        return {name: self.state[name] for name, spec in self.specs.items() if spec.elementwise}

    def factors(self) -> Tensors:
        """The factor-sized state, without the step counter."""
        return {name: self.state[name] for name, spec in self.specs.items() if not spec.elementwise and name != "step"}


def boxes(shape: Shape, limit: int) -> Iterator[Box]:
    """Cut ``shape`` in boxes of at most ``limit`` elements: chunks of rows, or parts of a row that is too large."""
    if math.prod(shape) <= limit:
        yield tuple(slice(0, size) for size in shape)
        return
    inner = math.prod(shape[1:])
    if inner <= limit:
        rows = limit // inner
        rest = tuple(slice(0, size) for size in shape[1:])
        for start in range(0, shape[0], rows):
            yield (slice(start, min(start + rows, shape[0])), *rest)
        return
    for index in range(shape[0]):
        for part in boxes(shape[1:], limit):
            yield (slice(index, index + 1), *part)


def box_shape(box: Box) -> Shape:
    """The shape of the part that ``box`` cuts out."""
    return tuple(part.stop - part.start for part in box)


class Cuts:
    """The boxes of a shape, and how tensors of that shape, or that broadcast against it, are cut by them."""

    def __init__(self, shape: Shape, limit: int) -> None:
        self.shape = shape
        self.boxes = list(boxes(shape, limit))
        self.shapes = [box_shape(box) for box in self.boxes]
        by_rows = bool(shape) and all(cut[1:] == shape[1:] for cut in self.shapes)
        self._rows = self.shapes[0][0] if by_rows else None

    def parts(self, tensor: Tensor) -> Sequence[Tensor]:
        """One view of ``tensor`` for each box: whole along axes of size 1, and whole if it has other axes at all."""
        if len(self.boxes) == 1 or tensor.ndim != len(self.shape):
            return [tensor] * len(self.boxes)
        if self._rows is not None:  # one call for all chunks of rows
            return [tensor] * len(self.boxes) if tensor.shape[0] == 1 else tensor.split(self._rows)
        return [broadcast_part(tensor, box) for box in self.boxes]
