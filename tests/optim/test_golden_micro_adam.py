"""Golden checks of MicroAdam (arXiv 2405.15593), and what our mended 4-bit feedback promises beyond them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memadvise.errors import OptimizerError
from memadvise.optim import MicroAdam
from memadvise.optim.executors import chunked
from memadvise.optim.method import Context, Hyper
from memadvise.optim.methods import micro_adam
from memadvise.optim.methods.micro_adam import MicroAdamOptions, dequantize, quantize
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import state_bytes, state_specs
from memadvise.plan.schema import Setting

B1, B2 = 0.9, 0.999
DENSE = {"density": 1, "block": 64, "bucket": 64}


def noise(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(steps)]


def follow(p: Tensor, grads: list[Tensor], **arguments: Any) -> tuple[list[Tensor], MicroAdam]:
    """The parameter after each step, and the optimizer."""
    p = nn.Parameter(p.clone())
    optimizer = MicroAdam([("p", p)], **{"lr": 1e-3, **arguments})
    seen = []
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g) or g.isnan().any()  # never used as scratch
        seen.append(p.detach().clone())
    return seen, optimizer


def moves(count: int, grads: list[Tensor], **arguments: Any) -> list[Tensor]:
    """The update u of each step, from zero weights at lr 1, in float64."""
    p = torch.zeros(count, dtype=torch.float64)
    seen, _ = follow(p, [g.double() for g in grads], lr=1.0, **arguments)
    return [before - after for before, after in zip([p, *seen[:-1]], seen, strict=True)]


def state_of(optimizer: MemadviseOptimizer) -> dict[str, Tensor]:
    (state,) = optimizer.state.values()
    return state


# ---------------------------------------------------------------- the list of the research notes


@pytest.mark.parametrize(
    ("dtype", "values", "threshold"),
    [(torch.float64, "fp32", 9e-10), (torch.float32, "fp32", 4e-9), (torch.float32, "bf16", 3e-5)],
    ids=["float64, fp32 values", "two units of float32 at 0.02", "bf16 values"],
)
def test_1_everything_kept_within_the_window_is_adam(dtype: torch.dtype, values: str, threshold: float) -> None:
    grads = [g.to(dtype) for g in noise((64,), 40)]
    seen, optimizer = follow(torch.zeros(64, dtype=dtype), grads, window=40, values=values, **DENSE)
    p = nn.Parameter(torch.zeros(64, dtype=dtype))
    theirs = torch.optim.Adam([p], lr=1e-3, foreach=False)
    for g, ours in zip(grads, seen, strict=True):
        p.grad = g
        theirs.step()
        assert (ours - p.detach()).abs().max() < threshold
    assert p.detach().abs().max() > 1e-2
    assert not state_of(optimizer)["error"].any()  # nothing was left out


def test_2_nothing_is_lost_between_the_window_and_exact_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = torch.zeros(1), torch.zeros(1)
    monkeypatch.setattr(micro_adam, "quantize", lambda x, bucket: (x.clone(), *bounds))
    monkeypatch.setattr(micro_adam, "dequantize", lambda codes, *rest: codes.clone())
    options = MicroAdamOptions(window=3, density=0.1, block=64, bucket=64, values="fp32")
    count = 64 * 3 + 21
    specs = micro_adam.MicroAdam().spec((count,), options, torch.float32)
    state = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    state["error"] = torch.zeros(count)
    given_in_all, kept_in_all = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for step, g in enumerate(noise((count,), 40), start=1):
        ctx = Context(Hyper(1.0, B1, B2, 1e-8, 0.0), options, (count,), {}, step=step)
        _, new = micro_adam.MicroAdam().prepare(lambda *_, g=g: {"g": g}, state, ctx)
        state.update(new)
        row = (step - 1) % 3
        kept = state["indices"].shape[1]
        places = state["indices"][row] + micro_adam.starts(kept, options, g.device)
        assert len(set(places.tolist())) == kept == 3 * 7 + 3
        kept_in_all[places] += state["values"][row]
        given_in_all += g
        assert (kept_in_all + state["error"] - given_in_all).abs().max() < 4e-6
    assert state["error"].abs().max() > 0.5


def test_3_a_constant_gradient_ends_at_six_and_a_half_times_adam() -> None:
    def size(step: int, **options: Any) -> float:
        p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = MicroAdam([p], lr=1.0, eps=0.0, **options)
        for _ in range(min(step, 12)):  # the window is full of the same: only the step can change anything
            p.grad = torch.full_like(p, -0.75)
            optimizer.step()
        before = p.detach().clone()
        state_of(optimizer)["step"].fill_(step - 1)
        optimizer.step()
        return float((p - before).detach().max())

    for step in range(1, 11):
        assert size(step, **DENSE) == pytest.approx(1.0, abs=1e-9)
    assert size(100, **DENSE) == pytest.approx(2.01, abs=0.01)
    assert size(1000, **DENSE) == pytest.approx(5.19, abs=0.01)
    assert size(10_000, **DENSE) == pytest.approx(6.53, abs=0.01)
    for step in (1, 10, 11, 10_000):
        assert size(step, bias_correction="window", **DENSE) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("spike_at", [1, 3, 5000])
@pytest.mark.parametrize("size", [1e-3, -1.0, 1e3])
def test_4_one_spike_moves_its_coordinate_for_as_long_as_the_window(spike_at: int, size: float) -> None:
    p = nn.Parameter(torch.zeros(200, dtype=torch.float64))
    optimizer = MicroAdam([p], lr=0.5, eps=0.0)
    for step in range(max(spike_at - 20, 1), spike_at + 20):
        p.grad = torch.zeros_like(p)
        if step == spike_at:
            p.grad[77] = size
        if optimizer.state:
            state_of(optimizer)["step"].fill_(step - 1)
        elif step > 1:
            optimizer.step()  # makes the state
            state_of(optimizer)["step"].fill_(step - 1)
        before = p.detach().clone()
        optimizer.step()
        moved = (p.detach() != before).nonzero().flatten().tolist()
        assert moved == ([77] if spike_at <= step < spike_at + 10 else [])
    total = 0.0
    for r in range(10):
        m = (1 - B1) * B1**r / (1 - B1 ** (spike_at + r))
        total += m / math.sqrt((1 - B2) * B2**r / (1 - B2 ** (spike_at + r)))
    assert float(p.detach()[77]) == pytest.approx(-math.copysign(0.5 * total, size), rel=1e-9)
    if spike_at == 5000:
        assert total == pytest.approx(20.6, abs=0.1)


def test_5_support() -> None:
    count, kept = 2048 + 100, 2 * 11 + 1
    updates = moves(count, noise((count,), 15), eps=1e-30, block=1024, window=6)
    assert set(updates[0].tolist()) == {-1.0, 0.0, 1.0}
    for t, u in enumerate(updates, start=1):
        assert 0 < u.count_nonzero() <= min(t, 6) * kept
    assert updates[0].count_nonzero() == kept


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.data())
def test_6_quantizer(data: st.DataObject) -> None:
    count, bucket = data.draw(st.integers(0, 41)), data.draw(st.sampled_from([2, 8, 64]))
    number = st.floats(-1e6, 1e6, width=32)
    kind = data.draw(st.sampled_from(["any", "above", "below", "constant", "zero", "sparse"]))
    values = data.draw(st.lists(number, min_size=count, max_size=count))
    x = torch.tensor(values, dtype=data.draw(st.sampled_from([torch.float32, torch.float64])))
    if kind in ("above", "below"):
        x = (x.abs() + 1) * (1 if kind == "above" else -1)
    elif kind == "constant" and count:
        x = torch.full_like(x, float(x[0].to(torch.bfloat16)))
    elif kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "sparse":
        x[::3] = 0
    codes, low, high = quantize(x, bucket)
    assert (codes.shape, codes.dtype) == ((-(-count // 2),), torch.uint8)
    assert low.shape == high.shape == (-(-count // bucket),)
    back = dequantize(codes, low, high, count, bucket, x.dtype)
    step = (high.to(x.dtype) - low.to(x.dtype)).repeat_interleave(bucket)[:count] / 15
    small = torch.finfo(x.dtype).eps * x.abs()
    assert (low.to(x.dtype).repeat_interleave(bucket)[:count] <= x).all()
    assert (high.to(x.dtype).repeat_interleave(bucket)[:count] >= x).all()
    assert ((back - x).abs() <= step * (0.5 + 1e-6) + 4 * small).all()
    assert (back[x == 0] == 0).all()  # zero is a code
    if kind in ("constant", "zero"):
        assert torch.equal(back, x)
    # Two codes a byte: the even element in the high bits, the last low bits of an odd count empty.
    single = torch.stack([codes >> 4, codes & 15], 1).flatten()
    assert not single[count:].any()
    assert torch.equal((single[0::2] << 4) + single[1::2], codes)


def test_6_bounds_are_not_inside_and_the_bytes_are_as_written_down() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0, 1.0, -0.5])  # step 0.2, zero the code 5
    codes, low, high = quantize(x, 64)
    assert codes.tolist() == [0x05, 0xFA, 0x30]  # -0.5 is -2.5 steps: halves up
    assert (low.item(), high.item()) == (-1.0, 2.0)
    torch.testing.assert_close(dequantize(codes, low, high, 5, 64, x.dtype), torch.tensor([-1, 0, 2, 1, -0.4]))
    _, low, high = quantize(torch.tensor([1.001, -1.001, 1e-42, -1e-42]), 2)
    assert low.tolist() == [-1.0078125, pytest.approx(-(2.0**-133))]
    assert high.tolist() == [1.0078125, pytest.approx(2.0**-133)]


@pytest.mark.parametrize("block", [16384, 100])
@pytest.mark.parametrize("window", [10, 20])
@pytest.mark.parametrize("bucket", [64, 20])
def test_7_state_bytes(block: int, window: int, bucket: int) -> None:
    bucket = bucket if block % bucket == 0 else 64 if block == 16384 else 20
    for d in (1, 7, block - 1, block, block + 1, 10 * block + 3):
        full, rest = divmod(d, block)
        kept = full * (164 if block == 16384 else 1) + math.ceil(rest / 100)
        expected = 4 * window * kept + math.ceil(d / 2) + 4 * math.ceil(d / bucket)
        setting = Setting("micro_adam", {"block": block, "window": window, "bucket": bucket})
        assert state_bytes(setting, (d,)) == expected + 4
        p = nn.Parameter(torch.ones(d, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        optimizer = MicroAdam([p], **setting.options)
        optimizer.step()
        real = {name: t.numel() * t.itemsize for name, t in state_of(optimizer).items() if name != "step"}
        assert sum(real.values()) == expected


# ---------------------------------------------------------------- published numbers


def llama_2_7b() -> list[tuple[int, ...]]:
    block = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2
    return [(32000, 4096), *(32 * block), (4096,), (32000, 4096)]


def bytes_without_step(shapes: list[tuple[int, ...]], **options: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for shape in shapes:
        for name, spec in state_specs(Setting("micro_adam", options), shape).items():
            total[name] = total.get(name, 0) + spec.num_bytes
    del total["step"]
    return total


def test_published_memory_of_llama_2_7b() -> None:
    shapes = llama_2_7b()
    count = sum(math.prod(shape) for shape in shapes)
    assert count == 6_738_415_616
    for window, gib, each in ((10, 5.65, 0.90), (20, 8.16, 1.30)):
        scripts = sum(bytes_without_step(shapes, window=window, block=20_000, bucket=100_000).values())
        assert round(scripts / 2**30, 2) == gib
        assert scripts / count == pytest.approx(each, abs=5e-4)
        ours = bytes_without_step(shapes, window=window)
        bounds = ours.pop("low") + ours.pop("high")  # which the paper's formula leaves out
        assert round(sum(ours.values()) / 2**30, 2) == gib
        assert bounds == 4 * count // 64


def test_published_memory_of_resnets() -> None:
    for parameters, mib in ((11_689_512, 10.03), (25_557_032, 21.94)):
        one = sum(bytes_without_step([(parameters,)], block=20_000, bucket=100_000).values())
        assert one / 2**20 == pytest.approx(mib, abs=0.01)


# ---------------------------------------------------------------- boxes, shapes, dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.3, "bias_correction": "window"},
        {"cautious": True},
        {"bucket": 1024, "values": "fp32", "cautious_decay": True},
    ],
    ids=str,
)
def test_results_do_not_depend_on_the_boxes(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 256 * 21 + 37
    p, grads = noise((count,), 1, dtype, seed=1)[0], noise((count,), 5, dtype)
    arguments = {"window": 3, "density": 0.05, "block": 256, "bucket": 16, "weight_decay": 0.1, **options}
    if dtype == torch.bfloat16:
        arguments["weights"] = "stochastic"
    expected, eager = follow(p, grads, executor="eager", **arguments)
    for limit in (1, 600, 2048, 2**20):
        monkeypatch.setattr(chunked, "CPU_ELEMENTS", limit)
        seen, optimizer = follow(p, grads, executor="chunked", **arguments)
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
        for name, value in state_of(eager).items():
            assert torch.equal(state_of(optimizer)[name], value)


def test_a_parameter_of_any_shape_is_its_elements_in_order() -> None:
    grads = noise((6, 5, 7), 6)
    options = {"window": 2, "density": 0.1, "block": 32, "bucket": 8}
    flat, first = follow(torch.ones(210), [g.flatten() for g in grads], **options)
    seen, second = follow(torch.ones(6, 5, 7), grads, **options)
    assert torch.equal(flat[-1].view(6, 5, 7), seen[-1])
    assert all(torch.equal(value, state_of(second)[name]) for name, value in state_of(first).items())


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (), (1,)], ids=str)
def test_empty_parameters_and_scalars(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.ones(shape))
    optimizer = MicroAdam([p], lr=0.25, eps=0.0, weight_decay=0.0)
    for _ in range(2):
        p.grad = torch.full_like(p, 3.0)
        optimizer.step()
    assert torch.equal(p.detach(), torch.full(shape, 0.5))
    twin = MicroAdam([copy.deepcopy(p)], lr=0.25)
    twin.load_state_dict(optimizer.state_dict())
    assert state_of(twin)["indices"].shape == (10, math.prod(shape))


# ---------------------------------------------------------------- feedback, densification


@pytest.mark.parametrize(("bucket", "error"), [(100_000, 0.17), (64, 0.09)])
def test_the_feedback_loses_what_the_documentation_says(bucket: int, error: float) -> None:
    x = noise((200_000,), 1)[0]
    back = dequantize(*quantize(x, bucket), x.numel(), bucket, x.dtype)
    assert float((back - x).norm() / x.norm()) == pytest.approx(error, abs=0.01)


def test_what_was_selected_is_not_fed_back() -> None:
    (g,) = noise((512,), 1)
    _, optimizer = follow(torch.zeros(512), [g], density=0.1, block=512)
    state = state_of(optimizer)
    back = dequantize(state["error"], state["low"], state["high"], 512, 64, torch.float32)
    places = state["indices"][0].long()
    assert not back[places].any()
    largest = g.abs().topk(52).indices.sort().values
    assert torch.equal(places, largest)
    assert torch.equal(state["values"][0], g[largest].bfloat16())
    left = g.clone()
    left[largest] = 0
    assert (back - left).norm() < 0.12 * left.norm()


def test_what_waits_is_selected_in_the_end() -> None:
    g = torch.full((1000,), 1e-2)
    g[::10] = 1.0
    seen, _ = follow(torch.zeros(1000), [g] * 300, density=0.1, block=1000, bucket=2)
    assert (seen[-1] < 0).sum() > 800  # 100 large entries do not take all 100 places for ever


def test_densification_moves_what_waits_and_keeps_the_rest() -> None:
    (g,) = noise((512,), 1, torch.float64)
    (sparse,) = moves(512, [g])
    (dense,) = moves(512, [g], alpha=0.25)
    _, optimizer = follow(torch.zeros(512, dtype=torch.float64), [g])
    _, densified = follow(torch.zeros(512, dtype=torch.float64), [g], alpha=0.25)
    waiting, left = (
        dequantize(s["error"], s["low"], s["high"], 512, 64, g.dtype)
        for s in (state_of(optimizer), state_of(densified))
    )
    torch.testing.assert_close(dense - sparse, 0.25 * waiting, rtol=1e-12, atol=1e-12)
    assert (left - 0.75 * waiting).norm() < 0.05 * waiting.norm()
    assert torch.equal(left == 0, waiting == 0)


# ---------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_entry_that_is_not_finite_spoils_its_own_weight_only(bad: float) -> None:
    grads = noise((1000,), 15)
    clean, spoiled = [g.clone() for g in grads], [g.clone() for g in grads]
    clean[3][123] = 1e4  # selected first as well
    spoiled[3][123] = bad
    options = {"density": 0.02, "block": 250, "bucket": 50, "executor": "chunked"}
    expected, _ = follow(torch.zeros(1000), clean, **options)
    seen, optimizer = follow(torch.zeros(1000), spoiled, **options)
    others = torch.arange(1000) != 123
    for step, (a, b) in enumerate(zip(seen, expected, strict=True)):
        assert torch.equal(a[others], b[others])
        assert bool(a[123].isnan()) == (step >= 3)  # for good, as under torch's AdamW
    assert state_of(optimizer)["high"].isfinite().all()
    assert state_of(optimizer)["values"].isfinite().all()  # it has left the window


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_of_more_than_a_block_selects_the_rest_is_forgotten(bad: float, alpha: float) -> None:
    grads = noise((400,), 30)
    grads[3][100:110] = bad
    seen, optimizer = follow(torch.zeros(400), grads, density=0.02, block=100, bucket=20, alpha=alpha)
    spoiled = seen[-1].isnan().nonzero().flatten()
    assert len(spoiled) == 2
    assert ((spoiled >= 100) & (spoiled < 110)).all()
    assert all(value.isfinite().all() for value in state_of(optimizer).values())
    moved = (seen[-1][100:200] != seen[12][100:200]).sum()
    assert moved > 20  # the block goes on


def test_a_gradient_that_is_all_nan_is_visible_in_every_block() -> None:
    seen, optimizer = follow(torch.zeros(300), [torch.full((300,), math.nan)], block=100, bucket=10)
    assert [int(block.isnan().sum()) for block in seen[0].view(3, 100)] == [1, 1, 1]
    assert not state_of(optimizer)["error"].any()


# ---------------------------------------------------------------- what is refused; state in and out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window should be a number of steps"),
        ({"window": 2.0}, "window should be a number of steps"),
        ({"density": 0}, "density should be above 0 and at most 1"),
        ({"density": 1.5}, "density should be above 0 and at most 1"),
        ({"block": 40_000}, "block should be 1 to 32768 elements"),
        ({"bucket": 63}, "bucket should be an even number"),
        ({"bucket": 100_000}, "bucket 100000 and block 16384 do not divide one another"),
        ({"bias_correction": "none"}, "bias_correction should be one of paper, window"),
        ({"alpha": 1.0}, "alpha should be at least 0 and below 1"),
        ({"alpha": -2}, "alpha should be at least 0 and below 1"),
        ({"values": "int8"}, "values should be one of bf16, fp32"),
        ({"cautious": "paper"}, "cautious: paper is unsound with micro_adam: it averages over all coordinates"),
        ({"cautious": "official"}, "cautious: official is unsound with micro_adam"),
        ({"first_moment": "bf16"}, "micro_adam keeps no first moment here"),
        ({"second_moment": "bf16"}, "micro_adam keeps no second moment here"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptimizerError, match=words):
        MicroAdam([("p", nn.Parameter(torch.zeros(8, 8)))], **options)


def test_cautious_keeps_the_scale_of_what_moves() -> None:
    grads = noise((4000,), 12)
    plain = moves(4000, grads, window=5)
    masked = moves(4000, grads, window=5, cautious="support")
    agree = plain[-1].sign() * grads[-1].sign() > 0
    support = (plain[-1] != 0) & (grads[-1] != 0)
    assert 0 < agree.sum() < support.sum() < 400
    torch.testing.assert_close(
        masked[-1], torch.where(agree, plain[-1] * support.sum() / agree.sum(), 0.0), rtol=1e-6, atol=1e-12
    )


def test_the_ring_survives_a_bfloat16_model_and_a_cast_checkpoint_is_refused() -> None:
    p = nn.Parameter(torch.zeros(70_000, dtype=torch.bfloat16))
    optimizer = MicroAdam([("p", p)])
    for g in noise((70_000,), 3, torch.bfloat16):
        p.grad = g
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = MicroAdam([("p", nn.Parameter(p.detach().clone()))])
    other.load_state_dict(saved)
    assert all(torch.equal(value, state_of(other)[name]) for name, value in state_of(optimizer).items())
    assert state_of(other)["indices"].dtype == torch.int16
    assert (state_of(other)["indices"] % 256 > 0).any()  # such as a cast to bfloat16 would have rounded
    for name, words in (("indices", "its indices is bfloat16, .* needs int16"), ("error", "needs uint8")):
        cast = copy.deepcopy(saved)
        cast["state"][0][name] = cast["state"][0][name].to(torch.bfloat16)
        with pytest.raises(OptimizerError, match=words):
            other.load_state_dict(cast)
