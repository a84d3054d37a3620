"""Golden checks of Adafactor (arXiv 1804.04235): algorithms_b 4.2, and how torch's and the other conventions relate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_golden_slimadam import stream
from torch import Tensor, nn

from memadvise.errors import OptimizerError
from memadvise.optim import Adafactor
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import approximate_second_moment, state_bytes, state_specs, validate
from memadvise.plan.schema import Setting

START = torch.linspace(-1, 1, 24 * 10, dtype=torch.float64).reshape(24, 10)


def adafactor(**options: Any) -> Setting:
    return Setting("adafactor", options)


def follow(
    setting: Setting,
    p: Tensor,
    grads: list[Tensor],
    *,
    lr: float = 1e-2,
    decay: float = 0.0,
    executor: str | None = None,
) -> list[Tensor]:
    """The parameter after each step; ``setting`` is meant, also for a vector."""
    p = nn.Parameter(p.clone())
    optimizer = MemadviseOptimizer([("p", p)], {"p": setting}, lr=lr, weight_decay=decay, executor=executor)
    seen = []
    for g in grads:
        p.grad = g.to(p.dtype)
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def test_4_2_an_outer_product_is_held_exactly_and_the_first_update_is_its_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.outer(*(torch.randn(n, generator=generator, dtype=torch.float64) for n in (24, 10)))
    held = approximate_second_moment(adafactor(), g * g)
    torch.testing.assert_close(held, g * g, rtol=1e-13, atol=0)
    (p,) = follow(adafactor(), START, [g])
    torch.testing.assert_close(p, START - 1e-2 * g.sign(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("step_size", ["lr", "relative", "scaled"])
def test_4_2_no_update_is_larger_than_clip_times_alpha(step_size: str, momentum: float) -> None:
    grads = stream((24, 10), 40)
    for number in (7, 20, 21):
        grads[number] = grads[number] * 1000  # outliers
    clip, lr, before = 0.5, 3e-2, START
    for t, p in enumerate(follow(adafactor(step_size=step_size, clip=clip, momentum=momentum), START, grads, lr=lr), 1):
        size = 1.0 if step_size == "lr" else max(1e-3, rms(before))
        alpha = size * (min(lr, 1 / math.sqrt(t)) if step_size == "relative" else lr)
        assert rms(p - before) <= clip * alpha * (1 + 1e-9)
        before = p


@pytest.mark.parametrize("step_size", ["lr", "relative", "scaled"])
def test_4_2_scaling_the_gradient_changes_nothing(step_size: str) -> None:
    grads = stream((24, 10), 20)
    for factor in (1e-6, 1e6):
        plain = follow(adafactor(step_size=step_size), START, grads)
        scaled = follow(adafactor(step_size=step_size), START, [g * factor for g in grads])
        torch.testing.assert_close(plain[-1], scaled[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_4_2_the_transposed_gradient_gives_the_transposed_update(momentum: float) -> None:
    grads = stream((24, 10), 20)
    plain = follow(adafactor(momentum=momentum), START, grads)
    turned = follow(adafactor(momentum=momentum), START.t().contiguous(), [g.t().contiguous() for g in grads])
    torch.testing.assert_close(plain[-1], turned[-1].t(), rtol=0, atol=1e-13)


def test_4_2_no_state_of_the_parameters_size_without_momentum() -> None:
    for shape, count in (((300, 200), 500), ((8, 4, 3, 3), 8 + 36), ((5, 30, 20), 5 * 50)):
        specs = state_specs(adafactor(), shape)
        assert not any(spec.elementwise for spec in specs.values())
        assert max(math.prod(spec.shape) for spec in specs.values()) < math.prod(shape)
        assert state_bytes(adafactor(), shape) == 4 + 4 * count
        assert state_bytes(adafactor(momentum=0.9), shape) == 4 + 4 * count + 4 * math.prod(shape)
    assert state_bytes(adafactor(), (7,)) == 4 + 4 * 7


# ---------------------------------------------------------------- the three conventions


def test_the_paper_takes_relative_steps() -> None:
    """alpha = max(eps2, RMS(p)) min(1e-2, 1/sqrt(t)): the size of steps that all have RMS 1 before it."""
    g = torch.ones(24, 10, dtype=torch.float64)
    p = follow(adafactor(step_size="relative"), START, [g])
    torch.testing.assert_close(p[0], START - 1e-2 * rms(START), rtol=1e-12, atol=0)
    late = follow(adafactor(step_size="relative"), START, [g] * 30, lr=0.25)
    before = late[24]
    torch.testing.assert_close(late[25], before - rms(before) / math.sqrt(26), rtol=1e-12, atol=0)
    zero = follow(adafactor(step_size="relative"), torch.zeros(24, 10, dtype=torch.float64), [g])
    torch.testing.assert_close(zero[0], torch.full((24, 10), -1e-2 * 1e-3, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(24, 10), (7,), (1, 5), (3, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_relative_steps_are_torchs_where_its_eps_is_the_papers(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    start, grads = torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(dtype), stream(shape, 60)
    for lr in (1e-2, 0.5):
        p = nn.Parameter(start.clone())
        theirs = torch.optim.Adafactor([p], lr=lr, weight_decay=0.1, eps=(1e-30, 1e-3), foreach=False)
        for g in grads:
            p.grad = g.to(dtype)
            theirs.step()
        ours = follow(adafactor(step_size="relative"), start, grads, lr=lr, decay=0.1)[-1]
        torch.testing.assert_close(ours, p.detach(), rtol=tolerance, atol=tolerance)


def test_torchs_own_eps_decides_the_steps_of_small_gradients() -> None:
    """The differences that the module's documentation names, at the sizes it names."""
    found = {}
    for size in (1e-2, 1e-4, 1e-8):
        grads = [g * size for g in stream((24, 10), 5)]
        p = nn.Parameter(START.float())
        theirs = torch.optim.Adafactor([p], lr=1e-2, foreach=False)
        for g in grads:
            p.grad = g.float()
            theirs.step()
        ours = follow(adafactor(step_size="relative"), START.float(), grads)[-1]
        found[size] = (ours - p.detach()).abs().max().item(), rms(p.detach() - START) / rms(ours - START)
    assert found[1e-2] == pytest.approx((0, 1), abs=1e-5)
    assert found[1e-4][0] > 1e-4
    assert found[1e-8][1] < 0.1


def test_a_convolution_is_one_matrix_and_not_a_stack_of_windows_as_in_torch() -> None:
    start, grads = START.reshape(4, 5, 3, 4), [g.reshape(4, 5, 3, 4) for g in stream((24, 10), 10)]
    ours = follow(adafactor(), start, grads)[-1]
    matrix = follow(adafactor(), start.reshape(4, 60), [g.reshape(4, 60) for g in grads])[-1]
    assert torch.equal(ours, matrix.reshape(4, 5, 3, 4))


def test_the_matrices_of_a_stack_do_not_know_of_each_other() -> None:
    start, grads = START.reshape(3, 8, 10), [g.reshape(3, 8, 10) for g in stream((24, 10), 20)]
    for g in grads:
        g[1] *= 100
    for setting in (adafactor(), adafactor(step_size="relative", momentum=0.9)):
        stack = follow(setting, start, grads, decay=0.1)[-1]
        for i in range(3):
            alone = follow(setting, start[i], [g[i] for g in grads], decay=0.1)[-1]
            torch.testing.assert_close(stack[i], alone, rtol=0, atol=1e-14)


def test_a_row_of_zeros_beside_huge_gradients_is_finite() -> None:
    g = torch.full((6, 4), 1e15)
    g[2] = 0
    for executor in ("eager", "chunked"):
        p = follow(adafactor(), torch.ones(6, 4), [g] * 3 + [torch.zeros(6, 4)], executor=executor)[-1]
        assert torch.isfinite(p).all()
        assert torch.equal(p[2], torch.ones(4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step_size": "absolute"}, "step_size 'absolute' is none of lr, relative, scaled"),
        ({"momentum": 1.0}, r"momentum should be a number in \[0, 1\)"),
        ({"clip": 0}, "clip should be a number above 0"),
        ({"eps1": 0}, "eps1 should be a number above 0"),
        ({"eps2": float("nan")}, "eps2 should be"),
        ({"eps2": 1e-2}, "eps2 would do nothing: with step_size lr"),
        ({"beta2_decay": 0.8}, "beta2_decay should be"),
        ({"cautious": True}, "cautious would do nothing"),
        ({"first_moment": "bf16"}, "keeps no first moment"),
        ({"momentum": 0.9, "second_moment": "bf16"}, "keeps no second moment"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptimizerError, match=words):
        validate(adafactor(**options), (4, 4), name="p")


def test_vectors_and_scalars_keep_v_in_full_and_no_more() -> None:
    ps = [nn.Parameter(torch.ones(7)), nn.Parameter(torch.tensor(1.0))]
    assert [(m.setting, m.state_bytes) for m in Adafactor(ps).memory()] == [
        ("adafactor(step_size=lr)", n) for n in (32, 8)
    ]
