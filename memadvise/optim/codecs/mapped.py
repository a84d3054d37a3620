"""Codes that stand for the entries of a small rising table, and the dynamic tables of arXiv 2110.02861.

Which entry is below a value is looked up, not searched for (a binary search of 256 entries costs a CPU 37 ns a value,
this 3): the upper 16 bits of a float32 leave a range that holds one boundary at most, so that one entry of a second
table gives the count of boundaries below the range, and one comparison the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from memadvise.optim.tracing import in_kernel, valueless

_RANGES = 1 << 16


def dynamic_map(levels: int, *, signed: bool) -> tuple[float, ...]:
    """0, 1, and on each of ``levels`` decades below 1 twice as many entries as on the one below it.

    Level i of 0, 1, ... takes 2^i (signed) or 2^(i + 1) (not) means of neighbours of equally spaced points of [0.1, 1],
    times 10^(i + 1 - levels), with both signs if ``signed``.
    """
    entries = [0.0, 1.0]
    for i in range(levels):
        count = 2**i if signed else 2 ** (i + 1)
        for j in range(count):
            entry = (0.1 + 0.9 * (j + 0.5) / count) * 10.0 ** (i + 1 - levels)
            entries += [entry, -entry] if signed else [entry]
    return tuple(sorted(entries))


class Counter:
    """Counts, for each value, the ``boundaries`` (rising) that are not above it; 0 for NaN."""

    def __init__(self, boundaries: Sequence[float]) -> None:
        self.boundaries = tuple(boundaries)

    def __hash__(self) -> int:
        return hash(self.boundaries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counter) and other.boundaries == self.boundaries

    def build(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The count below each range of the upper 16 bits (as a signed number, from the lowest), and the boundaries."""
        upper = torch.arange(-_RANGES // 2, _RANGES // 2, dtype=torch.int32) << 16
        lowest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
        boundaries = torch.tensor([*self.boundaries, float("nan")])  # beyond the last: above everything
        below = torch.bucketize(lowest, boundaries[:-1], right=True)
        below[lowest.isnan()] = 0
        return below.to(torch.uint8).to(device), boundaries.to(device)

    def all_compared(self, x: Tensor) -> Tensor:
        """:meth:`count` without a table."""
        found = torch.zeros(x.shape, dtype=torch.int32, device=x.device)
        for boundary in self.boundaries:
            found = found + (x >= boundary)
        return found

    def count(self, x: Tensor) -> Tensor:
        """int32, like ``x`` (float32, contiguous)."""
        below, boundaries = _built(self, x.device)
        upper = (x.view(torch.int32) >> 16).add_(_RANGES // 2)
        found = below.index_select(0, upper.flatten()).to(torch.int32)
        found += x.flatten() >= boundaries.index_select(0, found)
        return found.view(x.shape)


class Map:
    """A rising table of at most 256 entries, the codes' values."""

    def __init__(self, entries: Sequence[float]) -> None:
        self.entries = tuple(torch.tensor(entries).tolist())  # as float32, which are compared with
        self._floor = Counter(self.entries[1:])
        pairs = zip(self.entries, self.entries[1:], strict=False)
        self._nearest = Counter([(low + high) / 2 for low, high in pairs])

    def _few(self) -> bool:
        """Whether going through all entries is faster than looking up: in a compiled kernel of few entries."""
        return in_kernel() and len(self.entries) <= 16

    def floor(self, x: Tensor) -> Tensor:
        """The number of the largest entry that is not above ``x``, or 0; int32."""
        return self._floor.all_compared(x) if self._few() else self._floor.count(x)

    def nearest(self, x: Tensor) -> Tensor:
        """The number of the nearest entry; int32."""
        return self._nearest.all_compared(x) if self._few() else self._nearest.count(x)

    def value(self, codes: Tensor) -> Tensor:
        """Entries by their numbers (int32); beyond the last there is another 1 further up."""
        if self._few():
            found = torch.full(codes.shape, self.entries[0], device=codes.device)
            for number, entry in enumerate([*self.entries[1:], self.entries[-1] + 1.0]):
                found = torch.where(codes > number, entry, found)
            return found
        return _entries(self.entries, codes.device).index_select(0, codes.flatten()).view(codes.shape)


# Tables are made once for a device, outside a trace: there the values do not matter, and must not be kept.


def _built(counter: Counter, device: torch.device) -> tuple[Tensor, Tensor]:
    if not valueless() and device.type != "meta":
        return _kept_counter(counter, device)
    count = len(counter.boundaries) + 1
    return torch.empty(_RANGES, dtype=torch.uint8, device=device), torch.empty(count, device=device)


def _entries(entries: tuple[float, ...], device: torch.device) -> Tensor:
    if not valueless() and device.type != "meta":
        return _kept_entries(entries, device)
    return torch.empty(len(entries) + 1, device=device)


@lru_cache(maxsize=256)
def _kept_counter(counter: Counter, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), _disable_current_modes():
        return counter.build(device)


@lru_cache(maxsize=256)
def _kept_entries(entries: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False), _disable_current_modes():
        return torch.tensor([*entries, entries[-1] + 1.0], device=device)
