"""Golden checks of Adapprox (arXiv 2403.14958) and of its S-RSI: properties that follow from their definition."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases.adapprox import CASE
from reference import lowrank
from test_executors import transient_bytes
from torch import Tensor, nn

from memadvise.errors import OptimizerError
from memadvise.optim import Adapprox
from memadvise.optim.executors import chunked
from memadvise.optim.methods import srsi
from memadvise.optim.methods.srsi import Dense, Ranks
from memadvise.optim.registry import approximate_second_moment, fitted, state_bytes, state_specs, validate
from memadvise.plan.schema import Setting


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alike(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    """Gaussian gradients, every entry alike."""
    g = generator(9)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(steps)]


def stream(shape: tuple[int, ...], steps: int, seed: int = 0, *, active: float = 1.0) -> list[Tensor]:
    """Gaussian gradients with row and column scales; each row present with probability ``active``."""
    g = generator(seed)
    rows = torch.rand(shape[0], 1, generator=g, dtype=torch.float64).mul(3).exp()
    columns = torch.rand(1, shape[1], generator=g, dtype=torch.float64).mul(3).exp()
    there = torch.rand(steps, shape[0], 1, generator=g, dtype=torch.float64) < active
    return [
        torch.randn(shape, generator=g, dtype=torch.float64) * rows * columns * there[number] for number in range(steps)
    ]


def follow(p: Tensor, grads: list[Tensor], make: Callable[..., Any] = Adapprox, **options: Any) -> list[Tensor]:
    p = nn.Parameter(p.clone())
    optimizer = make([("p", p)], **{"lr": 1e-3, "weight_decay": 0.1, **options})
    seen = []
    for g in grads:
        p.grad = g.to(p.dtype)
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


START = torch.randn(48, 32, generator=generator(7), dtype=torch.float64) * 0.1
FULL = {"rank": "full", "adapt_every": 0, "store": "lowrank"}


def decaying(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A non-negative matrix like a second moment: one large direction, and a tail that decays."""
    g = generator(5)
    tail = torch.randn(rows, 40, generator=g, dtype=torch.float64) * (0.8 ** torch.arange(40))
    a = tail @ torch.randn(40, columns, generator=g, dtype=torch.float64)
    return (a.abs() * 0.3 + 1).to(dtype)


def srsi_of(a: Tensor, rank: int, **ranks: Any) -> tuple[Tensor, Tensor]:
    chosen = Ranks(rank, **ranks)
    start = srsi.start(1, tuple(a.shape), chosen.columns(rank, tuple(a.shape)), a, None)
    return srsi.iterate(Dense(a), start, rank, chosen)


def adapted(a: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, int]:
    shape = tuple(a.shape)
    return srsi.factor(Dense(a), shape, ranks, lambda r: srsi.start(1, shape, r, a, None), ranks.init, True)


# ---------------------------------------------------------------- A1 to A7


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-6)], ids=str)
@pytest.mark.parametrize("iterations", [2, 5])
def test_a1_adam_mode_at_full_rank_is_adamw(dtype: torch.dtype, tolerance: float, iterations: int) -> None:
    grads = alike((48, 32), 100)
    ours = follow(START.to(dtype), grads, adam=True, power_iterations=iterations, **FULL)
    theirs = follow(START.to(dtype), grads, lambda p, **k: torch.optim.AdamW([p[0][1]], foreach=False, **k))
    assert (ours[-1] - theirs[-1]).abs().max() < tolerance
    native = follow(START.to(dtype), grads, **FULL)
    assert (native[-1] - theirs[-1]).norm() > 0.1 * (theirs[-1] - START).norm()  # the native step is another one


def test_a2_an_exactly_low_rank_stream_is_dense_at_rank_one() -> None:
    g = generator(2)
    a, b = torch.randn(48, 1, generator=g), torch.randn(1, 32, generator=g)
    grads = [torch.randn((), generator=g) * a @ b for _ in range(200)]
    ps = [nn.Parameter(torch.zeros(48, 32)) for _ in range(2)]
    stores = [Adapprox([p], 1.0, weight_decay=0.0, momentum=False, store=store, rank=1) for p, store in
              zip(ps, ("lowrank", "dense"), strict=True)]  # fmt: skip
    for grad in grads:
        for p, optimizer in zip(ps, stores, strict=True):
            p.data.zero_()
            p.grad = grad.clone()
            optimizer.step()  # p is minus the update
        assert (ps[0] - ps[1]).norm() <= 1e-5 * ps[1].norm()
    v = sum(0.999 ** (199 - i) * 0.001 * x * x for i, x in enumerate(grads))
    assert isinstance(v, Tensor)
    q, u = srsi_of(v, 1)
    assert (v - q @ u.mT).norm() / v.norm() <= 1e-6
    assert srsi.relative_error(u, srsi.square(v)) <= 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("truncation", ["columns", "svd"])
def test_a3_error_formula_orthonormality_and_quality(dtype: torch.dtype, tolerance: float, truncation: str) -> None:
    a = decaying(96, 64, dtype)
    total = srsi.square(a)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total.squeeze(), a.double().square().sum(), rtol=1e-14, atol=0)
    before, singular = 1.0, torch.linalg.svdvals(a.double())
    for rank in (1, 2, 4, 8, 16):
        q, u = srsi_of(a, rank, iterations=5, oversampling=5, truncation=truncation)
        residual = (a.double() - q.double() @ u.double().mT).square().sum()
        assert abs(total - u.double().square().sum() - residual) <= tolerance * total
        assert (q.mT @ q - torch.eye(rank, dtype=dtype)).abs().max() <= max(tolerance, 1e-12)
        xi = float(srsi.relative_error(u, total))
        assert xi <= before * (1 + 1e-9)  # of one sketch, a larger rank is never worse
        best = singular[rank:].square().sum().sqrt() / total.sqrt()
        assert best * (1 - 1e-4) <= xi <= 1.05 * best
        before = xi
        every = srsi.errors(u, total)
        assert every.shape == (rank,)
        assert (every.diff() <= 1e-9).all()


@pytest.mark.parametrize("rank", [1, 8, 0.25])
def test_a4_the_first_step_is_a_sign_step(rank: float) -> None:
    g = stream((48, 32), 1)[0].float()
    (p,) = follow(START.float(), [g], lr=1e-2, rank=rank, momentum=False, weight_decay=0.0)
    large = g.abs() > 1e-2
    assert large.float().mean() > 0.9
    moved = (START.float() - p)[large]
    torch.testing.assert_close(moved, 1e-2 * g.sign()[large], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("executor", "clip"), [("eager", 0.0), ("eager", 0.5), ("chunked", 1.0)])
def test_a5_updates_are_bounded_whatever_the_factors_lost(
    executor: str, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CPU_ELEMENTS", 1600)
    grads = [g.float() for g in stream((48, 32), 300, active=0.2)]
    common = {"lr": 1.0, "momentum": False, "weight_decay": 0.0, "rank": 4, "adapt_every": 0}
    seen = [torch.zeros(48, 32), *follow(torch.zeros(48, 32), grads, clip=clip, executor=executor, **common)]
    for old, new in pairwise(seen):
        assert torch.isfinite(new).all()
        h = new.double() - old.double()
        slack = 1e-6 * (1 + new.abs().max())  # the weights themselves round
        assert h.abs().max() <= 1 / math.sqrt(1 - 0.999) + slack
        assert h.square().mean().sqrt() <= (clip or math.inf) + slack


def gpt2(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"wte": (50257, width), "wpe": (1024, width), "ln_f": (2, width)}
    for i in range(layers):
        for name, out in (("c_attn", 3), ("proj", 1), ("fc", 4)):
            shapes[f"{i}.{name}.weight"], shapes[f"{i}.{name}.bias"] = (width, out * width), (out * width,)
        shapes[f"{i}.out.weight"], shapes[f"{i}.out.bias"] = (4 * width, width), (width,)
        shapes.update({f"{i}.ln.{j}": (width,) for j in range(4)})
    shapes.pop("ln_f")
    return {**shapes, "ln_f.weight": (width,), "ln_f.bias": (width,)}


@pytest.mark.parametrize(
    ("width", "layers", "options", "mib"),
    [
        (768, 12, {"rank": 1}, 475.9),
        (768, 12, {}, 621.8),
        (768, 12, {"rank": 1, "momentum": False}, 1.23),
        (768, 12, {"momentum": False}, 147.1),
        (1024, 24, {"rank": 1}, 1356.5),
        (1024, 24, {}, 1790.8),
        (1024, 24, {"rank": 1, "momentum": False}, 2.93),
        (1024, 24, {"momentum": False}, 437.3),
    ],
)
def test_a6_memory_of_gpt2(width: int, layers: int, options: dict[str, Any], mib: float) -> None:
    shapes = gpt2(width, layers)
    assert sum(math.prod(s) for s in shapes.values()) == {768: 124_439_808, 1024: 354_823_168}[width]
    setting = Setting("adapprox", options)
    assert abs(sum(state_bytes(fitted(setting, s), s) for s in shapes.values()) / 2**20 - mib) < 0.1
    if "momentum" in options:
        for shape in shapes.values():
            if len(shape) > 1:
                assert all(math.prod(s.shape) < math.prod(shape) for s in state_specs(setting, shape).values())


@pytest.mark.parametrize("increment", ["logistic", "double", "one_shot", lambda error: 1])
def test_a7_the_rank_stops_where_it_should(increment: Any) -> None:
    g = generator(7)
    exact = torch.rand(60, 7, generator=g, dtype=torch.float64) @ torch.rand(7, 40, generator=g, dtype=torch.float64)
    rule = srsi.check_increment(increment)
    assert rule is not None
    for noise in (0.0, 1e-3):
        a = exact + noise * torch.rand(60, 40, generator=g, dtype=torch.float64)
        q, u, k = adapted(a, Ranks(20, every=10, threshold=0.01, increment=rule))
        assert 1 <= k <= 20
        assert q.shape[-1] == u.shape[-1] == k
        assert (a - q @ u.mT).norm() / a.norm() <= 0.01 * (1 + 1e-9)
        if increment in ("one_shot",) or callable(increment):
            assert k <= 7  # the smallest that does
        _, _, k = adapted(a, Ranks(20, every=10, threshold=0.0, increment=rule))
        assert k == 20 or noise == 0  # exactly rank 7 may have no error left to see
    _, _, k = adapted(torch.rand(60, 40, generator=g), Ranks(20, every=10, threshold=0.0, increment=rule))
    assert k == 20


@pytest.mark.parametrize("setting", CASE.settings, ids=lambda setting: setting.key)
def test_twenty_steps_in_float32_are_those_of_the_slow_dense_reference(setting: Setting) -> None:
    start, grads = START[:24, :16].float(), [g.float() for g in stream((24, 16), 20)]
    ours = follow(start, grads, **setting.options)[-1]
    expected = lowrank.adapprox(start, grads, 1e-3, (0.9, 0.999), 1e-8, 0.1, setting.options)[-1]
    assert (ours - expected).norm() / expected.norm() < 1e-6


# ---------------------------------------------------------------- factors made anew now and then


def test_between_two_turns_the_weights_of_all_gradients_add_up() -> None:
    """All gradients alike: v is what Adam's would be at every step, whichever step the factors were made at."""
    g = stream((24, 16), 1)[0]
    for options in ({"momentum": False, "clip": 0.0}, {"adam": True}):
        runs = [
            follow(START[:24, :16], [g] * 13, refresh_every=every, betas=(0.9, 0.8), **{**FULL, **options})
            for every in (1, 4)
        ]
        torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-9)
    other = stream((24, 16), 13)
    often, rarely = (follow(START[:24, :16], other, refresh_every=every, **FULL)[-1] for every in (1, 4))
    assert (often - rarely).abs().max() > 1e-4


def test_factors_are_made_on_turns_of_their_own_and_the_rank_with_them() -> None:
    grads, days = stream((32, 24), 14), []
    for name in ("a", "b", "c", "d", "e"):
        p = nn.Parameter(torch.zeros(32, 24))
        optimizer = Adapprox([(name, p)], rank=6, adapt_every=5, refresh_every=4, error_threshold=0.0)
        changed, last = [], torch.zeros(32, 6)
        for step, g in enumerate(grads, start=1):
            p.grad = g.float()
            optimizer.step()
            if not torch.equal(optimizer.state[p]["q"], last):
                changed.append(step)
            last = optimizer.state[p]["q"].clone()
        assert changed[0] == 1
        assert all(b - a == 4 for a, b in pairwise(changed[1:]))
        assert 2 <= changed[1] <= 5
        days.append(changed[1])
    assert len(set(days)) > 1


@pytest.mark.parametrize("every", [1, 3, 7])
def test_the_calendar_of_turns_and_adaptations(every: int) -> None:
    for key in range(10):
        ranks, made, adapted = Ranks(4, every=5, refresh=every), 0, 0
        for step in range(1, 60):
            assert ranks.since(step, key) == step - made
            if ranks.refreshes(step, key):
                days = [d for d in range(made + 1, step + 1) if (d - 1) % 5 == 0]
                assert ranks.due(step, 0, step - made) == bool(days)
                adapted += bool(days)
                made = step
        assert adapted >= (12 if every < 5 else 8)


@pytest.mark.parametrize("options", [{}, {"adam": True}, {"adapt_every": 3, "warm_start": True, "power_iterations": 2}])
def test_resuming_between_two_turns_is_bit_for_bit(options: dict[str, Any]) -> None:
    grads = [g.float() for g in stream((24, 16), 12)]
    for stop in (3, 5, 6, 7, 8):
        p = nn.Parameter(START[:24, :16].float())
        optimizer = Adapprox([("p", p)], rank=4, refresh_every=4, **options)
        for step, g in enumerate(grads):
            if step == stop:
                saved = copy.deepcopy((p.detach(), optimizer.state_dict()))
            p.grad = g
            optimizer.step()
        q = nn.Parameter(saved[0])
        resumed = Adapprox([("p", q)], rank=4, refresh_every=4, **options)
        resumed.load_state_dict(saved[1])
        for g in grads[stop:]:
            q.grad = g
            resumed.step()
        assert torch.equal(p, q)
        assert all(torch.equal(value, resumed.state[q][name]) for name, value in optimizer.state[p].items())


# ---------------------------------------------------------------- what else S-RSI and AS-RSI must do


def test_the_logistic_increment_is_the_documented_one() -> None:
    steps = [max(1, math.floor(srsi.logistic(x))) for x in (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1)]
    assert steps == [6, 7, 14, 27, 66, 115, 175, 190]


def test_oversampling_changes_nothing_but_the_svd_cut() -> None:
    a = decaying(60, 50)
    start = srsi.start(1, (60, 50), 12, a, None)
    plain = srsi.iterate(Dense(a), start[..., :6].clone(), 6, Ranks(6, iterations=2))
    wide = srsi.iterate(Dense(a), start.clone(), 12, Ranks(12, iterations=2))
    torch.testing.assert_close(plain[0] @ plain[1].mT, wide[0][:, :6] @ wide[1][:, :6].mT, rtol=1e-9, atol=1e-9)
    total, ratios = srsi.square(a), []
    for key in range(20):
        begun = srsi.start(key, (60, 50), 12, a, None)
        cut = {
            truncation: srsi.iterate(Dense(a), begun[..., :n].clone(), 6, Ranks(6, 1, 1, 1, 6, truncation))[1]
            for truncation, n in (("columns", 6), ("svd", 12))
        }
        ratios.append(srsi.relative_error(cut["svd"], total) / srsi.relative_error(cut["columns"], total))
    assert max(ratios) < 1  # the best columns of what was found
    assert sum(ratios) / len(ratios) < 0.9


@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1.0, 1e15])
def test_tiny_and_huge_moments_are_factored_alike(scale: float) -> None:
    a = decaying(60, 50, torch.float32)
    q, u = srsi_of(a, 5)
    q1, u1 = srsi_of(a * scale, 5)
    torch.testing.assert_close(q1 @ (u1 / scale).mT, q @ u.mT, rtol=1e-4, atol=1e-4)
    xi = srsi.relative_error(u1, srsi.square(a * scale))
    torch.testing.assert_close(xi, srsi.relative_error(u, srsi.square(a)), rtol=1e-3, atol=1e-4)


def test_a_stack_is_factored_matrix_by_matrix_and_shares_the_rank() -> None:
    first, second, other = (stream((16, 12), 5, seed) for seed in (1, 2, 3))
    p = torch.stack([START[:16, :12], START[16:32, :12]])
    runs = [
        follow(p, [torch.stack(pair) for pair in zip(first, rest, strict=True)], rank=3, adapt_every=0)[-1]
        for rest in (second, [100 * g for g in other])
    ]
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=0, atol=1e-12)  # the other matrix does not matter
    alone = follow(p[:1], [g[None] for g in first], rank=3, adapt_every=0)[-1]
    matrix = follow(p[0], first, rank=3, adapt_every=0)[-1]
    torch.testing.assert_close(alone[0], matrix, rtol=0, atol=1e-12)
    specs = state_specs(Setting("adapprox", {"rank": 3}), (2, 16, 12))
    assert (specs["q"].shape, specs["u"].shape, specs["rank"].shape) == ((2, 16, 3), (2, 12, 3), ())


def test_the_rank_adapts_on_its_days_and_staggered_parameters_on_others() -> None:
    low, rough = torch.ones(32, 24), stream((32, 24), 12)
    for stagger in (False, True):
        days = []
        for name in ("a", "b", "c", "d"):
            p = nn.Parameter(torch.zeros(32, 24))
            optimizer = Adapprox([(name, p)], rank=6, adapt_every=5, stagger=stagger, weight_decay=0.0)
            ranks = []
            for number in range(12):
                p.grad = low.clone() if number % 2 == 0 else rough[number].float()
                optimizer.step()
                ranks.append(int(optimizer.state[p]["rank"]))
            assert ranks[0] == 1  # one gradient of ones: rank 1
            assert set(ranks) <= {1, 6}
            days.append(ranks.index(6))
        assert days == [5] * 4 if not stagger else len(set(days)) > 1


def test_columns_above_the_rank_are_zero_and_the_capacity_is_the_prediction() -> None:
    p = nn.Parameter(torch.zeros(64, 48))
    optimizer = Adapprox([("p", p)], momentum=False)
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state[p]
    assert int(state["rank"]) == 1
    assert state["q"].shape == (64, 12)
    assert not state["q"][:, 1:].any()
    assert not state["u"][:, 1:].any()
    assert sum(v.numel() * v.itemsize for v in state.values()) == 4 + 8 + 4 * 12 * (64 + 48)


def test_small_matrices_and_vectors_are_dense() -> None:
    def names(shape: tuple[int, ...], **options: Any) -> set[str]:
        return set(state_specs(Setting("adapprox", options), shape)) - {"step", "exp_avg"}

    assert names((7,)) == names(()) == names((1, 9)) == names((9, 1)) == names((12, 12), rank=6) == {"exp_avg_sq"}
    assert names((12, 12), rank=5) == names((12, 12), rank=6, store="lowrank") == {"q", "u", "rank"}
    assert names((12, 12), rank=5, store="dense") == names((12, 12), rank_min=7) == {"exp_avg_sq"}
    assert names((8, 4, 3, 3), rank=2, adapt_every=0) == {"q", "u"}
    assert state_specs(Setting("adapprox", {"rank": 2}), (8, 4, 3, 3))["u"].shape == (36, 2)


def test_the_floor_keeps_adam_mode_alive_on_rows_that_rarely_get_a_gradient() -> None:
    grads = [g.float() for g in stream((48, 32), 200, active=0.2)]
    common = {"lr": 1.0, "adam": True, "rank": 4, "weight_decay": 0.0, "adapt_every": 0}
    largest = {}
    for floor in (0.1, 0.0):
        seen = [torch.zeros(48, 32), *follow(torch.zeros(48, 32), grads, floor=floor, **common)]
        largest[floor] = max(float((b - a).abs().max()) for a, b in pairwise(seen[9:]))
    assert largest[0.1] < 10
    assert largest[0.0] > 100 * largest[0.1]


def test_guidance_is_bounded_and_left_alone_at_the_first_step() -> None:
    g = stream((48, 32), 1)[0]
    common = {"lr": 1e-2, "weight_decay": 0.0, "rank": 4}
    plain = [START, *follow(START, [g] * 4, **common)]
    guided = [START, *follow(START, [g] * 4, guidance=True, **common)]
    wide = [START, *follow(START, [g] * 4, guidance=True, guidance_max=5.0, **common)]
    moves = [[b - a for a, b in pairwise(x)] for x in (plain, guided, wide)]
    torch.testing.assert_close(moves[0][0], moves[1][0])
    for number in (1, 2, 3):  # the same direction again and again: the bound
        torch.testing.assert_close(moves[1][number], 2 * moves[0][number], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moves[2][number], 5 * moves[0][number], rtol=1e-9, atol=1e-12)
    common["store"] = "dense"
    back = [START, *follow(START, [g, -g], guidance=True, **common)]
    other = [START, *follow(START, [g, -g], **common)]
    torch.testing.assert_close(back[2] - back[1], 0.5 * (other[2] - other[1]), rtol=1e-6, atol=1e-9)  # theta = -1


def test_the_second_moment_it_would_hold() -> None:
    v = decaying(64, 48)
    for options, worst in (({"rank": 12, "adapt_every": 0}, 0.09), ({"error_threshold": 0.1, "rank": 12}, 0.1)):
        held = approximate_second_moment(Setting("adapprox", options), v)
        assert held is not None
        assert (held >= 0).all()
        assert 0 < (v - held).norm() / v.norm() <= worst
    conv = torch.rand(8, 4, 3, 3)
    held = approximate_second_moment(Setting("adapprox", {"rank": 2}), conv)
    assert held is not None
    assert held.shape == conv.shape
    vector = torch.rand(9)
    held = approximate_second_moment(Setting("adapprox"), vector)
    assert held is not None
    assert torch.equal(held, vector)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"adam": True}, {"momentum": False, "truncation": "svd"}, {"guidance": True}])
@pytest.mark.parametrize("executor", ["eager", "chunked"])
def test_a_non_finite_gradient_harms_what_it_meets_and_no_more(
    bad: float, options: dict[str, Any], executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CPU_ELEMENTS", 200)
    grads = [g.float() for g in stream((48, 32), 14)]
    grads[10][5, 7] = bad  # a day on which the rank adapts
    p, twin = nn.Parameter(START.float()), nn.Parameter(START.float())
    optimizer = Adapprox([("p", p)], executor=executor, rank=8, error_threshold=0.3, **options)
    theirs = torch.optim.AdamW([twin], lr=1e-3)
    for number, g in enumerate(grads):
        before = {name: value.clone() for name, value in optimizer.state[p].items()} if number else {}
        p.grad, twin.grad = g.clone(), g.clone()
        optimizer.step()
        theirs.step()
        state = optimizer.state[p]
        if number == 10:
            assert all(torch.equal(before[name], state[name]) for name in ("q", "u", "rank"))
        assert state["q"].isfinite().all()
        assert state["u"].isfinite().all()
        assert torch.equal(p.isnan(), twin.isnan())
    assert int(p.isnan().sum()) == 1


def test_a_non_finite_first_gradient_leaves_no_factors() -> None:
    p = nn.Parameter(START.float())
    optimizer = Adapprox([("p", p)], rank=8)
    p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert not optimizer.state[p]["q"].any()
    p.data.copy_(START)
    optimizer.state[p]["exp_avg"].zero_()
    p.grad = stream((48, 32), 1)[0].float()
    optimizer.step()
    assert p.isfinite().all()
    assert optimizer.state[p]["q"].any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 5}, r"p: rank 5 is above the smaller side of a matrix of shape \[4, 36\]"),
        ({"rank": 0}, "rank should be a number of columns"),
        ({"rank": 1.5}, "rank should be a number of columns"),
        ({"rank": 1.0}, "rank should be a number of columns"),
        ({"rank": "half"}, "rank should be a number of columns"),
        ({"rank": True}, "rank should be a number of columns"),
        ({"rank": 2, "rank_init": 3}, "rank_init 3 is above rank 2"),
        ({"rank": 2, "rank_min": 3}, "rank_min 3 is above rank 2"),
        ({"rank_min": 3, "rank_init": 2}, "rank_init should be an integer of at least rank_min, 3"),
        ({"rank_min": 0}, "rank_min should be an integer of at least 1"),
        ({"power_iterations": 0}, "power_iterations should be"),
        ({"oversampling": -1}, "oversampling should be"),
        ({"adapt_every": 2.5}, "adapt_every should be"),
        ({"error_threshold": -0.1}, "error_threshold should be"),
        ({"clip": math.inf}, "clip should be"),
        ({"increment": "linear"}, "increment should be one of logistic, double, one_shot"),
        ({"increment": 3}, "increment should be one of"),
        ({"truncation": "qr"}, "truncation 'qr' is none of columns, svd"),
        ({"store": "mean"}, "store 'mean' is none of auto, lowrank, dense"),
        ({"momentum": 0.9}, "momentum should be true or false"),
        ({"guidance": True, "momentum": False}, "guidance compares updates with their average"),
        ({"guidance": True, "adam": True}, "guidance compares updates with their average"),
        ({"adam": True, "clip": 2.0}, "clip would do nothing"),
        ({"oversampling": 3}, "oversampling would do nothing"),
        ({"guidance_max": 3.0}, "guidance_max would do nothing"),
        ({"floor": 0.2}, "floor would do nothing"),
        ({"refresh_every": 0}, "refresh_every should be an integer of at least 1"),
        ({"momentum": False, "cautious": True}, "cautious would do nothing"),
        ({"second_moment": "bf16"}, "adapprox keeps no second moment here"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptimizerError, match=words):
        validate(Setting("adapprox", options), (4, 4, 3, 3), name="p")


def by_one(error: float) -> float:
    return 1.0


def test_a_function_as_increment_has_the_same_name_in_every_process() -> None:
    p = nn.Parameter(torch.zeros(32, 24))
    optimizer = Adapprox([("p", p)], increment=by_one, rank=6)
    p.grad = stream((32, 24), 1)[0].float()
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["memadvise"]["settings"][0].count("test_golden_adapprox.by_one") == 1
    assert "0x" not in saved["memadvise"]["settings"][0]
    Adapprox([("p", nn.Parameter(torch.zeros(32, 24)))], increment=by_one, rank=6).load_state_dict(saved)


# ---------------------------------------------------------------- memory of a step


@pytest.mark.parametrize("options", [{}, {"truncation": "svd"}, {"rank": 0.1, "adam": True, "adapt_every": 0}], ids=str)
@pytest.mark.parametrize("shape", [(1024, 512), (512, 1024), (2, 512, 256)], ids=str)
def test_a_step_at_the_default_rank_allocates_no_more_than_its_scratch(
    shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=generator())
    optimizer = Adapprox([("p", p)], power_iterations=2, **options)
    optimizer.step()
    optimizer.state[p]["step"].zero_()  # a first step again: it adapts, to the largest rank
    measured = transient_bytes(optimizer)
    assert measured <= optimizer.memory()[0].scratch_bytes <= 3 * measured
