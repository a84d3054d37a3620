"""Golden checks of SlimAdam (arXiv 2503.01843): properties that follow from its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memadvise.optim import AdamMini, AdamW, SlimAdam
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import approximate_second_moment
from memadvise.plan.schema import Setting


def stream(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    """Gaussian gradients with row scales, so that rows, columns and elements differ."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[:1], generator=generator, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1)) + 0.1
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(steps)]


def follow(make: type[MemadviseOptimizer], p: Tensor, grads: list[Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """The parameter and exp_avg_sq after all steps."""
    p = nn.Parameter(p.clone())
    optimizer = make([p], lr=1e-3, weight_decay=0.1, **options)
    for g in grads:
        p.grad = g.to(p.dtype)
        optimizer.step()
    return p.detach(), optimizer.state[p]["exp_avg_sq"]


START = torch.linspace(-1, 1, 24 * 10, dtype=torch.float64).reshape(24, 10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str)
@pytest.mark.parametrize("executor", ["eager", "chunked", "fused"])
def test_b1_no_axes_is_torchs_adamw(dtype: torch.dtype, tolerance: float, executor: str) -> None:
    grads = stream((24, 10), 200)
    ours, _ = follow(AdamW, START.to(dtype), grads, executor=executor)
    p = nn.Parameter(START.to(dtype).clone())
    theirs = torch.optim.AdamW([p], lr=1e-3, weight_decay=0.1, foreach=False)
    for g in grads:
        p.grad = g.to(dtype)
        theirs.step()
    assert (ours - p.detach()).abs().max() < tolerance


def test_b2_constant_magnitude_over_all_axes_is_adamw() -> None:
    generator = torch.Generator().manual_seed(1)
    signs = [torch.randint(0, 2, (24, 10), generator=generator) * 2.0 - 1 for _ in range(20)]
    grads = [sign * (number + 1) for number, sign in enumerate(signs)]
    slim, v = follow(SlimAdam, START, grads, axes=(0, 1))
    dense, _ = follow(AdamW, START, grads)
    assert v.shape == (1, 1)
    torch.testing.assert_close(slim, dense, rtol=0, atol=1e-13)


@pytest.mark.parametrize("axes", [(1,), (0,)])
def test_b3_gradients_constant_along_the_axes_give_adamws_trajectory(axes: tuple[int, ...]) -> None:
    grads = [g.mean(axes, keepdim=True).expand(24, 10).contiguous() for g in stream((24, 10), 50)]
    slim, _ = follow(SlimAdam, START, grads, axes=axes)
    dense, _ = follow(AdamW, START, grads)
    torch.testing.assert_close(slim, dense, rtol=0, atol=1e-12)
    other, _ = follow(SlimAdam, START, grads, axes=(1 - axes[0],))
    assert (other - dense).abs().max() > 1e-3  # the wrong axis is seen


def test_b4_the_mean_of_v_is_what_the_method_holds() -> None:
    v = torch.rand(6, 4, 3, 3, dtype=torch.float64)
    for axes in ((0,), (1,), (2, 3), (1, 2, 3), (0, 1, 2, 3)):
        held = approximate_second_moment(Setting("slimadam", {"axes": list(axes)}), v)
        assert held is not None
        torch.testing.assert_close(held, v.mean(axes, keepdim=True).expand_as(v))
    assert approximate_second_moment(Setting("adamw"), v) is v
    assert approximate_second_moment(Setting("lion"), v) is None
    assert approximate_second_moment(Setting("sgd"), v) is None
    # 1/(1+SNR) of a slice is the share of its squared norm that the mean loses
    row = torch.tensor([[0.0, 2.0, 0.0, 2.0]], dtype=torch.float64)
    held = approximate_second_moment(Setting("slimadam", {"axes": [1]}), row)
    snr = row.mean() ** 2 / row.var(unbiased=False)
    assert snr == 1
    assert (row - held).square().sum() / row.square().sum() == 1 / (1 + snr)


@pytest.mark.parametrize(("axes", "partition"), [((1,), "row"), ((0,), "column"), ((0, 1), "whole")])
def test_b5_the_same_partition_by_either_name_is_the_same_method(axes: tuple[int, ...], partition: str) -> None:
    grads = stream((24, 10), 30)
    slim, v = follow(SlimAdam, START, grads, axes=axes)
    mini, w = follow(AdamMini, START, grads, partition=partition)
    assert torch.equal(slim, mini)
    assert torch.equal(v, w)


def test_b7_permuting_columns_permutes_the_result_and_leaves_v() -> None:
    grads = stream((24, 10), 30)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    p, v = follow(SlimAdam, START, grads, axes=(1,))
    q, w = follow(SlimAdam, START[:, order], [g[:, order] for g in grads], axes=(1,))
    torch.testing.assert_close(p[:, order], q, rtol=0, atol=1e-14)
    torch.testing.assert_close(v, w, rtol=1e-14, atol=0)
