"""Golden checks of SlimAdam (arXiv 2503.01843): properties that follow from its definition, and its rules.

Not covered of B6: reading the public SNR files (they are not part of this repository), and so the SNR of each of the
74 matrices; the rules are tested on the means by role that are published, and on the rule set that the files give.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from memadvise.ledger import SnrValue
from memadvise.optim import AdamMini, AdamW, SlimAdam
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import approximate_second_moment, state_specs
from memadvise.plan.schema import Setting
from memadvise.probe.snr import SNR_CAP, rules_from_snr, snr


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


def test_b4_unit_values_of_the_snr() -> None:
    generator = torch.Generator().manual_seed(0)
    constant = torch.rand(5, 1, generator=generator).expand(5, 40)
    assert snr(constant, (1,)).snr == SNR_CAP
    assert snr(torch.tensor([0.0, 2.0]).repeat(3, 20), (1,)).snr == 1
    normal = torch.randn(64, 10_000, generator=generator)
    assert snr(normal.square(), (1,)).snr == pytest.approx(0.5, rel=0.02)
    v = torch.zeros(20_000)
    for _ in range(150):
        v.lerp_(torch.randn(v.shape, generator=generator).square(), 1 - 0.95)
    assert snr(v, (0,)).snr == pytest.approx(19.5, rel=0.03)
    v = torch.rand(64, dtype=torch.float64, generator=generator) ** 3
    lost = (v - v.mean()).square().sum() / v.square().sum()
    assert 1 / (1 + snr(v, (0,)).snr) == pytest.approx(lost.item(), rel=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize(("axes", "partition"), [((1,), "row"), ((0,), "column"), ((0, 1), "whole")])
def test_b5_the_same_partition_by_either_name_is_the_same_method(axes: tuple[int, ...], partition: str) -> None:
    grads = stream((24, 10), 30)
    slim, v = follow(SlimAdam, START, grads, axes=axes)
    mini, w = follow(AdamMini, START, grads, partition=partition)
    assert torch.equal(slim, mini)
    assert torch.equal(v, w)


# Means over layers of the trajectory mean of the SNR over (0,), (1,), (0, 1): GPT-2 small of the paper's experiments
SNR_BY_ROLE = {
    "lr 3e-4": {
        "wte": (0.0003, 5.13, 0.0002), "wpe": (1.88, 11.6, 1.33), "q_proj": (0.56, 3.18, 0.27),
        "k_proj": (0.49, 2.60, 0.26), "v_proj": (2.16, 0.73, 0.39), "output_proj": (9.21, 0.81, 0.63),
        "mlp_up": (3.07, 2.68, 1.31), "mlp_down": (7.70, 2.52, 1.75),
    },
    "lr 3e-3": {
        "wte": (0.0005, 0.85, 0.00003), "wpe": (1.46, 4.19, 0.57), "q_proj": (0.42, 0.61, 0.05),
        "k_proj": (0.28, 1.05, 0.05), "v_proj": (1.36, 0.21, 0.09), "output_proj": (4.80, 0.36, 0.23),
        "mlp_up": (1.09, 0.49, 0.19), "mlp_down": (3.88, 0.47, 0.26),
    },
}  # fmt: skip
STATIC = {
    "wte": (1,), "wpe": (1,), "q_proj": (1,), "k_proj": (1,),
    "v_proj": (0,), "output_proj": (0,), "mlp_up": (0,), "mlp_down": (0,),
}  # fmt: skip
SHAPES = {
    "wte": (50304, 768), "wpe": (1024, 768), "mlp_up": (3072, 768), "mlp_down": (768, 3072),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "output_proj"), (768, 768)),
}  # fmt: skip


def measured(table: tuple[float, float, float]) -> list[SnrValue]:
    return [SnrValue(axes, value, value, None) for axes, value in zip(((0,), (1,), (0, 1)), table, strict=True)]


def test_b6_rules_from_the_published_means() -> None:
    low = {role: rules_from_snr(measured(values)) for role, values in SNR_BY_ROLE["lr 3e-4"].items()}
    assert low == STATIC
    high = {role: rules_from_snr(measured(values)) for role, values in SNR_BY_ROLE["lr 3e-3"].items()}
    assert high == {**STATIC, "wte": None, "q_proj": None}  # at ten times the rate less can be averaged
    most = {
        role: rules_from_snr(measured(values), policy="max_compression", shape=SHAPES[role])
        for role, values in SNR_BY_ROLE["lr 3e-4"].items()
    }
    assert {role for role, axes in most.items() if axes == (0, 1)} == {"wpe", "mlp_up", "mlp_down"}
    assert rules_from_snr([SnrValue((0,), 5.69, 5.69, None)]) is None  # a norm: vectors stay dense


def test_b6_the_shipped_rules_save_what_is_published() -> None:
    """74 matrices: one rule a role, but for five tensors that the files decide otherwise; 25 norms in full."""
    rules: dict[tuple[int, str], tuple[int, ...] | None] = {(0, role): STATIC[role] for role in ("wte", "wpe")}
    rules.update({(layer, role): axes for layer in range(12) for role, axes in STATIC.items() if role[0] != "w"})
    assert len(rules) == 74
    norms = 25 * 768

    def kept() -> int:
        total = norms
        for (_, role), axes in rules.items():
            setting = Setting("slimadam", {"axes": list(axes)}) if axes else Setting("adamw")
            total += math.prod(state_specs(setting, SHAPES[role])["exp_avg_sq"].shape)
        return total

    dense = norms + sum(math.prod(SHAPES[role]) for _, role in rules)
    assert (dense, kept()) == (124_373_760, 153_472)
    rules[2, "q_proj"], rules[3, "q_proj"] = None, (0,)
    rules.update({(layer, "mlp_up"): (1,) for layer in (9, 10, 11)})
    assert kept() == 749_440
    assert 1 - kept() / dense == pytest.approx(0.99397, abs=1e-5)


def test_b7_permuting_columns_permutes_the_result_and_leaves_v() -> None:
    grads = stream((24, 10), 30)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    p, v = follow(SlimAdam, START, grads, axes=(1,))
    q, w = follow(SlimAdam, START[:, order], [g[:, order] for g in grads], axes=(1,))
    torch.testing.assert_close(p[:, order], q, rtol=0, atol=1e-14)
    torch.testing.assert_close(v, w, rtol=1e-14, atol=0)
