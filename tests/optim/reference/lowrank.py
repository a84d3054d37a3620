"""Adapprox (arXiv 2403.14958), RMSprop and Adagrad with a second moment in means or factors: dense, matrix by matrix.

The factorisation is the textbook's subspace iteration with Gram-Schmidt columns; errors are those of the residual; the
singular value cut is that of the rebuilt matrix. Random starts are the specification's (a hash of seed, name, step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memadvise.optim.noise import gaussian, key_of

NAME_KEY = key_of(0, "p")


def matrices(shape: Sequence[int]) -> tuple[int, int, int]:
    """[matrices, rows, columns] of a parameter: filters of a convolution are rows, three axes a stack."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def compressible(shape: Sequence[int]) -> bool:
    return len(shape) > 1 and min(matrices(shape)[1:]) > 1


def largest_rank(rank: int | float | str | None, small: int) -> int:
    if rank == "full":
        return small
    return rank if isinstance(rank, int) else max(int(float(rank or 0.25) * small), 1)


def orthonormal(y: Tensor) -> Tensor:
    columns: list[Tensor] = []
    for j in range(y.shape[1]):
        c = y[:, j].clone()
        for _ in range(3):  # again, for the digits that cancelled
            for other in columns:
                c -= (other @ c) * other
        columns.append(c / c.norm() if c.norm() > 0 else c)
    return torch.stack(columns, 1)


def subspace(a: Tensor, u: Tensor, rank: int, iterations: int, svd: bool) -> tuple[Tensor, Tensor]:
    """Factors of the rank-``rank`` approximation of ``a``."""
    for _ in range(iterations):
        q = orthonormal(a @ (u / u.norm().clamp(min=1e-300)))
        u = a.T @ q
    if svd:
        x, s, yh = torch.linalg.svd(q @ u.T, full_matrices=False)
        q, u = x, yh.T * s
    return q[:, :rank], u[:, :rank]


def grow(rank: int, error: float, increment: Any) -> int:
    if increment == "double":
        return 2 * rank
    if callable(increment):
        return rank + max(1, math.floor(increment(error)))
    return rank + max(1, math.floor(200 / (1 + math.exp(-10 * error + 2.5)) - 9))


class Factors:
    """The low-rank estimate of a stack of matrices, rebuilt dense; one rank for the stack."""

    def __init__(self, shape: Sequence[int], options: dict[str, Any], default_iterations: int) -> None:
        self.count, self.rows, self.columns = matrices(shape)
        small = min(self.rows, self.columns)
        self.largest = largest_rank(options.get("rank"), small)
        self.least = min(options.get("rank_min", 1), self.largest)
        self.first = min(options.get("rank_init") or self.least, self.largest)
        self.every = options.get("adapt_every", 0)
        self.refresh, self.turn = options.get("refresh_every", 1), key_of(NAME_KEY, "refresh")
        self.made = 0  # the step at which the factors were made last
        self.iterations = options.get("power_iterations", default_iterations)
        self.extra = options.get("oversampling", 5)
        self.options = options
        self.estimate = torch.zeros(self.count, self.rows, self.columns, dtype=torch.float64)
        self.held: list[tuple[Tensor, Tensor]] = []
        self.rank = self.first if self.every else self.largest

    def sketches(self, step: int, columns: int) -> list[Tensor]:
        numbers = gaussian(key_of(NAME_KEY, "sketch", step), 0, columns * self.count * self.columns, "cpu").double()
        starts = numbers.reshape(columns, self.count, self.columns).permute(1, 2, 0).contiguous()
        return list(starts)

    def attempt(self, v: Tensor, step: int, rank: int) -> list[tuple[Tensor, Tensor]]:
        svd = self.options.get("truncation") == "svd"
        columns = min(rank + (self.extra if svd else 0), self.rows, self.columns)
        results = []
        for number, u in enumerate(self.sketches(step, columns)):
            if self.options.get("warm_start") and self.held:
                old = self.held[number][1]
                for j in range(min(columns, old.shape[1])):
                    if old[:, j].abs().max() > 0:
                        u[:, j] = old[:, j]
            results.append(subspace(v[number], u, rank, self.iterations, svd))
        return results

    def error(self, v: Tensor, factors: list[tuple[Tensor, Tensor]]) -> float:
        return max(((a - q @ u.T).norm() / a.norm()).item() for a, (q, u) in zip(v, factors, strict=True) if a.norm())

    def due(self, step: int) -> bool:
        return step == 1 or (step - 1 + self.turn) % self.refresh == 0

    def replace(self, v: Tensor, step: int) -> None:
        offset = NAME_KEY if self.options.get("stagger") else 0
        unseen = range(self.made + 1, step + 1) if self.every else range(0)
        self.made = step
        if any(d == 1 or (d - 1 + offset) % self.every == 0 for d in unseen) and self.first < self.largest:
            increment, limit = self.options.get("increment", "logistic"), self.options.get("error_threshold", 0.01)
            if increment == "one_shot":
                tried = range(self.least, self.largest + 1)
                good = [k for k in tried if self.error(v, self.attempt(v, step, k)) <= limit]
                self.rank = good[0] if good else self.largest
            else:
                self.rank = self.first
                while self.rank < self.largest and (e := self.error(v, self.attempt(v, step, self.rank))) > limit:
                    self.rank = min(grow(self.rank, e, increment), self.largest)
        self.held = self.attempt(v, step, self.rank)
        self.estimate = torch.stack([q @ u.T for q, u in self.held])

    def nonnegative(self, floor: float) -> Tensor:
        w = self.estimate
        if not floor or self.rank == min(self.rows, self.columns):
            return w.clamp(min=0)
        row, column = w.mean(2, keepdim=True).clamp(min=0), w.mean(1, keepdim=True).clamp(min=0)
        mean = row.mean(1, keepdim=True)
        return torch.maximum(w, (floor * row * column / mean).nan_to_num(0))


def adapprox(
    p: Tensor,
    grads: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    options: dict[str, Any],
) -> list[Tensor]:
    (b1, b2), shape = betas, tuple(p.shape)
    stack = matrices(shape) if len(shape) > 1 else (1, 1, p.numel())
    x = p.double().reshape(stack)
    m, v, seen = torch.zeros_like(x), torch.zeros_like(x), []
    adam, floor = options.get("adam", False), options.get("floor", 0.1)
    options = {"adapt_every": 10, **options}
    factors = Factors(shape, options, 5) if not is_dense(shape, options) else None
    for t, grad in enumerate(grads, start=1):
        g = grad.double().reshape(stack)
        if factors is not None:
            decay = math.prod(b2 for _ in range(factors.made, t))  # since the factors were made
            v = decay * factors.nonnegative(floor if adam else 0.0) + (1 - decay) * g * g
            if factors.due(t):
                factors.replace(v, t)
        else:
            v = b2 * v + (1 - b2) * g * g
        x = x - lr * weight_decay * x
        for e in range(stack[0]):
            if adam:
                m[e] = b1 * m[e] + (1 - b1) * g[e]
                top = m[e] / (1 - b1**t) if options.get("momentum", True) else g[e]
                x[e] -= lr * top / ((v[e] / (1 - b2**t)).sqrt() + eps)
                continue
            h = g[e] / (v[e].sqrt() + eps)
            rms = h.square().mean().sqrt()
            if options.get("clip", 1.0):
                h = h / max(1.0, (rms / options.get("clip", 1.0)).item())
            scale = 1.0
            if options.get("guidance") and m[e].norm() * h.norm() > 0:
                cosine = ((m[e] * h).sum() / (m[e].norm() * h.norm())).item()
                scale = min(1 / (1 - min(cosine, 1.0) + eps), options.get("guidance_max", 2.0))
            m[e] = b1 * m[e] + (1 - b1) * h if options.get("momentum", True) else h
            x[e] -= lr * scale * m[e]
        seen.append(x.reshape(shape).clone())
    return seen


def is_dense(shape: Sequence[int], options: dict[str, Any]) -> bool:
    store = options.get("store", "auto")
    if not compressible(shape) or store == "dense":
        return True
    _, rows, columns = matrices(shape)
    largest = largest_rank(options.get("rank"), min(rows, columns))
    pays = largest * (rows + columns) < rows * columns and min(rows, columns) >= 2 * options.get("rank_min", 1)
    return store == "auto" and not pays


def adapprox_bytes(shape: Sequence[int], options: dict[str, Any]) -> int:
    """The closed form: 4 M N [momentum] + 4 k (M + N), the step, and the rank where it adapts."""
    first = 4 * math.prod(shape) if options.get("momentum", True) else 0
    if is_dense(shape, options):
        return 4 + first + 4 * math.prod(shape)
    factors = Factors(shape, {"adapt_every": 10, **options}, 5)
    adaptive = 8 if factors.every and factors.first < factors.largest else 0
    return 4 + first + adaptive + 4 * factors.largest * factors.count * (factors.rows + factors.columns)


# ---------------------------------------------------------------- RMSprop and Adagrad


def estimator(shape: Sequence[int], options: dict[str, Any], decay: float, weight: float) -> Callable[..., Tensor]:
    """(g, step) -> the v of this step, as the store holds it."""
    store = options.get("store", "dense")
    if len(shape) < 2 or (store in ("factored", "lowrank") and not compressible(shape)):
        store = "dense"
    if store == "lowrank":
        factors = Factors(shape, {**options, "warm_start": True}, 2)

        def lowrank(g: Tensor, step: int) -> Tensor:
            g = g.reshape(matrices(shape))
            v = decay * factors.estimate.clamp(min=0) + weight * g * g
            factors.replace(v, step)
            return v.reshape(shape)

        return lowrank
    held: list[Tensor] = []

    def mean(g: Tensor, step: int) -> Tensor:
        squares = (g * g).mean(tuple(options.get("axes") or (1,)), keepdim=True)
        held[:] = [decay * held[0] + weight * squares if held else weight * squares]
        return held[0].expand(g.shape)

    def factored(g: Tensor, step: int) -> Tensor:
        squares = (g * g).reshape(matrices(shape))
        means = [squares.mean(2, keepdim=True), squares.mean(1, keepdim=True)]
        old = held or [torch.zeros_like(x) for x in means]
        held[:] = [decay * a + weight * b for a, b in zip(old, means, strict=True)]
        return (held[0] * held[1] / held[0].mean(1, keepdim=True)).nan_to_num(0).reshape(shape)

    def dense(g: Tensor, step: int) -> Tensor:
        held[:] = [decay * held[0] + weight * g * g if held else weight * g * g]
        return held[0]

    return {"mean": mean, "factored": factored, "dense": dense}[store]


def rmsprop(
    p: Tensor,
    grads: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    options: dict[str, Any],
) -> list[Tensor]:
    return _run(p, grads, lr, (betas[1], 1 - betas[1]), eps, weight_decay, options)


def adagrad(
    p: Tensor,
    grads: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    options: dict[str, Any],
) -> list[Tensor]:
    return _run(p, grads, lr, (1.0, 1.0), eps, weight_decay, options)


def _run(
    p: Tensor,
    grads: Sequence[Tensor],
    lr: float,
    mix: tuple[float, float],
    eps: float,
    weight_decay: float,
    options: dict[str, Any],
) -> list[Tensor]:
    x, b, seen = p.double().clone(), torch.zeros_like(p, dtype=torch.float64), []
    second = estimator(tuple(p.shape), options, *mix)
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        b = options.get("momentum", 0.0) * b + g / (second(g, t).sqrt() + eps)
        x = x - lr * weight_decay * x - lr * b
        seen.append(x.clone())
    return seen


def stored_bytes(shape: Sequence[int], options: dict[str, Any]) -> int:
    store = options.get("store", "dense")
    numel = math.prod(shape)
    buffer = 4 * numel if options.get("momentum") else 0
    if store == "mean":
        return buffer + 4 * math.prod(1 if a in (options.get("axes") or (1,)) else n for a, n in enumerate(shape))
    if store == "dense" or not compressible(shape):
        return buffer + 4 * numel
    count, rows, columns = matrices(shape)
    if store == "factored":
        return buffer + 4 * count * (rows + columns)
    return buffer + 4 + 4 * Factors(shape, options, 2).largest * count * (rows + columns)
