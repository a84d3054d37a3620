"""Which features of a projection end up where: strides in feature numbers, carried through views without any data.

A fused projection gives ``[..., 3 * width]``; views, permutations and splits turn it into queries, keys and values.
A :class:`Layout` says for every element of a tensor which of the original features it is. Each dimension is a product
of atoms (size, stride in features), from the slowest to the fastest; stride 0 is a dimension such as batch or time.
Masks are integers whose bit ``i`` stands for feature ``i``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Atom = tuple[int, int]  # size, stride in features


def _merged(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
    out: list[Atom] = []
    for size, stride in atoms:
        if size == 1:
            continue
        if out and out[-1][1] == size * stride:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return tuple(out)


@dataclass(frozen=True)
class Layout:
    """The features of a tensor. Every operation returns None where the result has no such description."""

    dims: tuple[tuple[Atom, ...], ...]
    offset: int = 0

    @staticmethod
    def of_features(shape: Sequence[int], axis: int) -> Layout:
        """A tensor of ``shape`` whose features are numbered along ``axis``."""
        axis %= len(shape)
        return Layout(tuple(_merged([(size, 1 if i == axis else 0)]) for i, size in enumerate(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(size for size, _ in atoms) for atoms in self.dims)

    @property
    def mask(self) -> int:
        """The features that occur."""
        mask = 1 << self.offset
        for size, stride in (atom for atoms in self.dims for atom in atoms if atom[1]):
            mask = _repeated(mask, size, stride)
        return mask

    def view(self, shape: Sequence[int]) -> Layout | None:
        """As ``torch.reshape``."""
        atoms = [atom for dim in self.dims for atom in dim]
        dims = []
        for size in shape:
            taken: list[Atom] = []
            need = size
            while need > 1:
                if not atoms:
                    return None
                have, stride = atoms.pop(0)
                if need % have == 0:
                    taken.append((have, stride))
                    need //= have
                elif have % need == 0:
                    taken.append((need, stride * (have // need)))
                    atoms.insert(0, (have // need, stride))
                    need = 1
                else:
                    return None
            dims.append(_merged(taken))
        return None if atoms else Layout(tuple(dims), self.offset)

    def permute(self, order: Sequence[int]) -> Layout:
        """As ``torch.permute``."""
        return Layout(tuple(self.dims[axis % len(self.dims)] for axis in order), self.offset)

    def transpose(self, first: int, second: int) -> Layout:
        """As ``torch.transpose``."""
        order = list(range(len(self.dims)))
        order[first], order[second] = order[second], order[first]
        return self.permute(order)

    def narrow(self, axis: int, start: int, stop: int, step: int = 1) -> Layout | None:
        """As the slice ``start:stop:step`` along ``axis``."""
        axis %= len(self.dims)
        cut = _narrow(self.dims[axis], start, stop, step)
        if cut is None:
            return None
        atoms, shift = cut
        return Layout((*self.dims[:axis], atoms, *self.dims[axis + 1 :]), self.offset + shift)

    def select(self, axis: int, index: int) -> Layout | None:
        """As ``torch.select``."""
        axis %= len(self.dims)
        if index < 0:
            index += self.shape[axis]
        cut = self.narrow(axis, index, index + 1)
        return cut and Layout((*cut.dims[:axis], *cut.dims[axis + 1 :]), cut.offset)

    def expand(self, shape: Sequence[int]) -> Layout | None:
        """As ``torch.expand``: new dimensions in front and dimensions of size 1 repeat."""
        missing = len(shape) - len(self.dims)
        if missing < 0:
            return None
        dims = ((),) * missing + self.dims
        own = (1,) * missing + self.shape
        if any(have not in (1, want) for have, want in zip(own, shape, strict=True)):
            return None
        return Layout(
            tuple(
                atoms if have == want else _merged([(want, 0)])
                for atoms, have, want in zip(dims, own, shape, strict=True)
            ),
            self.offset,
        )

    def followed_by(self, other: Layout, axis: int) -> Layout | None:
        """The two concatenated along ``axis``, if ``other`` continues the features of this one."""
        axis %= len(self.dims)
        mine, others = self.dims[axis], other.dims[axis]
        if self.dims[:axis] + self.dims[axis + 1 :] != other.dims[:axis] + other.dims[axis + 1 :]:
            return None
        if len(mine) > 1 or len(others) > 1:
            return None
        stride = (mine or others or ((1, 1),))[0][1]
        size, more = self.shape[axis], other.shape[axis]
        if any(atom[1] != stride for atom in mine + others) or other.offset != self.offset + size * stride:
            return None
        return Layout((*self.dims[:axis], _merged([(size + more, stride)]), *self.dims[axis + 1 :]), self.offset)


def _repeated(mask: int, count: int, stride: int) -> int:
    """``mask`` at ``count`` places, ``stride`` apart."""
    if count == 1:
        return mask
    half = _repeated(mask, count // 2, stride)
    both = half | half << (count // 2 * stride)
    return both | mask << ((count - 1) * stride) if count % 2 else both


def _narrow(atoms: tuple[Atom, ...], start: int, stop: int, step: int) -> tuple[tuple[Atom, ...], int] | None:
    """(atoms, shift of the offset) of a slice of one dimension."""
    if not atoms:
        return ((), 0) if (start, stop) == (0, 1) else None
    (size, stride), rest = atoms[0], atoms[1:]
    inner = math.prod(s for s, _ in rest)
    stop = min(stop, size * inner)
    if not 0 <= start < stop:
        return None
    if not rest:
        return _merged([(-(-(stop - start) // step), stride * step)]), start * stride
    if step == 1 and start % inner == 0 and stop % inner == 0:
        first, last = start // inner, stop // inner
        return _merged([(last - first, stride), *rest]), first * stride
    if start // inner == (stop - 1) // inner:
        major = start // inner
        cut = _narrow(rest, start - major * inner, stop - major * inner, step)
        return cut and (cut[0], cut[1] + major * stride)
    return None


def runs(mask: int) -> list[tuple[int, int]]:
    """The maximal ranges (start, stop) of features in ``mask``."""
    found, position = [], 0
    while mask:
        gap = (mask & -mask).bit_length() - 1
        mask >>= gap
        length = (~mask & (mask + 1)).bit_length() - 1
        found.append((position + gap, position + gap + length))
        mask >>= length
        position += gap + length
    return found
