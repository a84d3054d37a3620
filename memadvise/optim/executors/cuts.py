"""Boxes: how a tensor is cut in pieces of bounded size, and what belongs to each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from memadvise.optim.method import Box, Runs, Shape, broadcast_part


def boxes(shape: Shape, limit: int, whole: int = 0, granule: int = 1) -> Iterator[Box]:
    """Cut ``shape`` in boxes of at most ``limit`` elements: chunks of rows, or parts of a row that is too large.

    The last ``whole`` axes are never cut, the first only at multiples of ``granule``, and no other if that is above 1:
    boxes are larger than ``limit`` where they must. Every box is a run of neighbours in row-major order.
    """
    if math.prod(shape) <= limit or len(shape) <= whole:
        yield tuple(slice(0, size) for size in shape)
        return
    inner = math.prod(shape[1:])
    if inner <= limit or len(shape) - 1 <= whole or granule > 1:
        rows = max(limit // (inner * granule), 1) * granule
        rest = tuple(slice(0, size) for size in shape[1:])
        for start in range(0, shape[0], rows):
            yield (slice(start, min(start + rows, shape[0])), *rest)
        return
    for index in range(shape[0]):
        for part in boxes(shape[1:], limit, whole):
            yield (slice(index, index + 1), *part)


def box_shape(box: Box) -> Shape:
    """The shape of the part that ``box`` cuts out."""
    return tuple(part.stop - part.start for part in box)


class Cuts:
    """The boxes of a shape, and how tensors of that shape, or that broadcast against it, are cut by them."""

    def __init__(self, shape: Shape, limit: int, whole: int = 0, granule: int = 1) -> None:
        self.shape = shape
        self.boxes = list(boxes(shape, limit, whole, granule))
        self.shapes = [box_shape(box) for box in self.boxes]
        strides = [math.prod(shape[a + 1 :]) for a in range(len(shape))]
        self.starts = [sum(part.start * s for part, s in zip(box, strides, strict=True)) for box in self.boxes]
        by_rows = bool(shape) and all(cut[1:] == shape[1:] for cut in self.shapes)
        self._rows = self.shapes[0][0] if by_rows else None

    @classmethod
    def whole(cls, shape: Shape) -> Cuts:
        """One box; ``shape`` may be symbolic."""
        cuts = cls.__new__(cls)
        cuts.shape, cuts.shapes, cuts.starts, cuts._rows = shape, [shape], [0], None
        cuts.boxes = [tuple(slice(0, size) for size in shape)]
        return cuts

    def sample(self) -> Cuts:
        """The first two and the last two boxes. They stand for all in a memory trace, where boxes allocate alike and
        nobody asks for values.
        """
        if len(self.boxes) <= 4:
            return self
        cuts = Cuts.__new__(Cuts)
        cuts.shape, cuts._rows = self.shape, None
        cuts.boxes, cuts.shapes, cuts.starts = (
            [*several[:2], *several[-2:]] for several in (self.boxes, self.shapes, self.starts)
        )
        return cuts

    def parts(self, tensor: Tensor) -> Sequence[Tensor]:
        """One view of ``tensor`` for each box: whole along axes of size 1, and whole if it has other axes at all."""
        if len(self.boxes) == 1 or tensor.ndim != len(self.shape):
            return [tensor] * len(self.boxes)
        if self._rows is not None:  # one call for all chunks of rows
            return [tensor] * len(self.boxes) if tensor.shape[0] == 1 else tensor.split(self._rows)
        return [broadcast_part(tensor, box) for box in self.boxes]

    def runs(self, tensor: Tensor, runs: Runs) -> Sequence[Tensor]:
        """One view of ``tensor`` for each box, of what it holds for the runs in it."""
        if len(self.boxes) == 1:
            return [tensor]
        parts = []
        for box in self.boxes:
            first = box[0].start // runs.length * runs.entries
            last = box[0].stop // runs.length * runs.entries
            last = tensor.shape[runs.axis] if box[0].stop == self.shape[0] else last
            parts.append(tensor.narrow(runs.axis, first, last - first))
        return parts
