"""MicroAdam (arXiv 2405.15593, Alg. 1 and 2) with our mended 4-bit codes, element by element."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _of_bits(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])


def bf16(x: float) -> float:
    """To the nearest bfloat16, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    return _of_bits((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


def fp32(x: float) -> float:
    """To the nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def _neighbour(x: float, up: bool) -> float:
    """The next bfloat16 above or below a bfloat16."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    bits >>= 16
    if x == 0:
        return _of_bits(1 if up else 0x8001)
    return _of_bits(bits + (1 if (x > 0) == up else -1))


def below(x: float) -> float:
    return bf16(x) if bf16(x) <= x else _neighbour(bf16(x), up=False)


def above(x: float) -> float:
    return bf16(x) if bf16(x) >= x else _neighbour(bf16(x), up=True)


def coded(values: list[float], bucket: int) -> list[float]:
    """What 4 bits hold of ``values``."""
    result: list[float] = []
    for start in range(0, len(values), bucket):
        part = values[start : start + bucket]
        low, high = below(min(part)), above(max(part))
        if low == high:
            result += [low] * len(part)
            continue
        span = high - low
        codes = [low + c * span / 15 for c in range(16)]
        if low <= 0 <= high:  # shift the grid so that the code nearest to zero is zero
            zero = math.floor(15 * -low / span + 0.5)
            codes = [(c - zero) * span / 15 for c in range(16)]
        for x in part:
            result.append(codes[min(max(math.floor((x - codes[0]) / span * 15 + 0.5), 0), 15)])
    return result


def run(
    p: Tensor,
    grads: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    options: dict[str, Any],
) -> list[Tensor]:
    window, density = options.get("window", 10), options.get("density", 0.01)
    block, bucket = options.get("block", 16384), options.get("bucket", 64)
    alpha, kept = options.get("alpha", 0.0), {"bf16": bf16, "fp32": fp32}[options.get("values", "bf16")]
    (b1, b2), x = betas, p.double().flatten().tolist()
    fed_back = [0.0] * len(x)
    ring: list[dict[int, float]] = []  # newest first
    seen = []
    for t, grad in enumerate(grads, start=1):
        a = [g + e for g, e in zip(grad.double().flatten().tolist(), fed_back, strict=True)]
        row: dict[int, float] = {}
        for start in range(0, len(a), block):
            members = range(start, min(start + block, len(a)))
            largest = sorted(members, key=lambda i: -abs(a[i]))[: math.ceil(round(len(members) * density, 9))]
            row.update({i: kept(a[i]) for i in largest})
        for i in row:
            a[i] = 0.0
        ring = [row, *ring][:window]
        fed_back = coded(a, bucket)
        n = min(t, window) if options.get("bias_correction") == "window" else t
        for i in range(len(x)):
            m = sum(b1**age * old[i] for age, old in enumerate(ring) if i in old) * (1 - b1) / (1 - b1**n)
            s = sum(b2**age * old[i] ** 2 for age, old in enumerate(ring) if i in old) * (1 - b2) / (1 - b2**n)
            u = m / (math.sqrt(s) + eps) + alpha * fed_back[i]
            x[i] -= lr * weight_decay * x[i]
            x[i] -= lr * u
        if alpha:
            fed_back = coded([(1 - alpha) * e for e in fed_back], bucket)
        seen.append(torch.tensor(x, dtype=torch.float64).reshape(p.shape))
    return seen
