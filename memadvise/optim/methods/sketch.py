"""Random projections that keep norms on average, ``E |g P|^2 = |g|^2``, drawn again from a key whenever wanted.

``gaussian``: ``P`` [m, r] of independent N(0, 1/r). ``sketch``: one sign in each row of P, so that projecting costs one
pass over g instead of 2 r operations an element. Coordinates go in blocks of r, and a block fills the r buckets once,
turned by an offset of its own: r neighbours never meet, and two coordinates of different blocks meet with probability
1/r. With r = m that is a permutation with signs, which keeps norms exactly. Where r is below m / 64 the blocks would be
many and small; there P is dense, signs / sqrt(r).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from memadvise.optim import noise

KINDS = ("gaussian", "sketch")
MOST_BLOCKS = 64
_AT_ONCE = 32768  # numbers drawn at once, or a quarter of all: drawing takes 36 bytes for each
_DRAW_BYTES = 36


def in_blocks(kind: str, m: int, rank: int) -> bool:
    """Whether the projection is one sign a coordinate, in blocks."""
    return kind == "sketch" and m <= MOST_BLOCKS * rank


def draw(kind: str, key: int, m: int, rank: int, like: Tensor) -> Tensor:
    """What :func:`project` needs: P, [m, rank], or the signs of the coordinates, [m, 1]; as ``like``."""
    columns = 1 if in_blocks(kind, m, rank) else rank
    numbers = torch.empty(m * columns, device=like.device, dtype=torch.float32)
    make = noise.gaussian if kind == "gaussian" else noise.signs
    size = _at_once(m * columns)
    for start in range(0, m * columns, size):
        part = numbers[start : start + size]
        part.copy_(make(key, start, part.numel(), like.device))
    return numbers.to(like.dtype).mul_(columns**-0.5).view(m, columns)


def _at_once(count: int) -> int:
    return max(_AT_ONCE, -(-count // 4))


def draw_bytes(kind: str, m: int, rank: int) -> int:
    """Upper bound of what :func:`draw` allocates, its result included."""
    count = m * (1 if in_blocks(kind, m, rank) else rank)
    return 4 * count + _DRAW_BYTES * min(count, _at_once(count))


@lru_cache(maxsize=4096)
def _offsets(key: int, blocks: int, rank: int) -> tuple[int, ...]:
    """By how much each block is turned; on the host, as they say which parts are added to which."""
    return tuple(noise.key_of(key, "offset", block) % rank for block in range(blocks))


def project(g: Tensor, drawn: Tensor, kind: str, key: int, m: int, rank: int, first: int, *, by_rows: bool) -> Tensor:
    """The projection of one box: [..., rows, rank] where rows are the channels, else [..., rank, columns].

    ``g`` is the box, [..., rows, columns]; ``drawn`` the part of what :func:`draw` gave that belongs to its
    coordinates, ``first`` the number of the first of these; ``by_rows``: whether rows are the channels and columns the
    coordinates. The results of boxes with the same channels add up.
    """
    if not in_blocks(kind, m, rank):
        return g @ drawn if by_rows else drawn.mT @ g
    axis, signs = (-1, drawn[:, 0]) if by_rows else (-2, drawn)
    shape = list(g.shape)
    size, shape[axis] = shape[axis], rank
    sums = g.new_zeros(shape)
    for block, offset in enumerate(_offsets(key, math.ceil(m / rank), rank)):
        low, high = max(block * rank, first), min((block + 1) * rank, first + size)
        turn = (block + 1) * rank - offset  # the first coordinate of the block that falls in bucket 0
        for start, stop, bucket in ((low, min(turn, high), rank - turn), (max(turn, low), high, -turn)):
            if start < stop:
                source = g.narrow(axis, start - first, stop - start)
                weights = signs.narrow(0, start - first, stop - start)
                sums.narrow(axis, start + bucket, stop - start).addcmul_(source, weights)
    return sums
