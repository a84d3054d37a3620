"""Sound combinations of methods, moments in fewer bits, caution and forms of weights (algorithms_b.md 5.3, by number),
and the unsound ones, which are refused with the reason."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from toy import Toy, loss_of, same, train, weights

from memadvise.errors import OptimizerError
from memadvise.optim import AdamW, AdamW4bit, AdamW8bit
from memadvise.optim.executors import chunked
from memadvise.optim.methods.blockmean import update_bound
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.recipe import make_recipe
from memadvise.optim.registry import fitted, list_methods, parse_setting, problems_of, state_bytes
from memadvise.plan.schema import Setting

INT8 = {"first_moment": "int8", "second_moment": "int8"}
DYNAMIC8 = {"first_moment": "dynamic8", "second_moment": "dynamic8"}
INT4 = {"first_moment": "int4", "second_moment": "int4"}
BF16 = {"first_moment": "bf16", "second_moment": "bf16"}
FACTORED = {"step_size": "lr", "momentum": 0.9}

# name -> (method, options, learning rate); every entry fits every parameter of Toy once vectors fall back
SOUND: dict[str, tuple[str, dict[str, Any], float]] = {
    "1 adamw": ("adamw", {}, 1e-2),
    "1 adamw cautious": ("adamw", {"cautious": True, "cautious_decay": True}, 1e-2),
    "2 int8 x int8": ("adamw", INT8, 1e-2),
    "2 int8 x int8, nearest": ("adamw", {**INT8, "rounding": "nearest"}, 1e-2),
    "3 dynamic8 x dynamic8": ("adamw", DYNAMIC8, 1e-2),
    "4 int4 x int4": ("adamw", INT4, 1e-2),
    "full x int8": ("adamw", {"first_moment": "int8"}, 1e-2),
    "int4 x full": ("adamw", {"second_moment": "int4"}, 1e-2),
    "dynamic8 x int4, cautious": (
        "adamw",
        {"first_moment": "int4", "second_moment": "dynamic8", "cautious": True},
        1e-2,
    ),
    "5 lion int8": ("lion", {"first_moment": "int8"}, 6e-3),
    "5 lion int8, cautious": ("lion", {"first_moment": "int8", "cautious": True}, 6e-3),
    "sgd int4": ("sgd", {"momentum": 0.9, "first_moment": "int4"}, 3e-2),
    "6 factored x int8": ("adafactor", {**FACTORED, "first_moment": "int8"}, 1e-2),
    "7 row mean x int8": ("slimadam", {"axes": [1], "first_moment": "int8"}, 1e-2),
    "7 row mean x int8, cautious": ("slimadam", {"axes": [1], "first_moment": "int8", "cautious": True}, 1e-2),
    "8 row mean x int4": ("slimadam", {"axes": [1], "first_moment": "int4"}, 1e-2),
    "8 factored x int4": ("adafactor", {**FACTORED, "first_moment": "int4"}, 1e-2),
    "9 block mean x int8": ("adam_mini", {"partition": "row", "first_moment": "int8"}, 1e-2),
    "12 projected, 8 bits": ("apollo", {"rank": 2, **INT8}, 3e-2),
    "15 GaLore, 8 bits, cautious": ("galore", {"rank": 3, **INT8, "cautious": True}, 8e-2),
    "16 CAME x int8": ("came", {"correct_instability": True, "first_moment": "int8"}, 1e-2),
    "low rank x int8": ("adapprox", {"rank": 2, "first_moment": "int8"}, 1e-2),
    "RMSprop, 8 bits": ("rmsprop", {"store": "dense", "momentum": 0.9, **DYNAMIC8}, 2e-3),
    "Adagrad, 8 bits": ("adagrad", {"store": "dense", "second_moment": "int8"}, 6e-2),
    "18 bf16 x bf16": ("adamw", BF16, 1e-2),
}
SOUND = {name: entry for name, entry in SOUND.items() if entry[0] in list_methods()}
FORMS = [(torch.float32, "nearest"), (torch.bfloat16, "ecc8")]
ELEMENTWISE = [name for name, (method, _, _) in SOUND.items() if method in ("adamw", "lion", "sgd")]

every_composition = pytest.mark.parametrize("name", SOUND)
every_form = pytest.mark.parametrize(("dtype", "form"), FORMS, ids=["fp32", "bf16-ecc8"])


def setting_of(name: str, form: str = "nearest") -> tuple[Setting, float]:
    method, options, lr = SOUND[name]
    return Setting(method, {**options, **({} if form == "nearest" else {"weights": form})}), lr


def optimizer_of(model: nn.Module, name: str, form: str = "nearest", **arguments: Any) -> MemadviseOptimizer:
    """Element-wise methods hold vectors and the scalar in codes, too: their settings go by name."""
    setting, lr = setting_of(name, form)
    settings: Setting | Mapping[str, Setting] = setting
    if name in ELEMENTWISE:
        settings = {key: setting for key, _ in model.named_parameters()}
    arguments = {"lr": lr, "weight_decay": 0.1, **arguments}
    return MemadviseOptimizer(model.named_parameters(), settings, **arguments)


def state_of(optimizer: MemadviseOptimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def mean_loss(model: Toy) -> float:
    with torch.no_grad():
        return sum(loss_of(model, number).item() for number in range(4)) / 4


def train_in_turns(model: Toy, optimizer: MemadviseOptimizer, epochs: int) -> None:
    for _ in range(epochs):
        train(model, optimizer, 4)


# ---------------------------------------------------------------- sound


@pytest.fixture(scope="module")
def dense() -> dict[torch.dtype, tuple[float, float]]:
    """The loss before and after training with plain AdamW."""
    found = {}
    for dtype, _ in FORMS:
        model = Toy().to(dtype)
        before = mean_loss(model)
        train_in_turns(model, optimizer_of(model, "1 adamw", weight_decay=0.0), 8)
        found[dtype] = (before, mean_loss(model))
    return found


@every_form
@every_composition
def test_it_trains_and_costs_what_was_predicted(
    name: str, dtype: torch.dtype, form: str, dense: dict[torch.dtype, tuple[float, float]]
) -> None:
    model = Toy().to(dtype)
    optimizer = optimizer_of(model, name, form, weight_decay=0.0)
    predicted = [record.state_bytes for record in optimizer.memory()]
    for record, p in zip(optimizer.memory(), model.parameters(), strict=True):
        assert record.state_bytes == state_bytes(optimizer.settings()[record.name], tuple(p.shape), dtype)
    train_in_turns(model, optimizer, 8)
    real = [
        sum(value.numel() * value.itemsize for value in optimizer.state.get(p, {}).values()) for p in model.parameters()
    ]
    assert real == predicted
    assert all(value.isfinite().all() for value in [*weights(model), *state_of(optimizer)])
    before, after = dense[dtype]
    assert before - mean_loss(model) > 0.8 * (before - after)


@pytest.mark.parametrize(
    ("dtype", "form"), [*FORMS, (torch.bfloat16, "stochastic")],
    ids=["fp32", "bf16-ecc8", "bf16-stochastic"],
)  # fmt: skip
@every_composition
def test_saved_in_mid_run_it_goes_on_bit_for_bit(name: str, dtype: torch.dtype, form: str) -> None:
    model = Toy().to(dtype)
    optimizer = optimizer_of(model, name, form)
    train(model, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 2, first=2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Toy(seed=7).to(dtype)
    other.load_state_dict(saved["model"])
    resumed = optimizer_of(other, name, form, lr=123.0)
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, 2, first=2)
    assert same(weights(model), weights(other))
    assert same(state_of(optimizer), state_of(resumed))


SHAPES = [(24, 512), (7, 300), (1, 1500), (900, 2), (6, 8, 3, 3), (5, 3), (700,), ()]
BY_BOXES = [*ELEMENTWISE, *(name for name in SOUND if "row mean" in name)]  # boxes that depend on no other


@every_form
@every_composition
def test_eager_and_chunked_are_the_same_bit_for_bit(
    name: str, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in BY_BOXES:
        monkeypatch.setattr(chunked, "CPU_ELEMENTS", 1024 if name in ELEMENTWISE else 8192)  # rows whole
    setting, lr = setting_of(name, form)
    for shape in SHAPES:
        chosen = setting if name in ELEMENTWISE else fitted(setting, shape)
        parsed = parse_setting(chosen)
        if parsed.compose.plain or problems_of(chosen, shape, name="p"):
            continue  # alone, a method has another arithmetic in boxes, in place; test_executors compares them
        results = []
        for executor in ("eager", "chunked"):
            generator = torch.Generator().manual_seed(0)
            p = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            optimizer = MemadviseOptimizer([("p", p)], {"p": chosen}, lr=lr, weight_decay=0.1, executor=executor)
            for _ in range(3):
                p.grad = torch.randn(shape, generator=generator).to(dtype)
                optimizer.step()
            results.append([p.detach(), *state_of(optimizer)])
        assert same(*results), shape
        if name in BY_BOXES and shape == (24, 512):
            recipe = make_recipe(parsed.method, parsed.options, shape, dtype, parsed.compose)
            assert len(chunked._layout(recipe, chunked.CPU_ELEMENTS)[1].boxes) >= 3


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name.startswith(("2", "3", "4", "5", "18"))])
@pytest.mark.parametrize("executor", ["eager", "chunked"])
def test_a_step_mixes_no_devices_and_reads_nothing(name: str, executor: str) -> None:
    """On "meta" tensors, which mix with no others and cannot be read."""
    for dtype, form in [FORMS[1], (torch.float16, "ecc16")]:
        ps = {
            key: nn.Parameter(torch.empty(p.shape, device="meta", dtype=dtype)) for key, p in Toy().named_parameters()
        }
        setting, lr = setting_of(name, form)
        optimizer = MemadviseOptimizer(ps.items(), dict.fromkeys(ps, setting), lr=lr, executor=executor)
        for _ in range(2):
            for p in ps.values():
                p.grad = torch.empty_like(p)
            optimizer.step()
        for p in ps.values():
            assert {key: value.device.type for key, value in optimizer.state[p].items() if key != "step"}
            assert all(value.device.type == "meta" for key, value in optimizer.state[p].items() if key != "step")


@pytest.mark.parametrize("name", ["2 int8 x int8", "3 dynamic8 x dynamic8", "4 int4 x int4", "7 row mean x int8"])
@every_form
def test_a_step_allocates_no_more_than_its_scratch(name: str, dtype: torch.dtype, form: str) -> None:
    from test_executors import transient_bytes

    setting, lr = setting_of(name, form)
    for shape in ((2048, 1024), (1_000_000, 2)):
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = torch.ones_like(p)
        optimizer = MemadviseOptimizer([("p", p)], setting, lr=lr)
        optimizer.step()
        (record,) = optimizer.memory()
        measured = transient_bytes(optimizer)
        assert measured <= record.scratch_bytes + 4096
        assert record.scratch_bytes < 3 * measured
        assert measured < math.prod(shape) * 4


# ---------------------------------------------------------------- the published table


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("adamw", {}, 8),
        ("adamw", INT8, 2.125),
        ("adamw", DYNAMIC8, 2 + 8 / 256),
        ("adamw", INT4, 1 + 8 / 128),
        ("lion", {"first_moment": "int8"}, 1.0625),
        ("adafactor", {**FACTORED, "first_moment": "int8"}, 1.0625 + 8 / 4096),
        ("slimadam", {"axes": [1], "first_moment": "int8"}, 1.0625 + 4 / 4096),
        ("slimadam", {"axes": [1], "first_moment": "int4"}, 0.53125 + 4 / 4096),
        ("adam_mini", {"partition": "row", "first_moment": "int8"}, 1.0625 + 4 / 4096),
        ("apollo", {"rank": 256, **DYNAMIC8}, 0.125 + 8 / 4096),
        ("galore", {"rank": 1024, **DYNAMIC8}, 0.5 + 1 + 8 * 0.25 / 256),
        ("came", {"first_moment": "int8"}, 1.0625 + 16 / 4096),
        ("adamw", BF16, 4),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_golden_bytes_a_parameter_of_a_4096_matrix(method: str, options: dict[str, Any], expected: float) -> None:
    if method not in list_methods():
        return
    shape = (4096, 4096)
    found = state_bytes(Setting(method, options), shape)
    assert found / math.prod(shape) == pytest.approx(expected, abs=2e-6)
    corrected = state_bytes(Setting(method, {**options, "weights": "ecc8"}), shape, torch.bfloat16)
    assert corrected - found in (math.prod(shape), math.prod(shape) + 4)  # one byte a weight, and a step for lion


def test_a_plan_of_several_as_number_13() -> None:
    """Projected hidden matrices, 8-bit Adam on embeddings, full moments of vectors: one optimizer, resumed."""
    hidden = (
        Setting("apollo_mini", {}) if "apollo_mini" in list_methods() else Setting("adafactor", {"weights": "ecc8"})
    )
    settings = {
        "embed": Setting("adamw", {**DYNAMIC8, "weights": "ecc8"}),
        "query": hidden,
        "conv": Setting("slimadam", {"axes": [1, 2, 3], "first_moment": "int8", "cautious": True, "weights": "ecc16"}),
        "experts.w": Setting("lion", {"first_moment": "int4", "weights": "stochastic"}),
        "bias": Setting("adamw", {"weights": "ecc8"}),
        "gain": Setting("adamw", {"weights": "ecc16"}),
    }
    model = Toy().bfloat16()
    optimizer = MemadviseOptimizer(model.named_parameters(), settings, lr=3e-3, weight_decay=0.1)
    before = mean_loss(model)
    train_in_turns(model, optimizer, 5)
    assert mean_loss(model) < before
    other, resumed = copy.deepcopy((model, optimizer))
    fresh = MemadviseOptimizer(other.named_parameters(), settings, lr=1.0)
    fresh.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 3)
    train(other, fresh, 3)
    assert same(weights(model), weights(other))
    assert same(state_of(optimizer), state_of(fresh))
    assert resumed.settings() == settings


# ---------------------------------------------------------------- 8-bit and 4-bit Adam as classes


@pytest.mark.parametrize(("make", "codec"), [(AdamW8bit, "dynamic8"), (AdamW4bit, "int4")])
def test_adam_in_8_and_4_bits(make: type[AdamW], codec: str) -> None:
    model = Toy()
    optimizer = make(model.named_parameters(), lr=1e-2)
    for name, setting in optimizer.settings().items():
        coded = {} if name in ("bias", "gain") else {"first_moment": codec, "second_moment": codec}
        assert (setting.method, setting.options) == ("adamw", coded)
    train(model, optimizer, 2)
    assert {m.executor for m in optimizer.memory() if m.name in ("bias", "gain")} == {"fused"}
    own = make(Toy().parameters(), second_moment="full")
    assert own.settings()["parameter 0 of group 0"].options == {"first_moment": codec, "second_moment": "full"}
    with pytest.raises(OptimizerError, match="fused=True is not supported"):
        make(Toy().parameters(), fused=True)


@pytest.mark.parametrize("name", ["2 int8 x int8", "3 dynamic8 x dynamic8", "4 int4 x int4", "18 bf16 x bf16"])
def test_golden_the_first_update_is_adams(name: str) -> None:
    """State is encoded after it was used: the cosine of the first updates is 1."""
    moves = []
    for entry in (name, "1 adamw"):
        model = Toy()
        before = weights(model)
        train(model, optimizer_of(model, entry, weight_decay=0.0, executor="eager"), 1)
        moves.append(torch.cat([(a - b).flatten() for a, b in zip(weights(model), before, strict=True)]))
    assert torch.nn.functional.cosine_similarity(*moves, dim=0).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("second", ["full", "bf16", "int8", "dynamic8", "int4"])
@pytest.mark.parametrize("first", ["full", "bf16", "int8", "dynamic8", "int4"])
def test_golden_no_update_is_larger_than_any_gradients_could_make_it(first: str, second: str) -> None:
    """Gradients over four decades within a block, half of them zero (failure 4.7 (i)), for any pair of codecs."""
    setting = Setting("adamw", {"first_moment": first, "second_moment": second})
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** (-4 * torch.rand(4, 256, generator=generator))
    p = nn.Parameter(torch.zeros(4, 256))
    optimizer = MemadviseOptimizer([("p", p)], {"p": setting}, lr=1.0, eps=1e-12)
    worst = 0.0
    for _ in range(200):
        p.data.zero_()
        p.grad = scale * torch.randn(4, 256, generator=generator) * (torch.rand(4, 256, generator=generator) < 0.5)
        optimizer.step()
        worst = max(worst, p.abs().max().item())
    assert 0.9 < worst <= update_bound(0.9, 0.999) * (1 + 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("dtype", "form"), FORMS, ids=["fp32", "bf16-ecc8"])
def test_a_gradient_that_is_not_finite_passes_through(bad: float, dtype: torch.dtype, form: str) -> None:
    """As in torch the weight is NaN at once, and for ever; with coded moments those of its block are one step later."""
    setting = Setting("adamw", {**INT8, **({} if form == "nearest" else {"weights": form})})
    p = nn.Parameter(torch.ones(4, 64, dtype=dtype))
    optimizer = MemadviseOptimizer([("p", p)], {"p": setting}, lr=1e-2)
    p.grad = torch.ones_like(p)
    p.grad[1, 5] = bad
    optimizer.step()
    hit = torch.zeros(4, 64, dtype=torch.bool)
    hit[1, 5] = True
    assert torch.equal(p.isnan(), hit)
    p.grad = torch.ones_like(p)
    hit[1] = True
    for _ in range(3):
        optimizer.step()
        assert torch.equal(p.isnan(), hit)
        assert p[~hit].isfinite().all()


def test_golden_the_bounds_of_updates() -> None:
    for betas, bound in {(0.9, 0.999): 7.270, (0.9, 0.99): 2.345, (0.95, 0.98): 1.257, (0.9, 0.95): 1.165}.items():
        assert update_bound(*betas) == pytest.approx(bound, abs=6e-4)
    assert update_bound(0.95, 0.9) == math.inf


# ---------------------------------------------------------------- unsound


UNSOUND: list[tuple[str, dict[str, Any], tuple[int, ...], str]] = [
    ("sgd", {"momentum": 0, "cautious": True}, (8, 8), "cautious would do nothing"),
    ("sgd", {"momentum": 0, "first_moment": "int8"}, (8, 8), "sgd keeps no first moment here that int8 could shrink"),
    ("lion", {"second_moment": "int8"}, (8, 8), "lion keeps no second moment here"),
    ("slimadam", {"axes": [1], "second_moment": "int4"}, (8, 8), "slimadam keeps no second moment here"),
    ("adam_mini", {"second_moment": "dynamic8"}, (8, 8), "adam_mini keeps no second moment here"),
    ("adafactor", {"first_moment": "int8"}, (8, 8), "adafactor keeps no first moment here"),
    ("adafactor", {"cautious": True}, (8, 8), "cautious would do nothing"),
    ("adafactor", {**FACTORED, "second_moment": "int8"}, (8, 8), "adafactor keeps no second moment here"),
    ("rmsprop", {"cautious": True}, (8, 8), "cautious would do nothing"),
    ("adagrad", {"cautious": True}, (8, 8), "cautious would do nothing"),
    ("micro_adam", {"first_moment": "int8"}, (8, 8), "micro_adam keeps no first moment here"),
    ("micro_adam", {"cautious": "paper"}, (8, 8), "unsound with micro_adam"),
    ("apollo", {"cautious": True}, (8, 8), "cautious would do nothing"),
    ("apollo_mini", {"cautious": True}, (8, 8), "cautious would do nothing"),
    ("adamw", {"second_moment": "bf16", "rounding": "nearest"}, (8, 8), "freezes: with beta2 = 0.999"),
    ("adamw", {"first_moment": "int3"}, (8, 8), "first_moment 'int3' is none of full, bf16, int8, dynamic8, int4"),
    ("adamw", {"rounding": "up"}, (8, 8), "rounding 'up' is none of stochastic, nearest"),
    ("adamw", {"weights": "stochastic+ecc8"}, (8, 8), "is none of nearest, stochastic, ecc8, ecc16"),
    ("lion", {"limiter": 1.01}, (8, 8), "lion has no option 'limiter'"),
]


@pytest.mark.parametrize(("method", "options", "shape", "words"), UNSOUND, ids=lambda x: str(x))
def test_the_unsound_is_refused_with_the_reason(
    method: str, options: dict[str, Any], shape: tuple[int, ...], words: str
) -> None:
    if method not in list_methods():
        return
    problems = problems_of(Setting(method, options), shape, name="layer.weight")
    assert any(words in str(problem) for problem in problems), problems
    with pytest.raises(OptimizerError):
        MemadviseOptimizer([("layer.weight", nn.Parameter(torch.zeros(shape)))], Setting(method, options), lr=1e-3)


def test_four_bits_without_zero_are_sound_in_a_second_moment() -> None:
    assert not problems_of(Setting("adamw", {"second_moment": "int4"}), (8, 8), name="p")
    assert not problems_of(Setting("adamw", {"first_moment": "bf16", "rounding": "nearest"}), (8, 8), name="p")
