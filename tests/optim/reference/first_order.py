"""Lion (arXiv 2302.06675, Alg. 2) and SGD with momentum and decoupled decay (arXiv 1711.05101, Alg. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def lion(
    p: Tensor,
    grads: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    options: dict[str, Any],
) -> list[Tensor]:
    x, m, seen = p.double().flatten().tolist(), [0.0] * p.numel(), []
    for grad in grads:
        for i, g in enumerate(grad.double().flatten().tolist()):
            mix = betas[0] * m[i] + (1 - betas[0]) * g
            x[i] = x[i] - lr * (((mix > 0) - (mix < 0)) + weight_decay * x[i])
            m[i] = betas[1] * m[i] + (1 - betas[1]) * g
        seen.append(torch.tensor(x, dtype=torch.float64).reshape(p.shape))
    return seen


def sgd(
    p: Tensor,
    grads: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    options: dict[str, Any],
) -> list[Tensor]:
    x, b, seen = p.double().flatten().tolist(), [0.0] * p.numel(), []
    for grad in grads:
        for i, g in enumerate(grad.double().flatten().tolist()):
            b[i] = options["momentum"] * b[i] + g
            x[i] = x[i] - lr * (b[i] + weight_decay * x[i])
        seen.append(torch.tensor(x, dtype=torch.float64).reshape(p.shape))
    return seen
