"""What the official codes do, from their description (algorithms_a 2.1, 3.1 to 3.3; algorithms_b 3.1, 4.3), in float64.

One parameter at a time, naive tensors; each returns the parameter after every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Betas = tuple[float, float]


def slimadam(
    p: Tensor, grads: Sequence[Tensor], axes: Sequence[int] | None, *, lr: float, betas: Betas, eps: float, decay: float
) -> list[Tensor]:
    """low-memory-adam: weight decay for tensors of two and more axes only, after the moments; rules may be None."""
    x, (b1, b2), seen = p.double().clone(), betas, []
    m, v = torch.zeros_like(x), torch.zeros((), dtype=torch.float64)
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g * g if axes is None else (g * g).mean(tuple(axes), keepdim=True))
        if x.ndim >= 2:
            x = x * (1 - lr * decay)
        x = x - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        seen.append(x)
    return seen


def adam_mini(
    p: Tensor, grads: Sequence[Tensor], name: str, *, dim: int, n_heads: int, lr: float, betas: Betas, eps: float,
    decay: float,
) -> list[Tensor]:  # fmt: skip
    """Adam-mini 1.1.1: branch and decay come from the parameter's name, head blocks have dim^2 / n_heads entries."""
    x, (b1, b2), seen = p.double().clone(), betas, []
    m = torch.zeros_like(x)
    if "norm" in name or "ln" in name or "bias" in name:
        decay = 0.0
    v = torch.zeros((), dtype=torch.float64)
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        m = b1 * m + (1 - b1) * g
        if "bias" in name:
            v = b2 * v + (1 - b2) * g * g
            expanded = v
        elif any(part in name for part in ("q_proj", "k_proj", "query", "key")):
            v = b2 * v + (1 - b2) * (g * g).reshape(-1, dim * dim // n_heads).mean(1)
            expanded = v.repeat_interleave(dim * dim // n_heads).reshape(g.shape)
        elif any(part in name for part in ("embed", "lm_head", "v_proj", "o_proj", "mlp")):
            v = b2 * v + (1 - b2) * (g * g).mean(1, keepdim=True)
            expanded = v
        else:
            v = b2 * v + (1 - b2) * (g * g).sum() / g.numel()
            expanded = v
        x = x * (1 - lr * decay)
        x = x - lr * (m / (1 - b1**t)) / (expanded.sqrt() / math.sqrt(1 - b2**t) + eps)
        seen.append(x)
    return seen


def c_adamw(p: Tensor, grads: Sequence[Tensor], *, lr: float, betas: Betas, eps: float, decay: float) -> list[Tensor]:
    """C-Optim's AdamW: bias corrections folded into the step size, eps added to sqrt(v); 1 / max(mean(mask), 1e-3)."""
    x, (b1, b2), seen = p.double().clone(), betas, []
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        mask = (m * g > 0).double()
        mask = mask / max(mask.mean().item(), 1e-3)
        x = x - lr * decay * x
        x = x - lr * math.sqrt(1 - b2**t) / (1 - b1**t) * mask * m / (v.sqrt() + eps)
        seen.append(x)
    return seen


def c_lion(p: Tensor, grads: Sequence[Tensor], *, lr: float, betas: Betas, decay: float) -> list[Tensor]:
    """C-Optim's Lion: the mask from the sign of the mix, scaled by N / (kept + 1)."""
    x, (b1, b2), seen = p.double().clone(), betas, []
    m = torch.zeros_like(x)
    for grad in grads:
        g = grad.double()
        w = (b1 * m + (1 - b1) * g).sign()
        mask = (w * g > 0).double()
        mask = mask * (mask.numel() / (mask.sum().item() + 1))
        x = x - lr * decay * x
        x = x - lr * mask * w
        m = b2 * m + (1 - b2) * g
        seen.append(x)
    return seen


def came(p: Tensor, grads: Sequence[Tensor], *, lr: float, betas: Betas, beta3: float, decay: float) -> list[Tensor]:
    """CAME: the last two axes factored whatever the others are, one RMS a tensor, no bias corrections."""
    x, (b1, b2), seen = p.double().clone(), betas, []
    m = torch.zeros_like(x)
    rows = columns = unsteady_rows = unsteady_columns = full = torch.zeros((), dtype=torch.float64)
    for grad in grads:
        g = grad.double()
        squares = g * g + 1e-30
        if g.ndim >= 2:
            rows = b2 * rows + (1 - b2) * squares.mean(-1)
            columns = b2 * columns + (1 - b2) * squares.mean(-2)
            u = g * (rows / rows.mean(-1, keepdim=True)).rsqrt()[..., None] * columns.rsqrt()[..., None, :]
        else:
            full = b2 * full + (1 - b2) * squares
            u = g * full.rsqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        m = b1 * m + (1 - b1) * u
        step = m
        if g.ndim >= 2:
            unsteady = (u - m) ** 2 + 1e-16
            unsteady_rows = beta3 * unsteady_rows + (1 - beta3) * unsteady.mean(-1)
            unsteady_columns = beta3 * unsteady_columns + (1 - beta3) * unsteady.mean(-2)
            scale = (unsteady_rows / unsteady_rows.mean(-1, keepdim=True)).rsqrt()
            step = m * scale[..., None] * unsteady_columns.rsqrt()[..., None, :]
        x = x - lr * decay * x
        x = x - lr * step
        seen.append(x)
    return seen
