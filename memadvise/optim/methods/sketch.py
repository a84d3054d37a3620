"""Random projections that keep norms on average, ``E |g P|^2 = |g|^2``, drawn again from a key whenever wanted.

``gaussian``: ``P`` [m, r] of independent N(0, 1/r). ``sketch``: one sign in each row of P, so that projecting costs one
pass over g instead of 2 r operations an element. Coordinates go in blocks of r, and a block fills the r buckets once,
turned by an offset of its own: r neighbours never meet, and two coordinates of different blocks meet with probability
1/r. With r = m that is a permutation with signs, which keeps norms exactly. Where r is below m / 64 the blocks would be
many and small; there P is dense, signs / sqrt(r).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import lru_cache

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from memadvise.optim import noise
from memadvise.optim.method import device_type

KINDS = ("gaussian", "sketch")
MOST_BLOCKS = 64
_AT_ONCE = 32768  # numbers drawn at once, or a quarter of all: drawing takes 36 bytes for each
_CUDA_AT_ONCE = 2**20  # there a launch costs more than a few thousand numbers
_DRAW_BYTES = 36
_MOST_KEPT, _KEPT_BYTES = {"cpu": 2**14, "cuda": 2**16}, {"cpu": 2**20, "cuda": 2**23}  # of one draw, and of all


def in_blocks(kind: str, m: int, rank: int) -> bool:
    """Whether the projection is one sign a coordinate, in blocks."""
    return kind == "sketch" and m <= MOST_BLOCKS * rank


_kept: dict[str, OrderedDict[tuple[object, ...], Tensor]] = {kind: OrderedDict() for kind in _KEPT_BYTES}


def draw(kind: str, key: int, m: int, rank: int, like: Tensor) -> Tensor:
    """What :func:`project` needs: P, [m, rank], or the signs of the coordinates, [m, 1]; as ``like``. To read only.

    A small one (a vector, as a rule) is kept until it is drawn again: drawing it takes longer than using it. All that
    is kept takes at most a MiB on the CPU and 8 on a GPU; the most recent ones are.
    """
    columns = 1 if in_blocks(kind, m, rank) else rank
    size, device = like.itemsize * m * columns, like.device.type
    if size > _MOST_KEPT.get(device, 0) or detect_fake_mode() is not None:
        return _drawn(kind, key, m, columns, like)
    kept, what = _kept[device], (kind, key, m, columns, like.device, like.dtype)
    found = kept.pop(what, None)
    kept[what] = drawn = _drawn(kind, key, m, columns, like) if found is None else found
    if len(kept) * _MOST_KEPT[device] > _KEPT_BYTES[device]:
        while kept_bytes(device) > _KEPT_BYTES[device]:
            kept.popitem(last=False)
    return drawn


def kept_bytes(device: str) -> int:
    """Bytes of all that is kept on devices of a kind, "cpu" or "cuda"."""
    return sum(t.numel() * t.itemsize for t in _kept[device].values())


def _drawn(kind: str, key: int, m: int, columns: int, like: Tensor) -> Tensor:
    numbers = torch.empty(m * columns, device=like.device, dtype=torch.float32)
    make = noise.gaussian if kind == "gaussian" else noise.signs
    size = _CUDA_AT_ONCE if device_type(like) == "cuda" else _at_once(m * columns)
    for start in range(0, m * columns, size):
        part = numbers[start : start + size]
        part.copy_(make(key, start, part.numel(), like.device))
    return numbers.to(like.dtype).mul_(columns**-0.5).view(m, columns)


def _at_once(count: int) -> int:
    return max(_AT_ONCE, -(-count // 4))


def draw_bytes(kind: str, m: int, rank: int, device: str = "cpu") -> int:
    """Upper bound of what :func:`draw` allocates on a device of that kind, its result included."""
    count = m * (1 if in_blocks(kind, m, rank) else rank)
    return 4 * count + _DRAW_BYTES * min(count, _CUDA_AT_ONCE if device == "cuda" else _at_once(count))


@lru_cache(maxsize=4096)
def _offsets(key: int, blocks: int, rank: int) -> tuple[int, ...]:
    """By how much each block is turned; on the host, as they say which parts are added to which."""
    return tuple(noise.key_of(key, "offset", block) % rank for block in range(blocks))


def project(
    g: Tensor, drawn: Tensor, kind: str, key: int, m: int, rank: int, first: int, *, by_rows: bool,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The projection of one box: [..., rows, rank] where rows are the channels, else [..., rank, columns].

    ``g`` is the box, [..., rows, columns]; ``drawn`` the part of what :func:`draw` gave that belongs to its
    coordinates, ``first`` the number of the first of these; ``by_rows``: whether rows are the channels and columns the
    coordinates. The results of boxes with the same channels add up; to ``out`` (of matrices only), if given.
    """
    if not in_blocks(kind, m, rank):
        left, right = (g, drawn) if by_rows else (drawn.mT, g)
        return left @ right if out is None else out.addmm_(left, right)
    axis, signs = (-1, drawn[:, 0]) if by_rows else (-2, drawn)
    lengths, targets = _pieces(key, m, rank, first, g.shape[axis])
    shape = list(g.shape)
    shape[axis] = rank
    sums = g.new_zeros(shape) if out is None else out
    for source, weights, (start, count) in zip(g.split(lengths, axis), signs.split(lengths), targets, strict=True):
        sums.narrow(axis, start, count).addcmul_(source, weights)
    return sums


@lru_cache(maxsize=4096)
def _pieces(key: int, m: int, rank: int, first: int, size: int) -> tuple[list[int], list[tuple[int, int]]]:
    """How the coordinates from ``first`` on are cut: lengths, and where each piece starts in the buckets, and its
    length again.
    """
    found = []
    for block, offset in enumerate(_offsets(key, math.ceil(m / rank), rank)):
        low, high = max(block * rank, first), min((block + 1) * rank, first + size)
        turn = (block + 1) * rank - offset  # the first coordinate of the block that falls in bucket 0
        for start, stop, bucket in ((low, min(turn, high), rank - turn), (max(turn, low), high, -turn)):
            if start < stop:
                found.append((start + bucket, stop - start))
    return [count for _, count in found], found
