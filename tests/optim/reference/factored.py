"""Adafactor (arXiv 1804.04235, Alg. 4) and CAME (arXiv 2307.02047, Alg. 2), matrix by matrix, v written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _matrices(x: Tensor) -> list[Tensor]:
    """A stack gives its matrices, a convolution one matrix, a vector or scalar itself."""
    x = x.double()
    if x.ndim == 3:
        return list(x.unbind())
    return [x.reshape(x.shape[0], -1) if x.ndim > 3 else x]


def _together(parts: list[Tensor], shape: torch.Size) -> Tensor:
    return torch.stack(parts).reshape(shape)


class _Second:
    """v of one matrix (from its row and column means) or vector (in full)."""

    def __init__(self) -> None:
        self.rows: Tensor | float = 0.0
        self.columns: Tensor | float = 0.0

    def after(self, squares: Tensor, beta: float) -> Tensor:
        if squares.ndim < 2:
            self.rows = beta * self.rows + (1 - beta) * squares
            return self.rows
        self.rows = beta * self.rows + (1 - beta) * squares.mean(1)
        self.columns = beta * self.columns + (1 - beta) * squares.mean(0)
        return torch.outer(self.rows, self.columns) / self.rows.mean()


def _rms(x: Tensor) -> float:
    return math.sqrt(sum(value * value for value in x.flatten().tolist()) / max(x.numel(), 1))


def adafactor(
    p: Tensor,
    grads: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    options: dict[str, Any],
) -> list[Tensor]:
    kind, b1 = options.get("step_size", "lr"), options.get("momentum", 0.0)
    xs = _matrices(p)
    seconds, ms = [_Second() for _ in xs], [torch.zeros_like(x) for x in xs]
    seen = []
    for t, grad in enumerate(grads, start=1):
        for i, g in enumerate(_matrices(grad)):
            v = seconds[i].after(g * g + 1e-30, 1 - t**-0.8)
            u = g / v.sqrt()
            u = u / max(1.0, _rms(u))
            ms[i] = b1 * ms[i] + (1 - b1) * u
            size = max(1e-3, _rms(xs[i]))
            alpha = {"lr": lr, "relative": size * min(lr, 1 / math.sqrt(t)), "scaled": size * lr}[kind]
            xs[i] = xs[i] - lr * weight_decay * xs[i] - alpha * ms[i]
        seen.append(_together(xs, p.shape))
    return seen


def came(
    p: Tensor,
    grads: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    options: dict[str, Any],
) -> list[Tensor]:
    b1, b2, b3 = *betas, options.get("beta3", 0.9999)
    xs = _matrices(p)
    seconds, unsteady, ms = [_Second() for _ in xs], [_Second() for _ in xs], [torch.zeros_like(x) for x in xs]
    seen = []
    for t, grad in enumerate(grads, start=1):
        for i, g in enumerate(_matrices(grad)):
            u = g / seconds[i].after(g * g + 1e-30, b2).sqrt()
            u = u / max(1.0, _rms(u))
            ms[i] = b1 * ms[i] + (1 - b1) * u
            step = ms[i]
            if g.ndim == 2:
                s = unsteady[i].after((u - ms[i]) ** 2 + 1e-16, b3)
                step = step / (s / (1 - b3**t) if options.get("correct_instability") else s).sqrt()
            xs[i] = xs[i] - lr * weight_decay * xs[i] - lr * step
        seen.append(_together(xs, p.shape))
    return seen
