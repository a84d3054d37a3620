"""Golden checks of APOLLO and APOLLO-Mini (arXiv 2412.05270): properties that follow from its definition, its memory
table, and what its official code does.

Number 9, int8 weights, is with the weights' form.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from reference import apollo
from torch import Tensor, nn

from memadvise.errors import OptimizerError
from memadvise.optim import APOLLO, APOLLOMini
from memadvise.optim.executors import work
from memadvise.optim.methods import sketch
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import state_bytes, state_specs, validate
from memadvise.plan.schema import Setting

LR = 1e-2


def stream(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    """Gaussian gradients with rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[0], 1, generator=generator, dtype=torch.float64) + 0.1
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(steps)]


def follow(
    make: type[MemadviseOptimizer], grads: list[Tensor], *, name: str = "p", **options: Any
) -> tuple[list[Tensor], MemadviseOptimizer]:
    """What each step subtracted, and the optimizer."""
    p = nn.Parameter(torch.zeros_like(grads[0]))
    options = {"lr": LR, "eps": 1e-12, **options}
    optimizer, updates = make([(name, p)], **options), []
    for g in grads:
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
        updates.append(before - p.detach())
    return updates, optimizer


def state_of(optimizer: MemadviseOptimizer) -> dict[str, Tensor]:
    (state,) = optimizer.state.values()
    return state


def adam_updates(grads: list[Tensor], eps: float = 1e-12) -> list[Tensor]:
    m, v, updates = torch.zeros_like(grads[0]), torch.zeros_like(grads[0]), []
    for t, g in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        updates.append(LR * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + eps))
    return updates


# ---------------------------------------------------------------- the page's golden checks


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_1_a_projection_that_keeps_everything_gives_adams_norms_along_the_gradient(shape: tuple[int, int]) -> None:
    grads = [g.float() for g in stream(shape, 12)]
    updates, _ = follow(APOLLO, grads, rank=10, projection="sketch", limiter=None)  # of rank m: it permutes, with signs
    axis = 1 if shape[0] > shape[1] else 0
    for u, dense in zip(updates, adam_updates(grads), strict=True):
        torch.testing.assert_close(u.norm(dim=axis), dense.norm(dim=axis), rtol=2e-6, atol=2e-7)
    cosine = torch.cosine_similarity(updates[-1].flatten(), adam_updates(grads)[-1].flatten(), 0)
    assert 0 < cosine < 0.9


def test_2_the_direction_is_the_gradients() -> None:
    grads = stream((24, 10), 6)
    updates, _ = follow(APOLLOMini, grads)
    for u, g in zip(updates, grads, strict=True):
        assert torch.cosine_similarity(u.flatten(), g.flatten(), 0) > 1 - 1e-12
    updates, _ = follow(APOLLO, grads, rank=4)
    for u, g in zip(updates, grads, strict=True):
        assert (torch.cosine_similarity(u, g, 1) > 1 - 1e-12).all()
    assert torch.cosine_similarity(updates[-1].flatten(), grads[-1].flatten(), 0) < 0.999  # rows differ in size


@pytest.mark.parametrize("projection", ["gaussian", "sketch"])
def test_3_the_first_update_has_the_size_of_the_formula_whatever_the_gradients(projection: str) -> None:
    (g,) = stream((64, 32), 1)
    for rank, scale in ((1, 128.0), (8, 2.0)):
        (first,), optimizer = follow(APOLLO, [g], rank=rank, scaling="tensor", scale=scale, projection=projection)
        r = state_of(optimizer)["exp_avg"] / 0.1
        rms = math.sqrt(scale * rank * 64) * g.square().mean().sqrt() / r.norm()
        assert first.square().mean().sqrt().item() / LR == pytest.approx(rms.item(), rel=1e-8)
        for factor in (1e-6, 1e6):
            (scaled,), _ = follow(
                APOLLO, [g * factor], rank=rank, scaling="tensor", scale=scale, projection=projection, eps=1e-15
            )
            torch.testing.assert_close(scaled, first, rtol=1e-7, atol=0)


def test_3_its_size_on_average() -> None:
    """sqrt(scale r / m) of Adam's, which is 1: 0.177 for rank 1 at 128 x 1 and so on."""
    grads = [torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]
    sizes = [follow(APOLLOMini, [g], name=f"p{i}", scale=1.0)[0][0] for i, g in enumerate(grads)]
    rms = torch.stack(sizes).square().mean((1, 2)).sqrt() / LR
    assert rms.mean().item() == pytest.approx(1 / math.sqrt(32), rel=0.1)


def norms_of(updates: list[Tensor], *, corrected: bool = False) -> list[float]:
    """|S| of each step, without the bias correction (or with it)."""
    corrections = [math.sqrt(1 - 0.999**t) / (1 - 0.9**t) for t in range(1, len(updates) + 1)]
    return [(u.norm() / LR / (1 if corrected else c)).item() for u, c in zip(updates, corrections, strict=True)]


@pytest.mark.parametrize("compat", [None, "official"])
def test_4_the_limiter(compat: str | None) -> None:
    grads = stream((24, 10), 40)
    for i in range(20, 40):
        grads[i] = grads[i] * 10.0 ** (i % 3)  # spikes
    limited = norms_of(follow(APOLLO, grads, rank=4, compat=compat)[0])
    free = norms_of(follow(APOLLO, grads, rank=4, limiter=None, compat=compat)[0])
    assert all(b <= 1.01 * a * (1 + 1e-6) for a, b in itertools.pairwise(limited))
    assert any(b > 1.01 * a for a, b in itertools.pairwise(free))
    shrinking = [grads[0] * 0.5**i for i in range(10)]
    limited = norms_of(follow(APOLLO, shrinking[:1] + shrinking[5:], rank=4, compat=compat)[0])
    free = norms_of(follow(APOLLO, shrinking[:1] + shrinking[5:], rank=4, limiter=None, compat=compat)[0])
    assert limited == pytest.approx(free)


@pytest.mark.parametrize("first", ["zero", "tiny"])
def test_5_a_first_gradient_of_zero_does_not_lock_the_layer(first: str) -> None:
    grads = stream((24, 10), 6)
    nothing = grads[0] * (0.0 if first == "zero" else 1e-14)
    options = {"rank": 4, "eps": 1e-8}
    fresh = follow(APOLLO, grads, **options)[0]
    for make_options in ({}, {"limiter_on": "corrected"}):
        late = follow(APOLLO, [nothing, *grads], **options, **make_options)[0]
        assert 0.5 < late[5].norm() / fresh[4].norm() < 2
    official = follow(APOLLO, [nothing, *grads], **options, compat="official")[0]
    assert official[5].norm() / fresh[4].norm() < 1e-6  # what is mended


def test_5_a_norm_that_collapsed_is_none_to_grow_from() -> None:
    """A layer that is switched off for long, and on again: its norm sank with the gradients, far below eps."""
    grads = stream((24, 10), 300)
    off = [g * 1e-16 for g in grads[20:280]]
    updates = follow(APOLLO, grads[:20] + off + grads[280:], rank=4, eps=1e-6)[0]
    locked = follow(APOLLO, grads[:20] + off + grads[280:], rank=4, eps=1e-6, limiter_floor=0.0)[0]
    assert updates[279].norm() < 1e-8 * updates[19].norm()
    assert updates[284].norm() > 0.1 * updates[19].norm()
    assert locked[284].norm() < 1e-6 * updates[19].norm()


def test_5_corrected_norms_have_no_slow_start() -> None:
    (g,) = stream((64, 32), 1)
    raw = norms_of(follow(APOLLO, [g] * 60, rank=8)[0], corrected=True)
    assert raw[9] / raw[0] == pytest.approx(0.53, abs=0.01)  # 0.2795 / 0.5275
    assert raw[59] / raw[0] == pytest.approx(1.0, abs=0.01)
    corrected = norms_of(follow(APOLLO, [g] * 60, rank=8, limiter_on="corrected")[0], corrected=True)
    assert corrected == pytest.approx([corrected[0]] * 60, rel=1e-6)


def projections(grads: list[Tensor], **options: Any) -> list[Tensor]:
    """R of each step, from what it adds to the first moment."""
    p, before, found = nn.Parameter(torch.zeros_like(grads[0])), torch.zeros(()), []
    optimizer = APOLLO([("p", p)], lr=LR, **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        now = state_of(optimizer)["exp_avg"].clone()
        found.append((now - 0.9 * before) / 0.1)
        before = now
    return found


@pytest.mark.parametrize("projection", ["gaussian", "sketch"])
def test_6_one_projection_a_window_and_another_for_each_seed(projection: str) -> None:
    (g,) = stream((24, 10), 1)
    seen = projections([g] * 9, rank=4, projection=projection, update_every=4)
    for t in range(9):
        torch.testing.assert_close(seen[t], seen[t // 4 * 4], rtol=0, atol=1e-12)
    assert (seen[0] - seen[4]).norm() > 0.1
    assert (seen[4] - seen[8]).norm() > 0.1
    again = projections([g], rank=4, projection=projection, update_every=4)
    assert torch.equal(seen[0], again[0])
    other = projections([g], rank=4, projection=projection, update_every=4, seed=1)
    assert (seen[0] - other[0]).norm() > 0.1


def test_6_the_projection_belongs_to_the_name_not_to_the_order() -> None:
    (g,) = stream((24, 10), 1)
    results = []
    for names in (("a", "b", "c"), ("c", "b", "a"), ("b",)):
        named = {name: nn.Parameter(torch.zeros(24, 10, dtype=torch.float64)) for name in names}
        optimizer = APOLLO(named.items(), lr=LR, rank=4)
        for p in named.values():
            p.grad = g.clone()
        optimizer.step()
        results.append(named)
    for other in results[1:]:
        for name, p in other.items():
            assert torch.equal(p, results[0][name])
    assert not torch.equal(results[0]["a"], results[0]["b"])


@pytest.mark.parametrize("projection", ["gaussian", "sketch"])
def test_6_resuming_in_a_window_is_bit_for_bit(projection: str) -> None:
    grads = [g.float() for g in stream((24, 10), 10)]
    start = torch.ones(24, 10)
    options = {"rank": 4, "projection": projection, "update_every": 4, "lr": LR}
    p = nn.Parameter(start.clone())
    optimizer = APOLLO([("p", p)], **options)
    for t, g in enumerate(grads):
        if t == 6:
            saved = copy.deepcopy((p.detach(), optimizer.state_dict()))
        p.grad = g
        optimizer.step()
    q = nn.Parameter(saved[0])
    resumed = APOLLO([("p", q)], **options)
    resumed.load_state_dict(saved[1])
    for g in grads[6:]:
        q.grad = g
        resumed.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    "options", [{"rank": 4}, {"rank": 4, "projection": "sketch"}, {"rank": 2, "scaling": "tensor"}]
)
def test_7_transposing_transposes(options: dict[str, Any]) -> None:
    grads = stream((24, 10), 8)
    updates, _ = follow(APOLLO, grads, **options)
    turned, _ = follow(APOLLO, [g.T for g in grads], **options)
    for u, v in zip(updates, turned, strict=True):
        torch.testing.assert_close(u, v.T, rtol=1e-12, atol=1e-15)


def test_8_state_bytes_are_the_formula_and_nothing_hangs_off_the_state() -> None:
    n, m, r = 48, 32, 6
    for make, rank, options in ((APOLLO, r, {"rank": r}), (APOLLOMini, 1, {})):
        _, optimizer = follow(make, [g.float() for g in stream((n, m), 2)], **options)
        state = state_of(optimizer)
        assert all(type(value) is Tensor for value in state.values())
        assert sum(v.numel() * v.itemsize for v in state.values()) == 8 * n * rank + 12
        assert not {n * m, m * rank} & {v.numel() for v in state.values()}
        assert set(optimizer.state_dict()["state"][0]) == set(state)


def test_8_the_published_memory_comes_out_of_the_spec() -> None:
    """Llama-2-7B, rank 256, attention and MLP matrices: 1.62 GB in the paper's bfloat16, 1.6 in its table."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    elements = {}
    for method, options in (("apollo", {"rank": 256}), ("apollo_mini", {})):
        specs = [state_specs(Setting(method, options), shape).values() for shape in shapes]
        elements[method] = 32 * sum(torch.Size(s.shape).numel() for spec in specs for s in spec)
    assert elements["apollo"] * 2 / 1e9 == pytest.approx(1.62, abs=0.005)
    assert elements["apollo_mini"] * 2 / 1e9 == pytest.approx(0.0064, abs=0.0001)  # "0.0G"
    left_out = 2 * 32000 * 4096 * 2 * 2  # embedding and head under Adam
    assert left_out / 1e9 == pytest.approx(1.05, abs=0.005)


# ---------------------------------------------------------------- the official code


@pytest.mark.parametrize("make", [APOLLO, APOLLOMini])
@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_compat_official_over_outliers_and_drift(make: type[MemadviseOptimizer], shape: tuple[int, int]) -> None:
    grads = stream(shape, 25, seed=3)
    for t, g in enumerate(grads):
        g *= 10.0 ** (-2 * t / 25)
        if t % 7 == 3:
            g[t % shape[0], t % shape[1]] *= 1e4
    grads[0].zero_()
    start = torch.linspace(-1, 1, 240, dtype=torch.float64).reshape(shape)
    options = {"compat": "official", "update_every": 10, **({"rank": 4} if make is APOLLO else {})}
    mini = make is APOLLOMini
    expected = apollo.run(start, grads, LR, (0.9, 0.999), 1e-6, 0.1, options, mini=mini)
    p = nn.Parameter(start.float())
    optimizer = make([("p", p)], lr=LR, eps=1e-6, weight_decay=0.1, **options)
    for g, x in zip(grads, expected, strict=True):
        p.grad = g.float()
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), x, rtol=1e-5, atol=1e-6)
    ours = apollo.run(start, grads, LR, (0.9, 0.999), 1e-6, 0.1, {**options, "compat": None}, mini=mini)
    assert (ours[-1] - expected[-1]).abs().max() > 1e-3  # and ours is another


# ---------------------------------------------------------------- projections


@pytest.mark.parametrize("kind", sketch.KINDS)
@pytest.mark.parametrize(("m", "rank"), [(40, 40), (40, 16), (48, 4), (130, 2), (7, 3)])
def test_projections_keep_norms_on_average(kind: str, m: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(5, m, generator=generator) * torch.rand(m, generator=generator)
    ratios = []
    for key in range(400):
        drawn = sketch.draw(kind, key, m, rank, g)
        r = sketch.project(g, drawn, kind, key, m, rank, 0, by_rows=True)
        ratios.append(r.norm(dim=1).square() / g.norm(dim=1).square())
    ratio = torch.stack(ratios)
    assert ratio.mean(0).tolist() == pytest.approx([1.0] * 5, abs=5 * math.sqrt(2 / rank / 400) + 1e-6)
    assert ratio.var(0).max() <= 3 / rank  # 2 / r for a Gaussian one, and a sample of 400
    if kind == "sketch" and rank == m:
        torch.testing.assert_close(ratio, torch.ones(400, 5))


@pytest.mark.parametrize("kind", sketch.KINDS)
def test_a_projection_is_the_sum_of_its_boxes_and_of_the_dense_matrix(kind: str) -> None:
    g, (m, rank) = torch.randn(6, 23, dtype=torch.float64), (23, 5)
    drawn = sketch.draw(kind, 77, m, rank, g)
    whole = g @ apollo.projection(77, m, rank, kind)
    for by_rows in (True, False):
        x = g if by_rows else g.T
        parts = [
            sketch.project(
                x[:, a:b] if by_rows else x[a:b], drawn[a:b], kind, 77, m, rank, a, by_rows=by_rows
            )
            for a, b in ((0, 4), (4, 5), (5, 17), (17, 23))
        ]  # fmt: skip
        total = sum(parts[1:], parts[0])
        torch.testing.assert_close(total if by_rows else total.T, whole)


def test_neighbours_never_share_a_bucket_of_a_sketch() -> None:
    m, rank = 20, 6
    for key in range(20):
        p = apollo.projection(key, m, rank, "sketch")
        for start in range(0, m, rank):
            assert (p[start : start + rank].abs().sum(0) <= 1).all()
    together = [
        (apollo.projection(key, m, rank, "sketch")[[1, 9]].abs().sum(0) == 2).any().item() for key in range(600)
    ]
    assert sum(together) / 600 == pytest.approx(1 / rank, abs=0.06)


# ---------------------------------------------------------------- moments of the projected space in fewer bits

CODED = {"first_moment": "int8", "second_moment": "int8"}


def test_a_space_in_8_bits_takes_a_quarter_and_moves_almost_alike() -> None:
    (shape, rank), full = ((512, 256), 64), 8 * 512 * 64 + 12
    coded = state_bytes(Setting("apollo", {"rank": rank, **CODED}), shape)
    assert 0.25 * full < coded < 0.29 * full
    grads = [g.float() for g in stream(shape, 30)]
    plain = follow(APOLLO, grads, rank=rank, eps=1e-8)[0]
    for u, v in zip(plain, follow(APOLLO, grads, rank=rank, eps=1e-8, **CODED)[0], strict=True):
        assert (u - v).norm() < 0.02 * u.norm()  # norms over many values hardly feel the codes


@pytest.mark.parametrize("method", ["apollo", "galore"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (3, 40, 64)])
def test_coding_a_factor_in_pieces_is_coding_it_whole(
    method: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    grads, results = [torch.randn(shape, generator=torch.Generator().manual_seed(t)) for t in range(4)], []
    for codec in ("bf16", "int8", "dynamic8"):
        for pieces in (1, 700, 10**6):
            monkeypatch.setattr(work, "_CODED_AT_ONCE", pieces)
            p = nn.Parameter(torch.zeros(shape))
            setting = Setting(method, {"rank": 7, "first_moment": codec, "second_moment": codec})
            optimizer = MemadviseOptimizer([("p", p)], setting, lr=LR)
            for g in grads:
                p.grad = g
                optimizer.step()
            results.append((p.detach(), optimizer.state_dict()["state"][0]))
        for weights, state in results[-2:]:
            assert torch.equal(weights, results[-3][0])
            assert all(torch.equal(state[name], value) for name, value in results[-3][1].items())


def test_a_step_with_coded_factors_stays_within_its_scratch() -> None:
    from test_executors import transient_bytes

    for method in ("apollo", "galore"):
        for shape in ((2048, 512), (512, 2048)):
            p = nn.Parameter(torch.zeros(shape))
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            setting = Setting(method, {"rank": 128, **CODED, **({"update_every": 1} if method == "galore" else {})})
            optimizer = MemadviseOptimizer([("p", p)], setting, lr=LR)
            optimizer.step()
            (record,) = optimizer.memory()
            measured = transient_bytes(optimizer)
            assert measured <= record.scratch_bytes + 4096
            assert record.scratch_bytes < 3 * measured


# ---------------------------------------------------------------- shapes and options


def test_a_stack_is_its_matrices_and_a_convolution_one() -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, 8, 5, generator=generator, dtype=torch.float64) for _ in range(5)]
    updates, _ = follow(APOLLO, grads, rank=2)
    for e in range(3):
        alone, _ = follow(APOLLO, [g[e] for g in grads], rank=2)
        for u, v in zip(updates, alone, strict=True):
            torch.testing.assert_close(u[e], v, rtol=1e-12, atol=1e-15)
    updates, _ = follow(APOLLO, [g.reshape(3, 2, 4, 5) for g in grads], rank=2)
    flat, _ = follow(APOLLO, [g.reshape(3, 40) for g in grads], rank=2)
    for u, v in zip(updates, flat, strict=True):
        torch.testing.assert_close(u.reshape(3, 40), v, rtol=1e-12, atol=1e-15)


def test_a_silent_channel_does_not_move() -> None:
    grads = stream((24, 10), 3)
    for g in grads[1:]:
        g[5] = 0
    updates, _ = follow(APOLLO, grads, rank=4, eps=1e-8)
    assert (updates[0][5] != 0).all()
    assert (updates[2][5] == 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank should be"),
        ({"rank": True}, "rank should be"),
        ({"rank": 11}, r"p: rank 11 is above the smaller side of a matrix of 24 x 10"),
        ({"scaling": "row"}, "scaling 'row' is none of channel, tensor"),
        ({"scale": 0}, "scale should be"),
        ({"projection": "svd"}, "projection 'svd' is none of gaussian, sketch"),
        ({"update_every": 0}, "update_every should be"),
        ({"limiter": 0.9}, "limiter should be"),
        ({"limiter_floor": 1.0}, "limiter_floor should be"),
        ({"limiter_on": "both"}, "limiter_on 'both' is none of"),
        ({"limiter_on": "corrected", "compat": "official"}, "official limiter is on raw norms"),
        ({"limiter": None, "limiter_floor": 1e-3}, "limiter_floor would do nothing: there is no limiter"),
        ({"limiter": None, "limiter_on": "corrected"}, "limiter_on would do nothing"),
        ({"limiter_floor": 0.0, "compat": "official"}, "limiter_floor would do nothing: the official limiter"),
        ({"compat": "paper"}, "compat should be official"),
        ({"cautious": True}, "cautious would do nothing"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptimizerError, match=words):
        validate(Setting("apollo", options), (24, 10), name="p")


def test_vectors_are_refused_by_name_and_left_to_adamw_in_a_whole_model() -> None:
    with pytest.raises(OptimizerError, match=r"p: apollo projects matrices, not a tensor of shape \[7\]"):
        validate(Setting("apollo"), (7,), name="p")
    layer = nn.Linear(12, 8)
    assert [m.setting for m in APOLLO(layer.named_parameters(), rank=2).memory()] == ["apollo(rank=2)", "adamw"]
    head = nn.Linear(12, 1)
    assert [m.state_bytes for m in APOLLO(head.named_parameters(), rank=2).memory()] == [4 + 8 * 12, 4 + 8]


def test_no_limiter_is_an_option_of_the_class_too() -> None:
    (record,) = APOLLO([("p", nn.Parameter(torch.zeros(24, 10)))], rank=4, limiter=None).memory()
    assert (record.setting, record.state_bytes) == ("apollo(limiter=None, rank=4)", 4 + 8 * 24 * 4)
