"""Block structure of the Hessian of one parameter: the share of its off-diagonal energy inside a partition's blocks.

For a partition P of n entries in blocks b, with ``E = ||H||_F^2``, ``D = sum_i H_ii^2``, ``E_P = sum_b ||H_bb||_F^2``::

    rho   = E_P / E
    gamma = (E_P - D) / (E - D)                     share of the off-diagonal energy
    beta  = sum_b n_b (n_b - 1) / (n (n - 1))       what a random grouping of equal sizes would hold
    score = (gamma - beta) / (1 - beta)             1 block diagonal, 0 chance, below 0 worse

Two estimators, both unbiased in E, D and E_P, with jackknife error bars for the ratio:

* :func:`gradient_covariance`, the screen: a U-statistic over gradients of different samples,
  ``E_P = mean over i != j of sum_b <g_ib, g_jb>^2``. It sees the Fisher (Gauss-Newton) part of the Hessian.
* :func:`sign_pairs`, the confirmation: random signs z and, independent per block, sigma;
  ``E_P = E[ sum_b sigma_b <(Hz)_b, (H(sigma z))_b> ]``, since the expectation over sigma leaves ``<(Hz)_b, H_bb z_b>``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memadvise.ledger import HessianValue
from memadvise.probe.partitions import COLUMNS, GRADIENT_COVARIANCE, HESSIAN_VECTOR_PRODUCTS, ROWS, Partition

MIN_SAMPLES = 4  # fewer different gradients have no usable error bar
_GRAM_BYTES = 2**24  # block-wise Gram matrices held at once


@dataclass(frozen=True)
class Energies:
    """Squared Frobenius norms of the whole Hessian, its diagonal and its blocks (up to one common factor)."""

    total: float
    diagonal: float
    blocks: float

    @property
    def rho(self) -> float:
        """Share of all energy inside the blocks, diagonal included."""
        return self.blocks / self.total

    @property
    def gamma(self) -> float:
        """Share of the off-diagonal energy inside the blocks."""
        return (self.blocks - self.diagonal) / (self.total - self.diagonal)

    def score(self, chance: float) -> float:
        """``gamma`` on a scale where ``chance`` is 0 and block diagonal is 1."""
        return (self.gamma - chance) / (1 - chance)


# ---------------------------------------------------------------- estimator: gradient covariance


def gradient_covariance(gradients: Tensor, partitions: Sequence[Partition]) -> tuple[HessianValue, ...]:
    """Scores of several partitions from gradients of different samples.

    Args:
        gradients: ``[samples, rows, columns]``, float32 or float64, at least :data:`MIN_SAMPLES`; scaled in place.
        partitions: their labels match rows or columns.

    Memory: one temporary of the size of ``gradients``, and 16 MB of block-wise Gram matrices.

    Returns:
        One value per partition; empty if the gradients carry no off-diagonal energy (all zero, or too few).
    """
    if gradients.shape[0] < MIN_SAMPLES:
        return ()
    size = gradients.abs().max().item()
    if not math.isfinite(size) or size == 0:
        return ()
    # Fourth powers of gradients leave float32's range; one common factor changes no score.
    gradients.div_(gradients.square().mean().sqrt().clamp_min(size * 1e-6))
    energies, whole = _block_energies(gradients, partitions)
    squares = gradients.square().flatten(1)
    diagonal = (squares @ squares.T).double()
    total = whole.square()
    return tuple(
        value
        for partition, blocks in zip(partitions, energies, strict=True)
        if (value := _from_pairs(partition, gradients.shape, total, diagonal, blocks)) is not None
    )


def _block_energies(gradients: Tensor, partitions: Sequence[Partition]) -> tuple[list[Tensor], Tensor]:
    """Per partition ``sum_b <g_ib, g_jb>^2`` and the plain ``<g_i, g_j>``; all ``[samples, samples]`` float64."""
    count = gradients.shape[0]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=gradients.device)

    results = [zeros(count, count) for _ in partitions]
    whole: Tensor | None = None
    for axis in (ROWS, COLUMNS):
        mine = [i for i, partition in enumerate(partitions) if partition.axis == axis]
        if not mine and (axis == COLUMNS or any(p.axis == COLUMNS for p in partitions)):
            continue
        # Blocks of several lines add up their lines' Gram matrices before squaring; blocks of one line need no memory.
        groups = {i: _groups(partitions[i].labels.to(gradients.device)) for i in mine}
        sums = {i: zeros(groups[i][1], count, count) for i in mine}
        added = zeros(count, count)
        lines = gradients.shape[1 + axis]
        step = max(1, _GRAM_BYTES // (8 * count * count))
        for start in range(0, lines, step):
            part = gradients.narrow(1 + axis, start, min(step, lines - start)).movedim(1 + axis, 0)
            gram = torch.bmm(part, part.transpose(1, 2)).double()
            added += gram.sum(0)
            for i in mine:
                numbers = groups[i][0][start : start + step]
                alone = numbers < 0
                if bool(alone.all()):
                    results[i] += gram.square().sum(0)
                    continue
                results[i] += gram[alone].square().sum(0)
                sums[i].index_add_(0, numbers[~alone], gram[~alone])
        for i in mine:
            results[i] += sums[i].square().sum(0)
        whole = added if whole is None else whole
    assert whole is not None
    return results, whole


def _groups(labels: Tensor) -> tuple[Tensor, int]:
    """Per line the number of its block among blocks of several lines, or -1 if it is a block of its own."""
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    many = counts > 1
    numbers = torch.where(many, many.cumsum(0) - 1, torch.full_like(counts, -1))
    return numbers[inverse], int(many.sum())


def _from_pairs(
    partition: Partition, shape: Sequence[int], total: Tensor, diagonal: Tensor, blocks: Tensor
) -> HessianValue | None:
    """Means over pairs i != j; leaving sample k out drops row and column k of the pair matrices."""
    count = shape[0]
    sums, left_out = [], []
    for pairs in (total, diagonal, blocks):
        pairs = pairs - pairs.diag().diag()
        per_sample = pairs.sum(1)
        sums.append(per_sample.sum().item())
        left_out.append((per_sample.sum() - 2 * per_sample).tolist())
    chance = partition.chance(shape[2 - partition.axis])
    return _value(partition.name, sums, left_out, chance, GRADIENT_COVARIANCE, count)


def _value(
    name: str, sums: Sequence[float], left_out: Sequence[Sequence[float]], chance: float, estimator: str, count: int
) -> HessianValue | None:
    """Ratio of means with its jackknife error; None where the off-diagonal energy drowns in noise."""
    samples = [Energies(*values) for values in zip(*left_out, strict=True)]
    whole = Energies(*sums)
    if chance >= 1 or any(not e.total - e.diagonal > 1e-12 * abs(e.total) for e in (whole, *samples)):
        return None
    score = whole.score(chance)
    scores = [sample.score(chance) for sample in samples]
    mean = math.fsum(scores) / count
    stderr = math.sqrt((count - 1) / count * math.fsum((s - mean) ** 2 for s in scores))
    return HessianValue(name, score, stderr, chance, estimator, count) if math.isfinite(score + stderr) else None


# ---------------------------------------------------------------- estimator: Hessian-vector products


def sign_pairs(
    hvp: Callable[[Tensor], Tensor], like: Tensor, partitions: Sequence[Partition], *, num_probes: int, seed: int = 0
) -> tuple[HessianValue, ...]:
    """Scores from random-sign pairs: ``num_probes * (2 + len(partitions))`` Hessian-vector products.

    Args:
        hvp: ``[rows, columns] -> [rows, columns]``, the product with the Hessian.
        like: any ``[rows, columns]`` tensor of the wanted dtype and device.
        partitions: candidates.
        num_probes: pairs; at least :data:`MIN_SAMPLES` for an error bar.
        seed: of the signs.
    """
    total, diagonal, blocks = sign_pair_energies(hvp, like, partitions, num_probes=num_probes, seed=seed)
    values = []
    for partition, inside in zip(partitions, blocks, strict=True):
        columns = (total, diagonal, inside)
        sums = [math.fsum(column) for column in columns]
        left_out = [[whole - value for value in column] for whole, column in zip(sums, columns, strict=True)]
        chance = partition.chance(like.shape[1 - partition.axis])
        values.append(_value(partition.name, sums, left_out, chance, HESSIAN_VECTOR_PRODUCTS, num_probes))
    return tuple(value for value in values if value is not None)


def sign_pair_energies(
    hvp: Callable[[Tensor], Tensor], like: Tensor, partitions: Sequence[Partition], *, num_probes: int, seed: int = 0
) -> tuple[list[float], list[float], list[list[float]]]:
    """Per probe the estimates of E, of D, and of E_P for every partition; arguments as :func:`sign_pairs`."""
    generator = torch.Generator().manual_seed(seed)

    def signs(*size: int) -> Tensor:
        return (torch.randint(0, 2, size, generator=generator) * 2 - 1).to(like)

    numbered = [Partition(p.name, p.axis, p.labels.unique(return_inverse=True)[1].to(like.device)) for p in partitions]
    total, diagonal = [], []
    blocks: list[list[float]] = [[] for _ in partitions]
    for _ in range(num_probes):
        z = signs(*like.shape)
        y = hvp(z)
        total.append(_dot(y, y))
        sigma = signs(*like.shape)
        diagonal.append(_dot(sigma * y, hvp(sigma * z)))
        for inside, partition in zip(blocks, numbered, strict=True):
            sigma = partition.expand(signs(partition.num_blocks))
            inside.append(_dot(sigma * y, hvp(sigma * z)))
    return total, diagonal, blocks


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a.flatten().double(), b.flatten().double()).item()
