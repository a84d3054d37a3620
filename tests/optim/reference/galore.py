"""GaLore (arXiv 2403.03507, Alg. 2), naively: a full SVD in float64, one matrix at a time.

When a matrix has its turn, and the sign of a new singular vector, are ours to choose; the first comes from the same
hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memadvise.optim import noise
from reference import adam
from reference.apollo import Betas, matrices


def run(
    p: Tensor,
    grads: Sequence[Tensor],
    lr: float,
    betas: Betas,
    eps: float,
    weight_decay: float,
    options: dict[str, Any],
    *,
    name: str = "p",
) -> list[Tensor]:
    """``options`` as in a plan; ``name`` is the parameter's."""
    options = {
        "rank": None, "scale": 0.25, "update_every": 200, "stagger": True, "compat": None, "seed": 0, **options
    }  # fmt: skip
    key = noise.key_of(noise.key_of(options["seed"], name), "turn")
    parts = zip(*(matrices(g) for g in grads), strict=True)
    seen = [
        _one(x, list(gs), lr, betas, eps, weight_decay, options, key) for x, gs in zip(matrices(p), parts, strict=True)
    ]
    return [torch.stack(xs).reshape(p.shape) for xs in zip(*seen, strict=True)]


def _one(
    x: Tensor, grads: list[Tensor], lr: float, betas: Betas, eps: float, wd: float, options: dict[str, Any], key: int
) -> list[Tensor]:
    if min(x.shape) == 1:
        return adam.run(x, grads, adam.each(x.shape), lr=lr, betas=betas, eps=eps, weight_decay=wd)
    (b1, b2), official, every = betas, options["compat"] == "official", options["update_every"]
    wide = x.shape[0] < x.shape[1]
    x = (x.T if wide else x).double().clone()  # channels first
    n, m = x.shape
    r = options["rank"] or max(m // 4, 1)
    mean, square = torch.zeros(n, r, dtype=torch.float64), torch.zeros(n, r, dtype=torch.float64)
    p = torch.zeros(m, r, dtype=torch.float64)
    offset, seen = key % every if options["stagger"] else 0, []
    for t, grad in enumerate(grads, start=1):
        g = (grad.T if wide else grad).double()
        if t == 1 or (t - 1 + offset) % every == 0:
            new = torch.linalg.svd(g, full_matrices=False)[2][:r].T
            p = torch.stack([-b if a @ b < 0 else b for a, b in zip(p.T, new.T, strict=True)], 1)
        projected = g @ p
        mean = b1 * mean + (1 - b1) * projected
        square = b2 * square + (1 - b2) * projected * projected
        if official:
            direction = mean / (1 - b1**t) * (1 - b2**t) ** 0.5 / (square.sqrt() + eps)
        else:
            direction = mean / (1 - b1**t) / ((square / (1 - b2**t)).sqrt() + eps)
        update = lr * options["scale"] * direction @ p.T
        x = (x - update) * (1 - lr * wd) if official else x * (1 - lr * wd) - update
        seen.append((x.T if wide else x).clone())
    return seen
