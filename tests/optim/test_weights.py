"""How new weights are written back: nothing is lost on average, and nothing moves that was not moved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from toy import Toy, optimizer_for, same, train, weights

from memadvise.errors import OptimizerError
from memadvise.optim import engine, noise
from memadvise.optim.codecs.bf16 import to_bfloat16
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.weights_ecc import join, split
from memadvise.plan.schema import Setting

DRAWS = 200_000
NARROW = [torch.bfloat16, torch.float16]
MANTISSA = {torch.bfloat16: 7, torch.float16: 10}
SMALLEST = {torch.bfloat16: -126, torch.float16: -14}  # exponent of the normal numbers

every_narrow = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
both_bits = pytest.mark.parametrize("held", [torch.int8, torch.int16], ids=["ecc8", "ecc16"])


def uniform(count: int, *key: int | str) -> Tensor:
    return noise.uniform(noise.key_of(*key), 0, count, "cpu")


def ulp_of(p: Tensor) -> Tensor:
    """The unit in the last place of (finite) parameters; float64."""
    exponent = torch.frexp(p.double())[1] - 1
    return 2.0 ** (exponent.clamp(min=SMALLEST[p.dtype]).double() - MANTISSA[p.dtype])


def halves(w: Tensor, dtype: torch.dtype, held: torch.dtype, noisy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    p, correction = torch.empty_like(w, dtype=dtype), torch.empty_like(w, dtype=held)
    split(w, p, correction, noisy)
    return p, correction


def many(dtype: torch.dtype, count: int = DRAWS) -> Tensor:
    """Weights of every size that ``dtype`` has, subnormal ones too."""
    generator = torch.Generator().manual_seed(0)
    low, high = (-44, 38) if dtype == torch.bfloat16 else (-9, 4.7)
    exponent = torch.rand(count, generator=generator, dtype=torch.float64) * (high - low) + low
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return (sign * 10**exponent).float()


# ---------------------------------------------------------------- a weight and its correction


@every_narrow
def test_golden_ecc8_round_trip_bound(dtype: torch.dtype) -> None:
    w = many(dtype)
    p, correction = halves(w, dtype, torch.int8)
    error = (join(p, correction).double() - w.double()).abs()
    normal = w.abs() >= 2.0 ** SMALLEST[dtype]
    assert (error <= ulp_of(p) / 508)[normal].all()
    assert (error <= ulp_of(p) / (508 if dtype == torch.bfloat16 else 496)).all()
    assert (error[normal] / w[normal].double().abs()).max() <= (1.6e-5 if dtype == torch.bfloat16 else 2e-6)
    assert ((w.double() - p.double()).abs() <= ulp_of(p) / 2 * (1 + 1 / 240)).all()
    assert error.max() > 0


def test_golden_ecc16_is_float32_to_the_bit() -> None:
    w = many(torch.bfloat16)
    assert torch.equal(join(*halves(w, torch.bfloat16, torch.int16)).view(torch.int32), w.view(torch.int32))
    w = many(torch.float16)
    back, normal = join(*halves(w, torch.float16, torch.int16)), w.abs() >= 2.0**-14
    assert torch.equal(back[normal], w[normal])
    assert (back - w).abs()[~normal].max() <= 2.0**-38


@every_narrow
@both_bits
def test_golden_exact_weights_have_no_correction(dtype: torch.dtype, held: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = patterns[patterns.isfinite()]
    for noisy in (None, uniform(len(exact), "x"), torch.full((len(exact),), 1 - 2.0**-24)):
        p, correction = halves(exact.float(), dtype, held, noisy)
        assert torch.equal(p.view(torch.int16), exact.view(torch.int16))
        assert not correction.any()


@every_narrow
@both_bits
def test_golden_joining_then_splitting_gives_every_correction_again(dtype: torch.dtype, held: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(1, 2**15, (2000, 1), generator=generator).to(torch.int16).view(dtype)
    patterns = patterns[patterns.isfinite()].view(-1, 1)
    patterns = torch.cat([patterns, -patterns])
    most = 128 if held == torch.int8 else 2**15 if dtype == torch.bfloat16 else 2**12
    codes = torch.arange(-most, most, max(most // 128, 1)).to(held)
    p = patterns.expand(-1, len(codes)).contiguous()
    correction = codes.expand(len(patterns), -1).contiguous()
    w = join(p, correction)
    assert w.isfinite().all()
    for noisy in (None, uniform(w.numel(), "y").view(w.shape)):
        again, corrected = halves(w, dtype, held, noisy)
        assert torch.equal(again.view(torch.int16), p.view(torch.int16))
        assert torch.equal(corrected, correction)


@every_narrow
@pytest.mark.parametrize("value", [0.7, -0.7, 1.00001, 3e-6, -2.1e-7, 60000.7])
def test_rounding_the_correction_is_unbiased_and_sign_symmetric(dtype: torch.dtype, value: float) -> None:
    w, noisy = torch.full((DRAWS,), value), uniform(DRAWS, str(value))
    seen = join(*halves(w, dtype, torch.int8, noisy)).double()
    low, high = seen.min(), seen.max()
    assert low <= w[0] <= high
    assert len(seen.unique()) <= 2
    assert abs(seen.mean() - w[0].double()) <= 5 * (high - low) / 2 / math.sqrt(DRAWS) + abs(value) * 1e-7 + 2**-38
    assert torch.equal(join(*halves(-w, dtype, torch.int8, noisy)).double(), -seen)


def test_rounding_a_subnormal_correction_is_unbiased() -> None:
    w = torch.full((DRAWS,), 1.2345e-40)
    seen = join(*halves(w, torch.bfloat16, torch.int8, uniform(DRAWS, "s"))).double()
    assert len(seen.unique()) == 2
    assert abs(seen.mean() - w[0].double()) < 5 * (seen.max() - seen.min()) / 2 / math.sqrt(DRAWS)


@every_narrow
@both_bits
def test_inf_nan_and_overflow_are_as_without_a_correction(dtype: torch.dtype, held: torch.dtype) -> None:
    largest = torch.finfo(torch.float32).max
    hidden = torch.tensor([0x7F800001, -1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # NaN in the low bits
    w = torch.cat([torch.tensor([math.inf, -math.inf, math.nan, largest, -largest]), hidden])
    for noisy in (None, torch.full((len(w),), 1 - 2.0**-24)):
        p, correction = halves(w, dtype, held, noisy)
        assert torch.equal(p.isnan(), w.isnan())
        assert p[[0, 1, 3, 4]].tolist() == [math.inf, -math.inf, math.inf, -math.inf]
        assert not correction.any()
        back = join(p, correction)
        assert torch.equal(back.isnan(), w.isnan())
        assert back[[0, 1]].tolist() == [math.inf, -math.inf]


@every_narrow
@both_bits
def test_a_parameter_written_from_outside_keeps_at_most_half_of_its_last_place(
    dtype: torch.dtype, held: torch.dtype
) -> None:
    stale = torch.tensor([-128, -1, 0, 127] if held == torch.int8 else [-(2**12), -1, 0, 2**12 - 1]).to(held)
    for value in (0.0, -0.0, 1.0, -2.5, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal, math.inf):
        p = torch.full((4,), value, dtype=dtype)
        back = join(p, stale)
        if math.isinf(value):
            assert torch.equal(back, p.float())
            continue
        assert ((back.double() - p.double()).abs() <= ulp_of(p) / 2).all()


# ---------------------------------------------------------------- experiments of the published description


def walk(form: str, update: float, steps: int, count: int = 64) -> Tensor:
    """``count`` weights of 1.0 after so many updates."""
    p = torch.ones(count, dtype=torch.bfloat16)
    correction = torch.zeros(count, dtype=torch.int16 if form == "ecc16" else torch.int8)
    for step in range(steps):
        noisy = uniform(count, form, step)
        if form in ("nearest", "stochastic"):
            p = to_bfloat16(p.float() + update, noisy if form == "stochastic" else None)
        else:
            split(join(p, correction) + update, p, correction, noisy if form == "ecc8" else None)
    return join(p, correction)


def test_golden_1000_updates_of_minus_1e_4() -> None:
    assert (walk("nearest", -1e-4, 1000) == 1).all()
    assert walk("ecc8 to nearest", -1e-4, 1000).unique().item() == pytest.approx(0.893, abs=5e-4)
    wide = torch.tensor(1.0)
    for _ in range(1000):
        wide = wide - 1e-4
    assert walk("ecc16", -1e-4, 1000).unique().item() == wide.item() == pytest.approx(0.9, abs=2e-5)
    corrected, plain = walk("ecc8", -1e-4, 1000), walk("stochastic", -1e-4, 1000)
    assert corrected.mean().item() == pytest.approx(0.9, abs=2e-4)
    assert corrected.std() < 5e-4
    assert plain.mean().item() == pytest.approx(0.9, abs=5e-3)  # right on average as well, and far noisier
    assert 25 < plain.std() / corrected.std() < 150


def test_golden_updates_below_the_resolution_of_ecc8_arrive_on_average() -> None:
    assert (walk("ecc8 to nearest", 1e-5, 3000) == 1).all()
    corrected = walk("ecc8", 1e-5, 3000)
    assert corrected.mean().item() == pytest.approx(1.03, abs=3e-4)
    assert walk("ecc8", -1e-5, 1500).mean().item() == pytest.approx(0.985, abs=3e-4)
    assert corrected.std() < 1e-3


# ---------------------------------------------------------------- in the optimizer


@every_narrow
@pytest.mark.parametrize("form", ["ecc8", "ecc16"])
def test_golden_weights_do_not_move_with_a_learning_rate_of_zero(form: str, dtype: torch.dtype) -> None:
    model = Toy().to(dtype)
    optimizer = optimizer_for(model, Setting("adamw", {"weights": form}), 1e-2)
    train(model, optimizer, 5)
    before = [*weights(model), *(s["weight_correction"].clone() for s in optimizer.state.values())]
    assert any(s["weight_correction"].any() for s in optimizer.state.values())
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 20, first=5)
    assert same(before, [*weights(model), *(s["weight_correction"] for s in optimizer.state.values())])


@pytest.mark.parametrize("method", ["adamw", "lion", "slimadam"])
def test_bfloat16_with_ecc16_is_stepped_as_float32(method: str) -> None:
    start = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours = MemadviseOptimizer([("p", narrow)], Setting(method, {"weights": "ecc16"}), lr=1e-3, weight_decay=0.1)
    full = MemadviseOptimizer([("p", wide)], Setting(method), lr=1e-3, weight_decay=0.1, executor="eager")
    for step in range(30):
        narrow.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step)).bfloat16()
        wide.grad = narrow.grad.float()
        ours.step()
        full.step()
        assert torch.equal(join(narrow.detach(), ours.state[narrow]["weight_correction"]), wide.detach())
    assert not torch.equal(narrow.float(), wide)


@every_narrow
@pytest.mark.parametrize("form", ["ecc8", "ecc16"])
def test_the_correction_begins_as_zero_and_costs_its_bytes(form: str, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(33, 7, dtype=dtype))
    setting = Setting("sgd", {"momentum": 0, "weights": form})
    optimizer = MemadviseOptimizer([("p", p)], setting, lr=1e-4)
    (record,) = optimizer.memory()
    step = 4 if form == "ecc8" else 0  # random numbers depend on the step
    assert record.state_bytes == 33 * 7 * (1 if form == "ecc8" else 2) + step
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.state[p]["weight_correction"].dtype == (torch.int8 if form == "ecc8" else torch.int16)
    assert not optimizer.state[p]["weight_correction"].any()


@pytest.mark.parametrize("form", ["ecc8", "ecc16"])
def test_layout_in_memory_does_not_matter(form: str) -> None:
    results = []
    for change in (lambda p: p, lambda p: p.to(memory_format=torch.channels_last), lambda p: p.mT.contiguous().mT):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(change(torch.randn(8, 4, 3, 3, generator=generator).bfloat16()))
        optimizer = MemadviseOptimizer([("p", p)], Setting("lion", {"weights": form}), lr=1e-3, weight_decay=0.1)
        for _ in range(3):
            p.grad = torch.randn(8, 4, 3, 3, generator=generator).bfloat16()
            optimizer.step()
        results.append([p.detach(), optimizer.state[p]["weight_correction"]])
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_what_a_form_is_not_for_is_refused_with_a_sentence() -> None:
    for form in ("ecc8", "ecc16"):
        for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
            with pytest.raises(
                OptimizerError, match=rf"embed: weights: {form} corrects .*; {name} has nothing to corr"
            ):
                optimizer_for(Toy().to(dtype), Setting("adamw", {"weights": form}), 1e-3)
    with pytest.raises(OptimizerError, match="stochastic is for bfloat16 parameters, not float16"):
        optimizer_for(Toy().half(), Setting("adamw", {"weights": "stochastic"}), 1e-3)
    with pytest.raises(OptimizerError, match=r"weights 'ecc' is none of nearest, stochastic, ecc8, ecc16"):
        optimizer_for(Toy().bfloat16(), Setting("adamw", {"weights": "ecc"}), 1e-3)


@pytest.mark.parametrize("options", [{"weights": "ecc16"}, {"weights": "ecc8"}, {"first_moment": "int8"}], ids=str)
def test_tensor_subclasses_are_refused(options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_is_subclass" if hasattr(engine, "_is_subclass") else "is_subclass", lambda p: True)
    with pytest.raises(OptimizerError, match="cannot step yet"):
        optimizer_for(Toy().bfloat16(), Setting("adamw", options), 1e-3)
