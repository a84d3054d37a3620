"""How far a compressed second moment would move AdamW's update, in Adam's own metric.

``abs_d1 = 1/2 sum (u_c - u)^2 sqrt(v_hat)`` with ``u = m_hat / (sqrt(v_hat) + eps)``: the loss a quadratic model with
curvature ``sqrt(v_hat)`` assigns to the difference of the updates, learning rate factored out, so that tensors can be
compared and added up. No shadow optimizer is needed: candidates hold the mean of g^2 over blocks, and the moving
average of a mean is the mean of the moving average, so averaging AdamW's dense v gives their v exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memadvise.ledger import FidelityValue
from memadvise.optim.registry import approximate_second_moment
from memadvise.plan.schema import Setting

Approximate = Callable[[Setting, Tensor], "Tensor | None"]
_CHUNK = 2**16  # elements in float64 at a time: half a MB, so that the few temporaries stay in the cache


def fidelity(
    m: Tensor,
    v: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
    settings: Sequence[Setting],
    *,
    approximate: Approximate = approximate_second_moment,
) -> list[FidelityValue]:
    """Compare the update AdamW makes with the one every candidate would make from the same ``m``.

    Args:
        m: ``exp_avg`` of one tensor, any shape.
        v: ``exp_avg_sq``, same shape; float32 (copy lower precision before).
        step: how many steps are in ``m`` and ``v``, from 1.
        betas: as the optimizer that filled them.
        eps: as the optimizer.
        settings: candidates; those that hold no second moment (Lion, SGD) are left out of the result, because
            being different from Adam says nothing about them.
        approximate: ``(setting, v) -> v`` as the method would hold it, expanded to v's shape.

    Memory: what ``approximate`` returns (expanded views for block means), and chunks of a few MB.
    """
    held = [(setting, candidate) for setting in settings if (candidate := approximate(setting, v)) is not None]
    bias1, bias2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    sums = torch.zeros(len(held), 3, dtype=torch.float64, device=v.device)
    norm = torch.zeros((), dtype=torch.float64, device=v.device)
    for start, stop in row_chunks(v, _CHUNK):

        def part(tensor: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return (tensor[start:stop] if tensor.ndim else tensor).to(torch.float64)

        m_hat, root = part(m) / bias1, (part(v) / bias2).sqrt()
        update = m_hat / (root + eps)
        norm += update.square().sum()
        for row, (_, candidate) in zip(sums, held, strict=True):
            compressed = m_hat / ((part(candidate) / bias2).sqrt() + eps)
            difference = compressed - update
            row[0] += (difference.square() * root).sum()
            row[1] += (update * compressed).sum()
            row[2] += compressed.square().sum()
    result = []
    for (setting, _), (error, dot, norm_compressed) in zip(held, sums.tolist(), strict=True):
        scale = math.sqrt(norm.item() * norm_compressed)
        # Equal updates are exactly equal, whatever the rounding of the three sums says.
        cosine = dot / scale if scale > 0 and error > 0 else 1.0
        result.append(FidelityValue(setting.key, error / 2, max(0.0, 1 - cosine)))
    return result


def row_chunks(tensor: Tensor, limit: int) -> list[tuple[int, int]]:
    """``(start, stop)`` ranges of the first axis that hold about ``limit`` elements each; one range for a scalar."""
    if tensor.ndim == 0 or tensor.numel() == 0:
        return [(0, 1)] if tensor.ndim == 0 else []
    rows = max(1, limit * tensor.shape[0] // tensor.numel())
    return [(start, min(start + rows, tensor.shape[0])) for start in range(0, tensor.shape[0], rows)]
