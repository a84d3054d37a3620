"""Random numbers without a state: a hash of a key and of an element's number.

The same key gives the same numbers on every device, in every process, whatever part of a tensor is asked for: results
do not depend on chunks, shards, the order of parameters, or on what else drew random numbers; and resuming needs no
generator in the checkpoint. The hash is MurmurHash3's 32-bit finaliser, applied twice.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

_MASK = 0xFFFFFFFF


def key_of(*parts: int | str) -> int:
    """64 bits from numbers and names, the same in every process (unlike Python's ``hash``)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(h: Tensor) -> Tensor:
    h = h.bitwise_xor_(h >> 16).mul_(0x85EBCA6B).bitwise_and_(_MASK)
    h = h.bitwise_xor_(h >> 13).mul_(0xC2B2AE35).bitwise_and_(_MASK)
    return h.bitwise_xor_(h >> 16)


def bits(key: int, start: int, count: int, device: torch.device | str) -> Tensor:
    """``count`` uniform 32-bit integers (as int64) for the elements ``start``, ``start + 1``, ..."""
    low, high = key & _MASK, key >> 32
    if detect_fake_mode() is None:
        h = torch.arange(start, start + count, device=device, dtype=torch.int64).bitwise_and_(_MASK)
    else:  # in a trace the numbers do not matter, and following them as known values would compute them
        h = torch.empty(count, device=device, dtype=torch.int64).bitwise_and_(_MASK)
    h = _mix(h.mul_(0x9E3779B1).add_(low + (start >> 32)).bitwise_and_(_MASK))
    return _mix(h.add_(high).bitwise_and_(_MASK))


def uniform(key: int, start: int, count: int, device: torch.device | str) -> Tensor:
    """``count`` float32 numbers in [0, 1), multiples of 2^-24."""
    return (bits(key, start, count, device) >> 8).to(torch.float32).mul_(2.0**-24)


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
    return ((bits(key, start, count, device) >> 31) * 2 - 1).to(torch.float32)
