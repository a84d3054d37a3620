"""Uncompressed AdamW in float32 and float64: the very op ``torch.optim.AdamW(fused=True)`` calls, on lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memadvise.optim.executors.work import Work
from memadvise.optim.method import Hyper, device_type
from memadvise.optim.recipe import Recipe


def supports(recipe: Recipe, p: Tensor) -> bool:
    """Whether ``recipe`` on ``p`` is what the fused op computes.

    It wants moments in the parameter's dtype; ours are float32, so bfloat16 and float16 parameters are not for it.
    """
    if recipe.method.name != "adamw" or recipe.options.compat or not recipe.compose.plain:
        return False
    return p.dtype in (torch.float32, torch.float64) and device_type(p) in ("cpu", "cuda")


def aligned(work: Work) -> bool:
    """The op walks memory, not indices: all four tensors must be laid out alike, without gaps or overlaps."""
    p = work.p
    others = (work.g, work.state["exp_avg"], work.state["exp_avg_sq"])
    return (p.is_contiguous() or _is_dense(p)) and all(t.stride() == p.stride() for t in others)


def _is_dense(t: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def step(works: Sequence[Work], h: Hyper) -> None:
    """One step of all parameters, one call of the op for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Work]] = {}
    for work in works:
        groups.setdefault((work.p.device, work.p.dtype), []).append(work)
    for (device, _), members in groups.items():
        lr = (
            h.lr.to(device, torch.float32, non_blocking=True)
            if isinstance(h.lr, Tensor) and h.lr.device.type != "cpu"
            else h.lr
        )
        torch._fused_adamw_(
            [w.p for w in members],
            [w.g for w in members],
            [w.state["exp_avg"] for w in members],
            [w.state["exp_avg_sq"] for w in members],
            [],
            [w.state["step"] for w in members],
            lr=lr,  # type: ignore[arg-type]  # there is an overload with a tensor
            beta1=h.beta1,
            beta2=h.beta2,
            weight_decay=h.weight_decay,
            eps=h.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )
