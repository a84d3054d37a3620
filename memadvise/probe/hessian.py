"""Block structure of the Hessian of one parameter: the share of its off-diagonal energy inside a partition's blocks.

For a partition P of n entries in blocks b, with ``E = ||H||_F^2``, ``D = sum_i H_ii^2``, ``E_P = sum_b ||H_bb||_F^2``::

    rho   = E_P / E
    gamma = (E_P - D) / (E - D)                     share of the off-diagonal energy
    beta  = sum_b n_b (n_b - 1) / (n (n - 1))       what a random grouping of equal sizes would hold
    score = (gamma - beta) / (1 - beta)             1 block diagonal, 0 chance, below 0 worse

Two estimators, both unbiased in E, D and E_P, with jackknife error bars for the ratio:

* :func:`gradient_covariance`, the screen: ``E_P`` of the covariance of gradients of different samples, which
  resembles the Fisher (Gauss-Newton) part of the Hessian. One set of gradients serves all partitions.
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
from memadvise.probe.partitions import GRADIENT_COVARIANCE, HESSIAN_VECTOR_PRODUCTS, ROWS, Partition

MIN_SAMPLES = 6  # the statistic takes four different samples, its error bar one more; fewer are all noise
_GRAM_BYTES = 2**24  # block-wise Gram matrices held at once
_COORDINATES = 2**12  # entries of all samples at a time, so that they stay in the cache


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

    ``E_P = sum_b ||C_bb||_F^2`` for the covariance C of the gradients, without bias from the number of samples: the
    U-statistic over four different samples (Chen, Zhang & Zhong 2010, JASA 105), computed from block-wise Gram
    matrices. The covariance and not the second moment: the mean gradient is one direction across all blocks, hides
    the structure the more the larger the batch, and is no part of the curvature. With it removed, single samples and
    whole batches give the same scores. Far from convergence the covariance still reads lower than the Hessian.

    Args:
        gradients: ``[samples, rows, columns]``, float32 or float64, at least :data:`MIN_SAMPLES`; overwritten.
        partitions: their labels match rows or columns.

    Memory: three temporaries of the size of ``gradients``, and about 64 MB of block-wise Gram matrices.

    Returns:
        One value per partition; empty if the gradients carry no off-diagonal energy (all equal, or too few).
    """
    count = gradients.shape[0]
    size = gradients.abs().max().item() if gradients.numel() else 0.0
    if count < MIN_SAMPLES or not math.isfinite(size) or size == 0:
        return ()
    # One common factor and one common offset change nothing, but fourth powers leave float32's range, and differences
    # of large sums its precision.
    gradients.div_(size).sub_(gradients.mean(0))
    spread = gradients.square().mean().sqrt().item()
    if spread <= 1e-7:
        return ()
    gradients.div_(spread)
    energies, total = _block_energies(gradients, partitions)
    diagonal = _coordinates(gradients.flatten(1)).estimates()
    values = []
    for partition, blocks in zip(partitions, energies, strict=True):
        whole, *left_out = zip(total.tolist(), diagonal.tolist(), blocks.tolist(), strict=True)
        chance = partition.chance(gradients.shape[2 - partition.axis])
        columns = list(zip(*left_out, strict=True))
        values.append(_value(partition.name, whole, columns, chance, GRADIENT_COVARIANCE, count))
    return tuple(value for value in values if value is not None)


@dataclass
class _Sums:
    """What the U-statistic needs of the blocks' Gram matrices A (diagonal set to 0), summed over blocks, float64.

    With ``r_k = sum_j A_jk`` and ``t = sum_k r_k``: ``square[k] = sum_j A_jk^2``, ``row_square[k] = r_k^2``,
    ``row_times[k] = sum_j r_j A_jk``, ``row_total[k] = r_k t`` and ``total_square = t^2``.
    """

    square: Tensor
    row_square: Tensor
    row_times: Tensor
    row_total: Tensor
    total_square: Tensor

    @classmethod
    def zeros(cls, count: int, like: Tensor) -> _Sums:
        a, b, c, d = torch.zeros(4, count, dtype=torch.float64, device=like.device)
        return cls(a, b, c, d, torch.zeros((), dtype=torch.float64, device=like.device))

    def add(self, gram: Tensor) -> None:
        """Count the blocks of ``gram``: ``[blocks, samples, samples]`` float64, diagonals 0."""
        rows = gram.sum(1)
        total = rows.sum(1)
        self.square += torch.einsum("bij,bij->i", gram, gram)
        self.row_square += rows.square().sum(0)
        self.row_times += torch.einsum("bij,bj->i", gram, rows)
        self.row_total += total @ rows
        self.total_square += total.square().sum()

    def estimates(self) -> Tensor:
        """Unbiased ``sum_b ||C_bb||^2``: from all samples, then leaving out each one in turn; ``[1 + samples]``."""
        count = len(self.square)
        a = self.square.sum()
        whole = _u_statistic(a, self.row_square.sum(), self.total_square, count)
        without = _u_statistic(
            a - 2 * self.square,
            self.row_square.sum() - self.row_square - 2 * self.row_times + self.square,
            self.total_square - 4 * self.row_total + 4 * self.row_square,
            count - 1,
        )
        return torch.cat([whole.reshape(1), without])


def _u_statistic(squares: Tensor, row_squares: Tensor, total_square: Tensor, n: int) -> Tensor:
    """Mean of ``A_ij^2 - 2 A_ij A_jk + A_ij A_kl`` over different i, j, k, l."""
    three = row_squares - squares
    four = total_square - 4 * three - 2 * squares
    pairs = n * (n - 1)
    return squares / pairs - 2 * three / (pairs * (n - 2)) + four / (pairs * (n - 2) * (n - 3))


def _coordinates(flat: Tensor) -> _Sums:
    """The sums for blocks of one entry, whose Gram matrices ``x_i x_j`` are never formed; flat: ``[samples, n]``."""
    sums = _Sums.zeros(len(flat), flat)
    for x in flat.split(_COORDINATES, dim=1):
        squares = x.square()
        products = squares @ squares.T
        rows = x * (x.sum(0) - x)
        total, weighted = rows.sum(0), (rows * x).sum(0)
        sums.square += products.sum(1) - products.diag()
        sums.row_square += rows.square().sum(1)
        sums.row_times += x @ weighted - (rows * squares).sum(1)
        sums.row_total += rows @ total
        sums.total_square += total.square().sum()
    return sums


def _block_energies(gradients: Tensor, partitions: Sequence[Partition]) -> tuple[list[Tensor], Tensor]:
    """:meth:`_Sums.estimates` per partition, and for the whole tensor as one block."""
    count = gradients.shape[0]
    sums = [_Sums.zeros(count, gradients) for _ in partitions]
    whole = torch.zeros(count, count, dtype=torch.float64, device=gradients.device)
    axes = {partition.axis for partition in partitions} or {ROWS}
    for axis in axes:
        mine = [i for i, partition in enumerate(partitions) if partition.axis == axis]
        # Blocks of several lines add up their lines' Gram matrices first; blocks of one line need no memory.
        groups = {i: _groups(partitions[i].labels.to(gradients.device)) for i in mine}
        merged = {i: whole.new_zeros(groups[i][1], count, count) for i in mine}
        added = torch.zeros_like(whole)
        lines = gradients.shape[1 + axis]
        step = max(1, _GRAM_BYTES // (8 * count * count))
        for start in range(0, lines, step):
            part = gradients.narrow(1 + axis, start, min(step, lines - start)).movedim(1 + axis, 0).contiguous()
            gram = torch.bmm(part, part.transpose(1, 2)).double()
            gram.diagonal(dim1=1, dim2=2).zero_()
            added += gram.sum(0)
            for i in mine:
                numbers = groups[i][0][start : start + step]
                alone = numbers < 0
                if bool(alone.all()):
                    sums[i].add(gram)
                    continue
                sums[i].add(gram[alone])
                merged[i].index_add_(0, numbers[~alone], gram[~alone])
        for i in mine:
            sums[i].add(merged[i])
        whole = added
    total = _Sums.zeros(count, gradients)
    total.add(whole.unsqueeze(0))
    return [s.estimates() for s in sums], total.estimates()


def _groups(labels: Tensor) -> tuple[Tensor, int]:
    """Per line the number of its block among blocks of several lines, or -1 if it is a block of its own."""
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    many = counts > 1
    numbers = torch.where(many, many.cumsum(0) - 1, torch.full_like(counts, -1))
    return numbers[inverse], int(many.sum())


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
        num_probes: pairs; at least 4 for an error bar worth the name.
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
