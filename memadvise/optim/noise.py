"""Random numbers without a state: a hash of a key and of an element's number.

The same key gives the same numbers on every device, in every process, whatever part of a tensor is asked for: results
do not depend on chunks, shards, the order of parameters, or on what else drew random numbers; and resuming needs no
generator in the checkpoint. The hash is the 32-bit one of least bias with two multiplications (Wellons'
hash-prospector); one half of the key enters before it, the other within.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from memadvise.optim.tracing import valueless

_MASK = 0xFFFFFFFF
_MASK64 = (1 << 64) - 1


def key_of(*parts: int | str) -> int:
    """64 bits from numbers and names, the same in every process (unlike Python's ``hash``)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


Key = int | tuple[Tensor, Tensor]  # 64 bits: a number, or its halves as 0-dim int32 tensors (in a compiled kernel)


def signed32(bits: int) -> int:
    """The lower 32 bits of a number, as int32 reads them."""
    bits &= _MASK
    return bits - (1 << 32) if bits >> 31 else bits


def halves(key: int) -> tuple[int, int]:
    """The int32 halves of a key whose every bit depends on every bit of ``key`` (splitmix64); keys may be 0, 1, ..."""
    z = (key + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31
    return signed32(z), signed32(z >> 32)


def _shifted(h: Tensor, places: int) -> Tensor:
    """``h`` shifted to the right, with zeros from the left: int32 has a sign."""
    return (h >> places).bitwise_and_((1 << (32 - places)) - 1)


def bits(key: Key, start: int, count: int, device: torch.device | str) -> Tensor:
    """``count`` uniform 32-bit integers (int32, with a sign) for the elements ``start``, ``start + 1``, ..."""
    low, high = key if isinstance(key, tuple) else halves(key)
    if valueless():  # following the numbers as known values would compute them
        h = torch.empty(count, device=device, dtype=torch.int32)
    else:
        h = torch.arange(count, device=device, dtype=torch.int32)
    # int32 wraps around, so that all of this is modulo 2^32
    # (the key comes before the product: a compiler would take a multiple of a place for an index, in 64 bits)
    h = h.add_(signed32(start)).bitwise_xor_(low).mul_(signed32(0x9E3779B1)).add_(signed32(start >> 32))
    h = h.bitwise_xor_(_shifted(h, 16)).mul_(signed32(0x7FEB352D)).add_(high)
    h = h.bitwise_xor_(_shifted(h, 15)).mul_(signed32(0x846CA68B))
    return h.bitwise_xor_(_shifted(h, 16))


def uniform(key: Key, start: int, count: int, device: torch.device | str) -> Tensor:
    """``count`` float32 numbers in [0, 1), multiples of 2^-24."""
    return _shifted(bits(key, start, count, device), 8).to(torch.float32).mul_(2.0**-24)


def gaussian(key: int, start: int, count: int, device: torch.device | str) -> Tensor:
    """``count`` standard normal float32 numbers (Box and Muller).

    In float64 and rounded: the last bits of a float32 logarithm are not the same on every device, nor at every place
    of a vector.
    """
    radius = uniform(key, start, count, device).to(torch.float64).neg_().add_(1.0).log_().mul_(-2.0).sqrt_()
    angle = uniform(key ^ 0x5851F42D4C957F2D, start, count, device).to(torch.float64).mul_(2.0 * math.pi)
    return radius.mul_(angle.cos_()).to(torch.float32)


def signs(key: int, start: int, count: int, device: torch.device | str) -> Tensor:
    """``count`` float32 numbers, -1 or 1 with equal probability."""
    return ((bits(key, start, count, device) >> 31) * -2 - 1).to(torch.float32)
