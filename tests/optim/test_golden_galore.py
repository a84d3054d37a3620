"""Golden checks of GaLore (arXiv 2403.03507)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from reference import galore
from test_golden_apollo import follow, state_of, stream
from torch import Tensor, nn

from memadvise.errors import OptimizerError
from memadvise.optim import GaLore
from memadvise.optim.executors import chunked
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import state_bytes, validate
from memadvise.plan.schema import Setting

SHAPES = [(24, 10), (10, 24), (12, 12)]


def matrix(shape: tuple[int, int], spread: float, seed: int = 0) -> Tensor:
    """A float32 matrix with singular values from 1 down to ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return ((u * torch.logspace(0, torch.tensor(spread).log10().item(), min(shape), dtype=torch.float64)) @ v).float()


@pytest.mark.parametrize("shape", SHAPES)
def test_with_all_of_the_space_and_plain_descent_inside_the_update_is_the_gradient(shape: tuple[int, int]) -> None:
    grads = stream(shape, 3)
    # with betas 0 and an eps that dwarfs it, Adam's direction is R / eps
    options = {"rank": min(shape), "betas": (0.0, 0.0), "eps": 1e9, "scale": 1.0, "lr": 1e9}
    for u, g in zip(follow(GaLore, grads, **options)[0], grads, strict=True):
        torch.testing.assert_close(u, g, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_projection_is_orthonormal(shape: tuple[int, int]) -> None:
    for g in (matrix(shape, 1e-6), torch.zeros(shape), torch.ones(shape)):
        _, optimizer = follow(GaLore, [g], rank=5)
        p = state_of(optimizer)["projection"]
        torch.testing.assert_close(p.T @ p, torch.eye(5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_is_of_the_projections_rank(shape: tuple[int, int]) -> None:
    for u in follow(GaLore, stream(shape, 6), rank=3, update_every=2)[0]:
        assert torch.linalg.matrix_rank(u, rtol=1e-10) == 3


def test_state_bytes() -> None:
    assert state_bytes(Setting("galore", {"rank": 6}), (48, 32)) == 4 * (2 * 48 * 6 + 32 * 6) + 4
    _, optimizer = follow(GaLore, [torch.ones(48, 32)], rank=6)
    state = state_of(optimizer)
    assert sum(v.numel() * v.itemsize for v in state.values()) == 4 * (2 * 48 * 6 + 32 * 6) + 4
    assert all(v.untyped_storage().nbytes() == v.numel() * v.itemsize for v in state.values())  # no views of factors
    wasteful = state_bytes(Setting("galore", {"rank": 700}), (1000, 1000))
    assert wasteful > state_bytes(Setting("adamw"), (1000, 1000))  # r above 2 m / 3 of a square matrix


@pytest.mark.parametrize("limit", [37, 256 * 1024])
@pytest.mark.parametrize("shape", [(300, 130), (130, 300)])
def test_the_subspace_is_the_svds(shape: tuple[int, int], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular values down to 1e-5 of the largest, from a float32 gradient, in boxes that cut even rows."""
    monkeypatch.setattr(chunked, "CPU_ELEMENTS", limit)
    g = matrix(shape, 1e-6)
    _, optimizer = follow(GaLore, [g], rank=100)
    p = state_of(optimizer)["projection"].double()
    u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    vectors = vh[:100].T if shape[0] > shape[1] else u[:, :100]
    torch.testing.assert_close(p @ p.T, vectors @ vectors.T, rtol=0, atol=1e-5)
    torch.testing.assert_close((p * vectors).sum(0).abs(), torch.ones(100, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gradient_of_zeros_leaves_a_valid_projection_and_the_weights(shape: tuple[int, int]) -> None:
    grads = [torch.zeros(shape, dtype=torch.float64), *stream(shape, 4)]
    updates, optimizer = follow(GaLore, grads, rank=3, update_every=4, stagger=False)
    assert (updates[0] == 0).all()
    assert all(torch.isfinite(u).all() and u.norm() > 0 for u in updates[1:])
    assert torch.isfinite(state_of(optimizer)["projection"]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_a_gradient_that_is_not_finite_keeps_the_old_subspace_and_raises_nothing(bad: float) -> None:
    good = stream((24, 10), 3)
    broken = good[1].clone()
    broken[3, 4] = bad
    _, optimizer = follow(GaLore, good[:1], rank=3, update_every=1)
    kept = state_of(optimizer)["projection"].clone()
    (p,) = optimizer.state
    p.grad = broken
    optimizer.step()
    assert torch.equal(state_of(optimizer)["projection"], kept)
    if bad == bad and bad < float("inf"):
        assert torch.isfinite(p).all()  # it overflows only where it is squared
        return
    assert torch.isnan(p).any()  # as with torch's own
    _, optimizer = follow(GaLore, [broken], rank=3)  # there is no old one
    first = state_of(optimizer)["projection"]
    torch.testing.assert_close(first.T @ first, torch.eye(3, dtype=torch.float64))


def turns(name: str, shape: tuple[int, int], steps: int, **options: Any) -> list[int]:
    """The steps at which the projection changed."""
    p, before, found = nn.Parameter(torch.zeros(shape)), torch.zeros(()), []
    optimizer = GaLore([(name, p)], rank=2, **options)
    for t, g in enumerate(stream(shape, steps), start=1):
        p.grad = g.float()
        optimizer.step()
        now = state_of(optimizer)["projection"].clone()
        if not torch.equal(now, before.expand_as(now)):
            found.append(t)
        before = now
    return found


def test_each_matrix_has_its_turn_at_a_step_of_its_own() -> None:
    names = [f"layers.{i}.weight" for i in range(12)]
    found = [turns(name, (6, 5), 21, update_every=10) for name in names]
    for steps in found:
        assert steps[0] == 1
        gaps = {b - a for a, b in itertools.pairwise(steps[1:])}
        assert gaps <= {10}
        assert steps[1] <= 11
    assert len({steps[1] for steps in found}) >= 5
    assert found[0] == turns(names[0], (6, 5), 21, update_every=10)
    assert [turns(name, (6, 5), 21, update_every=10, stagger=False) for name in names[:3]] == [[1, 11, 21]] * 3


def test_moments_stay_and_signs_agree_when_the_subspace_changes() -> None:
    """The same gradient gives the same subspace; a solver's arbitrary signs must not turn the moments against it."""
    g = matrix((24, 10), 0.01).double()
    _, optimizer = follow(GaLore, [g], rank=4)
    kept = state_of(optimizer)["projection"].clone()
    _, again = follow(GaLore, [g, g * 3, -g], rank=4, update_every=1)
    torch.testing.assert_close(state_of(again)["projection"], kept, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_caution_acts_in_the_full_space(shape: tuple[int, int]) -> None:
    grads = stream(shape, 8)
    plain = follow(GaLore, grads, rank=3)[0]
    careful = follow(GaLore, grads, rank=3, cautious=True)[0]
    for u, v, g in zip(plain, careful, grads, strict=True):
        agree, both = u.sign() * g.sign() > 0, (u * g) != 0
        assert (v[~agree] == 0).all()
        torch.testing.assert_close(v[agree], u[agree] * (both.sum() / agree.sum()), rtol=1e-6, atol=1e-15)
    assert ((plain[-1] * grads[-1]) < 0).any()


def test_compat_official_over_outliers_and_drift() -> None:
    grads = stream((24, 10), 25, seed=3)
    for t, g in enumerate(grads):
        g *= 10.0 ** (-2 * t / 25)
        if t % 7 == 3:
            g[t % 24, t % 10] *= 1e3
    start = torch.linspace(-1, 1, 240, dtype=torch.float64).reshape(24, 10)
    options = {"compat": "official", "rank": 4, "update_every": 10}
    expected = galore.run(start, grads, 1e-2, (0.9, 0.999), 1e-6, 0.1, options)
    p = nn.Parameter(start.float())
    optimizer = GaLore([("p", p)], lr=1e-2, eps=1e-6, weight_decay=0.1, **options)
    for g, x in zip(grads, expected, strict=True):
        p.grad = g.float()
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), x, rtol=1e-5, atol=1e-5)
    ours = galore.run(start, grads, 1e-2, (0.9, 0.999), 1e-6, 0.1, {**options, "compat": None})
    assert (ours[-1] - expected[-1]).abs().max() > 1e-6


def test_transposing_transposes() -> None:
    grads = stream((24, 10), 8)
    updates, _ = follow(GaLore, grads, rank=4, update_every=3)
    turned, _ = follow(GaLore, [g.T for g in grads], rank=4, update_every=3)
    for u, v in zip(updates, turned, strict=True):
        torch.testing.assert_close(u, v.T, rtol=1e-8, atol=1e-12)


def test_a_step_that_renews_the_subspace_stays_within_its_scratch() -> None:
    from test_executors import transient_bytes

    for shape in ((1024, 512), (512, 1024), (2, 512, 256)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer = MemadviseOptimizer([("p", p)], Setting("galore", {"rank": 64, "update_every": 1}), lr=1e-2)
        optimizer.step()
        (record,) = optimizer.memory()
        measured = transient_bytes(optimizer)
        assert measured <= record.scratch_bytes + 4096
        assert record.scratch_bytes < 3 * measured


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 11}, "p: rank 11 is above the smaller side of a matrix of 24 x 10"),
        ({"rank": -1}, "rank should be"),
        ({"scale": -1.0}, "scale should be"),
        ({"update_every": 2.5}, "update_every should be"),
        ({"stagger": 1}, "stagger should be"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptimizerError, match=words):
        validate(Setting("galore", options), (24, 10), name="p")
