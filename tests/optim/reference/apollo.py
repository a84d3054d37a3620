"""APOLLO (arXiv 2412.05270, Alg. 1), naively: P as a dense matrix, the scaled gradient in full, one matrix at a time.

P's numbers are part of the specification and come from the same hash.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memadvise.optim import noise
from reference import adam

Betas = tuple[float, float]


def projection(key: int, m: int, r: int, kind: str) -> Tensor:
    """[m, r], in float64; ``key`` is of the parameter and the window."""
    if kind == "gaussian":
        return noise.gaussian(key, 0, m * r, "cpu").double().reshape(m, r) / math.sqrt(r)
    if m > 64 * r:
        return noise.signs(key, 0, m * r, "cpu").double().reshape(m, r) / math.sqrt(r)
    signs, p = noise.signs(key, 0, m, "cpu").tolist(), torch.zeros(m, r, dtype=torch.float64)
    for i in range(m):
        turned = noise.key_of(key, "offset", i // r) % r
        p[i, (i % r + turned) % r] = signs[i]
    return p


def matrices(p: Tensor) -> list[Tensor]:
    """A convolution as one matrix, a stack as its matrices."""
    if p.ndim > 3:
        return [p.reshape(p.shape[0], -1)]
    return list(p) if p.ndim == 3 else [p]


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
    mini: bool = False,
) -> list[Tensor]:
    """``options`` as in a plan; ``name`` is the parameter's."""
    defaults = {"scale": 128.0, "rank": 1, "scaling": "tensor"} if mini else {"scale": 1.0, "rank": None}
    options = {
        "scaling": "channel", "projection": "gaussian", "update_every": 200, "limiter": 1.01, "limiter_floor": 1e-6,
        "limiter_on": "raw", "compat": None, "seed": 0, **defaults, **options,
    }  # fmt: skip
    parts = zip(*(matrices(g) for g in grads), strict=True)
    seen = [
        _one(x, list(gs), lr, betas, eps, weight_decay, options, noise.key_of(options["seed"], name))
        for x, gs in zip(matrices(p), parts, strict=True)
    ]
    return [torch.stack(xs).reshape(p.shape) for xs in zip(*seen, strict=True)]


def _one(
    x: Tensor, grads: list[Tensor], lr: float, betas: Betas, eps: float, wd: float, options: dict[str, Any], key: int
) -> list[Tensor]:
    if min(x.shape) == 1:
        return adam.run(x, grads, adam.each(x.shape), lr=lr, betas=betas, eps=eps, weight_decay=wd)
    (b1, b2), official = betas, options["compat"] == "official"
    wide = x.shape[0] < x.shape[1]
    x = (x.T if wide else x).double().clone()  # channels first
    n, m = x.shape
    r = options["rank"] or max(m // 4, 1)
    mean, square = torch.zeros(n, r, dtype=torch.float64), torch.zeros(n, r, dtype=torch.float64)
    before: float | None = None
    largest, seen = 0.0, []
    for t, grad in enumerate(grads, start=1):
        g = (grad.T if wide else grad).double()
        window = noise.key_of(key, "projection", (t - 1) // options["update_every"])
        projected = g @ projection(window, m, r, options["projection"])
        mean = b1 * mean + (1 - b1) * projected
        square = b2 * square + (1 - b2) * projected * projected
        correction = math.sqrt(1 - b2**t) / (1 - b1**t)
        if official:
            adam_like = mean / (square.sqrt() + eps)
        else:
            adam_like = mean / (1 - b1**t) / ((square / (1 - b2**t)).sqrt() + eps) / correction
        if options["scaling"] == "channel":
            above, below = adam_like.norm(dim=1, keepdim=True), projected.norm(dim=1, keepdim=True)
        else:
            above, below = adam_like.norm(), projected.norm()
        s = above / (below + 1e-8) if official else torch.where(below > 0, above / below, 0.0)
        scaled = g * s
        limited_on = correction if options["limiter_on"] == "corrected" else 1.0
        size = (scaled.norm() * limited_on).item()
        gamma = options["limiter"]
        if gamma is not None and official:
            rho = 1.0 if before is None else max(size / (before + 1e-8), gamma) / gamma
            scaled, before = scaled / rho, size / rho
        elif gamma is not None:
            rho = 1.0
            if before is not None and before > options["limiter_floor"] * max(largest, size):
                rho = max(size / before / gamma, 1.0)
            scaled = scaled / rho
            if size > 0:
                before = size / rho
                largest = max(largest, before)
        update = lr * correction * math.sqrt(options["scale"]) * scaled
        x = (x - update) * (1 - lr * wd) if official else x * (1 - lr * wd) - update
        seen.append((x.T if wide else x).clone())
    return seen
