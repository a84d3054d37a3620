"""RMSprop and Adagrad: torch's with a dense store, and what the mean, factored and low-rank stores promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import lowrank
from torch import Tensor, nn

from memadvise.errors import OptimizerError
from memadvise.optim import Adagrad, RMSprop
from memadvise.optim.registry import approximate_second_moment, state_bytes, validate
from memadvise.plan.schema import Setting

START = torch.randn(24, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.1
MAKERS = {"rmsprop": RMSprop, "adagrad": Adagrad}


def stream(steps: int, seed: int = 0) -> list[Tensor]:
    """Gaussian gradients with row and column scales."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = (torch.rand(shape, generator=g, dtype=torch.float64) + 0.1 for shape in ((24, 1), (1, 16)))
    return [torch.randn(24, 16, generator=g, dtype=torch.float64) * rows * columns for _ in range(steps)]


def follow(make: Callable[..., Any], p: Tensor, grads: list[Tensor], **options: Any) -> list[Tensor]:
    p = nn.Parameter(p.clone())
    optimizer = make([("p", p)] if make in MAKERS.values() else [p], lr=1e-2, **options)
    seen = []
    for g in grads:
        p.grad = g.to(p.dtype)
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


@pytest.mark.parametrize("executor", ["eager", "chunked"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_with_a_dense_store_is_torchs(executor: str, momentum: float) -> None:
    ours = follow(RMSprop, START, stream(100), betas=(0.9, 0.95), momentum=momentum, executor=executor)
    theirs = follow(torch.optim.RMSprop, START, stream(100), alpha=0.95, momentum=momentum, foreach=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    default, torchs = follow(RMSprop, START, stream(20)), follow(torch.optim.RMSprop, START, stream(20))
    torch.testing.assert_close(default, torchs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("executor", ["eager", "chunked"])
def test_adagrad_with_a_dense_store_is_torchs(executor: str) -> None:
    ours = follow(Adagrad, START, stream(100), executor=executor)
    theirs = follow(torch.optim.Adagrad, START, stream(100), foreach=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_the_defaults_are_torchs() -> None:
    for make, torchs in ((RMSprop, torch.optim.RMSprop), (Adagrad, torch.optim.Adagrad)):
        ours, theirs = make([nn.Parameter(START)]).defaults, torchs([nn.Parameter(START)]).defaults
        assert (ours["lr"], ours["eps"], ours["weight_decay"]) == (theirs["lr"], theirs["eps"], theirs["weight_decay"])
        assert ours["betas"][1] == theirs.get("alpha", 0.999)


# ---------------------------------------------------------------- the stores


@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"store": "lowrank", "rank": "full"}, lambda g: g),  # nothing is lost at full rank
        ({"store": "mean", "axes": (1,)}, lambda g: g.sign() * g[:, :1].abs()),  # what is averaged is alike
        ({"store": "mean", "axes": (0,)}, lambda g: g.sign() * g[:1].abs()),
        ({"store": "factored"}, lambda g: g.sign() * START.abs()[:, :1] * START.abs()[:1]),  # rank 1
        ({"store": "lowrank", "rank": 1}, lambda g: g.sign() * START.abs()[:, :1] * START.abs()[:1]),
    ],
    ids=["lowrank-full", "mean-1", "mean-0", "factored", "lowrank-1"],
)
def test_a_store_is_dense_where_it_can_hold_v(
    method: str, options: dict[str, Any], pattern: Callable[[Tensor], Tensor]
) -> None:
    grads = [pattern(g) for g in stream(60)]
    kept, dense = (follow(MAKERS[method], START, grads, **chosen) for chosen in (options, {}))
    torch.testing.assert_close(kept, dense, rtol=0, atol=1e-9)
    if pattern(START) is not START:
        other = follow(MAKERS[method], START, stream(60), **options)
        assert (other[-1] - follow(MAKERS[method], START, stream(60))[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize("store", ["dense", "mean", "factored", "lowrank"])
def test_twenty_steps_in_float32_are_those_of_the_slow_dense_reference(method: str, store: str) -> None:
    options = {"store": store, **({"rank": 4} if store == "lowrank" else {})}
    betas, eps = ((0.9, 0.99), 1e-8) if method == "rmsprop" else ((0.9, 0.999), 1e-10)
    reference = {"rmsprop": lowrank.rmsprop, "adagrad": lowrank.adagrad}[method]
    errors = []
    for seed in (4, 5, 6):  # now and then a float32 sum is unlucky with what cancels in it: 1.1e-6 was seen
        grads = [g.float() for g in stream(20, seed=seed)]
        ours = follow(MAKERS[method], START.float(), grads, weight_decay=0.1, **options)[-1]
        expected = reference(START.float(), grads, 1e-2, betas, eps, 0.1, options)[-1]
        errors.append(((ours - expected).norm() / expected.norm()).item())
    assert sorted(errors)[1] < 1e-6


@pytest.mark.parametrize(("method", "bound"), [("rmsprop", 10.0), ("adagrad", 1.0)])
def test_low_rank_updates_are_bounded_as_dense_ones(method: str, bound: float) -> None:
    g = torch.Generator().manual_seed(3)
    p = nn.Parameter(torch.zeros(24, 16))
    optimizer = MAKERS[method]([("p", p)], lr=1.0, store="lowrank", rank=2)
    for number in range(200):
        rare = torch.rand(24, 1, generator=g) < (1.0 if number == 0 else 0.2)
        p.grad = torch.randn(24, 16, generator=g) * 10 ** torch.randn(24, 1, generator=g) * rare
        p.data.zero_()
        optimizer.step()
        assert p.abs().max() <= bound * (1 + 1e-5)


def test_bytes_of_the_stores() -> None:
    def of(shape: tuple[int, ...], **options: Any) -> int:
        return state_bytes(Setting("rmsprop", options), shape)

    assert of((512, 256)) == 4 * 512 * 256
    assert of((512, 256), store="mean") == 4 * 512
    assert of((512, 256), store="mean", axes=[0, 1]) == 4
    assert of((512, 256), store="factored") == 4 * (512 + 256)
    assert of((512, 256), store="lowrank") == 4 + 4 * 64 * (512 + 256)
    assert of((3, 64, 32), store="lowrank", rank=2) == 4 + 4 * 2 * 3 * 96
    assert of((64, 3, 3, 3), store="factored", momentum=0.9) == 4 * 64 * 27 + 4 * (64 + 27)
    assert of((512, 256), store="mean", momentum=0.9, first_moment="bf16", rounding="nearest") == 2**11 + 2**18
    for store in ("mean", "factored", "lowrank"):
        assert of((9,), store=store) == 36  # vectors stay dense


def test_what_a_store_would_hold() -> None:
    v = torch.rand(12, 8, dtype=torch.float64)
    for options, expected in (
        ({}, v),
        ({"store": "mean"}, v.mean(1, keepdim=True).expand(12, 8)),
        ({"store": "factored"}, v.mean(1, keepdim=True) * v.mean(0, keepdim=True) / v.mean()),
        ({"store": "lowrank", "rank": 8}, v),
    ):
        held = approximate_second_moment(Setting("adagrad", options), v)
        assert held is not None
        torch.testing.assert_close(held, expected)


@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_passes_as_in_torch_and_leaves_the_factors(method: str, bad: float) -> None:
    p = nn.Parameter(START.float())
    optimizer = MAKERS[method]([("p", p)], store="lowrank", rank=4)
    grads = [g.float() for g in stream(6)]
    grads[3][5, 7] = bad
    for number, g in enumerate(grads):
        before = {name: value.clone() for name, value in optimizer.state[p].items()} if number else {}
        p.grad = g.clone()
        optimizer.step()
        if number == 3:
            assert all(torch.equal(before[name], optimizer.state[p][name]) for name in ("q", "u"))
    where = p.isnan().nonzero()
    assert where.tolist() == [[5, 7]]
    assert optimizer.state[p]["q"].isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"store": "sparse"}, "store 'sparse' is none of dense, mean, factored, lowrank"),
        ({"axes": [1]}, "axes would do nothing with store: dense"),
        ({"store": "mean", "rank": 2}, "rank would do nothing with store: mean"),
        ({"store": "mean", "axes": [2]}, r"p: axes \[2\] do not fit a tensor of shape \[6, 8\]"),
        ({"store": "mean", "axes": []}, "axes is empty"),
        ({"store": "lowrank", "rank": 7}, "p: rank 7 is above the smaller side"),
        ({"store": "lowrank", "rank": "x"}, "rank should be a number of columns"),
        ({"momentum": 1.0}, "momentum should be a number in"),
        ({"cautious": True}, "cautious would do nothing"),
        ({"store": "factored", "second_moment": "bf16"}, "keeps no second moment here"),
        ({"first_moment": "bf16"}, "keeps no first moment here"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptimizerError, match=words):
        validate(Setting("rmsprop", options), (6, 8), name="p")
