"""A plan that changes in mid-run: which state becomes which, exactly, and what is refused with nothing touched."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import all_settings
from reference import adam
from torch import Tensor, nn
from toy import Toy, loss_of, optimizer_for, same, train, weights

from memadvise.errors import OptimizerError
from memadvise.optim import MemadviseOptimizer, create_optimizer
from memadvise.optim import convert as conversion
from memadvise.optim.codecs.table import CODECS
from memadvise.optim.convert import setting_of
from memadvise.optim.registry import canonical_key, list_methods, method_info
from memadvise.plan.schema import Plan, Rule, Setting

SHAPE = (8, 6)
MEANS = {
    "slimadam(axes=[1])": adam.over_axes(SHAPE, (1,)),
    "slimadam(axes=[0])": adam.over_axes(SHAPE, (0,)),
    "slimadam(axes=[0, 1])": adam.over_axes(SHAPE, (0, 1)),
    "adam_mini(partition=row)": adam.partition(SHAPE),
    "adam_mini(partition=column)": adam.partition(SHAPE, partition="column"),
    "adam_mini(partition=whole)": adam.partition(SHAPE, partition="whole"),
    "adam_mini(heads=4, partition=head)": adam.partition(SHAPE, partition="head", heads=4),
    "adam_mini(segments=[[0, 4, 2], [4, 8, 0]])": adam.partition(SHAPE, segments=((0, 4, 2), (4, 8, 0))),
    "adam_mini(axis=1, partition=row)": adam.partition(SHAPE, partition="row", axis=1),
}
every_mean = pytest.mark.parametrize("key", list(MEANS))
every_codec = pytest.mark.parametrize(
    ("moment", "codec"), [(moment, name) for name, codec in CODECS.items() for moment in codec.moments]
)
NAME = {"first": "exp_avg", "second": "exp_avg_sq"}


def gradient(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    scale = torch.logspace(-2, 1, SHAPE[0])[:, None]
    return (torch.randn(SHAPE, generator=generator) * scale).to(dtype)


def trained(key: str, steps: int = 4, first: int = 0, dtype: torch.dtype = torch.float32) -> MemadviseOptimizer:
    """An optimizer of one parameter "w" after some fixed gradients: the state does not depend on the weights."""
    p = nn.Parameter(torch.zeros(SHAPE, dtype=dtype))
    optimizer = MemadviseOptimizer([("w", p)], setting_of(key), lr=1e-2)
    feed(optimizer, steps, first)
    return optimizer


def feed(optimizer: MemadviseOptimizer, steps: int, first: int = 0) -> Tensor:
    (p,) = optimizer.param_groups[0]["params"]
    for number in range(first, first + steps):
        p.grad = gradient(number, p.dtype)
        optimizer.step()
    return p


def state_of(optimizer: MemadviseOptimizer) -> dict[str, Tensor]:
    return optimizer.state_dict()["state"][0]


def converted(optimizer: MemadviseOptimizer, key: str) -> MemadviseOptimizer:
    """What ``optimizer`` becomes under another setting, through a file."""
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    other = trained(key, 0, dtype=optimizer.param_groups[0]["params"][0].dtype)
    other.load_state_dict(torch.load(stream, weights_only=True), convert=True)
    return other


# ---------------------------------------------------------------- full -> mean -> full


@every_mean
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_full_to_mean_is_the_state_that_the_mean_would_have_had(key: str, dtype: torch.dtype) -> None:
    full = trained("adamw", dtype=dtype)
    got, expected = converted(full, key), trained(key, dtype=dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for name, value in state_of(expected).items():
        assert state_of(got)[name].dtype == value.dtype
        torch.testing.assert_close(state_of(got)[name], value, rtol=tolerance, atol=1e-12)
    v = state_of(full)["exp_avg_sq"].flatten().tolist()
    means = [sum(v[i] for i in block) / len(block) for block in MEANS[key]]
    torch.testing.assert_close(
        state_of(got)["exp_avg_sq"].flatten(),
        torch.tensor(means, dtype=state_of(got)["exp_avg_sq"].dtype),
        rtol=tolerance / 10,
        atol=0,
    )
    with torch.no_grad():
        expected.param_groups[0]["params"][0].zero_()  # weights that moved another way so far
    torch.testing.assert_close(
        feed(got, 3, first=4), feed(expected, 3, first=4), rtol=10 * tolerance, atol=tolerance / 10
    )


@every_mean
def test_mean_to_full_gives_every_element_the_value_of_its_block(key: str) -> None:
    mean = trained(key)
    full = converted(mean, "adamw")
    assert torch.equal(state_of(full)["exp_avg"], state_of(mean)["exp_avg"])
    assert state_of(full)["step"] == 4
    values, wide = state_of(mean)["exp_avg_sq"].flatten(), state_of(full)["exp_avg_sq"].flatten()
    for number, block in enumerate(MEANS[key]):
        assert wide[block].tolist() == [values[number].item()] * len(block)
    again = converted(full, key)
    for name, value in state_of(mean).items():
        torch.testing.assert_close(state_of(again)[name], value, rtol=1e-7, atol=0)
    assert feed(full, 2, first=4).isfinite().all()


def test_the_same_blocks_under_another_name_change_nothing() -> None:
    for one, other in (
        ("slimadam(axes=[1])", "adam_mini(partition=row)"),
        ("adam_mini(partition=column)", "slimadam(axes=[0])"),
        ("adam_mini(partition=whole)", "slimadam(axes=[0, 1])"),
    ):
        before = trained(one)
        after = converted(before, other)
        assert all(torch.equal(value, state_of(after)[name]) for name, value in state_of(before).items())


def test_torchs_own_adamw_becomes_any_of_them() -> None:
    model = Toy()
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    train(model, theirs, 3)
    twin = copy.deepcopy(model)
    ours = optimizer_for(twin, Setting("slimadam", {"axes": [1]}), lr=1.0)
    with pytest.raises(OptimizerError, match=r"not the state of embed.*") as caught:
        ours.load_state_dict(theirs.state_dict())
    assert "convert=True) convert it: its second moment is averaged over blocks, exactly" in str(caught.value)
    ours.load_state_dict(theirs.state_dict(), convert=True)
    assert ours.param_groups[0]["lr"] == 1e-2
    v = theirs.state[model.query]["exp_avg_sq"].mean(1, keepdim=True)
    torch.testing.assert_close(ours.state[twin.query]["exp_avg_sq"], v)
    assert torch.equal(ours.state[twin.bias]["exp_avg_sq"], theirs.state[model.bias]["exp_avg_sq"])  # vectors stay
    train(twin, ours, 3, first=3)
    amsgrad = torch.optim.AdamW(model.parameters(), amsgrad=True)
    train(model, amsgrad, 1)
    with pytest.raises(OptimizerError, match="not the state of embed: it holds exp_avg, exp_avg_sq, max_exp_avg_sq"):
        ours.load_state_dict(amsgrad.state_dict(), convert=True)


# ---------------------------------------------------------------- codecs


@every_codec
def test_a_moment_goes_to_fewer_bits_and_back(moment: str, codec: str) -> None:
    full = trained("adamw")
    coded = converted(full, f"adamw({moment}_moment={codec})")
    other = NAME["second" if moment == "first" else "first"]
    assert torch.equal(state_of(coded)[other], state_of(full)[other])
    wanted = trained(f"adamw({moment}_moment={codec})")
    assert {n: (v.shape, v.dtype) for n, v in state_of(coded).items()} == {
        n: (v.shape, v.dtype) for n, v in state_of(wanted).items()
    }
    back = converted(coded, "adamw")
    value, original = state_of(back)[NAME[moment]], state_of(full)[NAME[moment]]
    assert value.shape == original.shape
    blocks = original.abs().amax(1, keepdim=True) if codec == "bf16" else original.abs().max()
    assert ((value - original).abs() <= (0.15 if codec == "int4" else 0.02) * blocks).all()
    again = converted(back, f"adamw({moment}_moment={codec})")  # what has a code keeps it
    assert all(torch.equal(v, state_of(again)[n]) for n, v in state_of(coded).items())
    assert feed(coded, 2, first=4).isfinite().all()


def test_bfloat16_is_rounded_to_nearest() -> None:
    full = trained("adamw")
    coded = converted(full, "adamw(first_moment=bf16, second_moment=bf16)")
    for name in NAME.values():
        assert torch.equal(state_of(coded)[name].flatten(), state_of(full)[name].to(torch.bfloat16).flatten())


def test_codecs_and_means_at_once() -> None:
    full = trained("adamw")
    small = converted(full, "slimadam(axes=[1], first_moment=int8)")
    apart = converted(converted(full, "slimadam(axes=[1])"), "slimadam(axes=[1], first_moment=int8)")
    assert all(torch.equal(value, state_of(apart)[name]) for name, value in state_of(small).items())
    mean = state_of(full)["exp_avg_sq"].mean(1, keepdim=True)
    torch.testing.assert_close(state_of(small)["exp_avg_sq"], mean, rtol=1e-6, atol=0)
    recoded = converted(small, "adamw(first_moment=bf16, second_moment=int8)")
    torch.testing.assert_close(
        state_of(converted(recoded, "slimadam(axes=[1])"))["exp_avg_sq"], mean, rtol=0, atol=0.02 * mean.max().item()
    )


@pytest.mark.parametrize("key", ["lion", "sgd(momentum=0.9)"])
def test_other_methods_change_the_codec_of_their_own_moment(key: str) -> None:
    method, _, rest = key.partition("(")
    coded_key = f"{method}({rest.removesuffix(')')}{', ' if rest else ''}first_moment=bf16)"
    full = trained(key)
    coded = converted(full, coded_key)
    assert state_of(coded)["step"] == 0  # for the random numbers, which no float32 state needs
    (name,) = state_of(full)
    back = converted(coded, key)
    assert torch.equal(state_of(back)[name], state_of(full)[name].to(torch.bfloat16).float())
    assert list(state_of(back)) == [name]


@pytest.mark.parametrize(
    "change", ["cautious=support", "cautious_decay=True", "rounding=nearest", "weights=stochastic"]
)
def test_what_leaves_the_state_alone(change: str) -> None:
    before = trained("slimadam(axes=[1])", dtype=torch.bfloat16)
    after = converted(before, f"slimadam(axes=[1], {change})")
    assert all(torch.equal(value, state_of(after)[name]) for name, value in state_of(before).items())
    assert all(torch.equal(v, state_of(converted(after, "slimadam(axes=[1])"))[n]) for n, v in state_of(before).items())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("adafactor", "adafactor(step_size=relative, eps2=1e-2)"),
        ("adafactor(momentum=0.9)", "adafactor(beta2_decay=-0.7, clip=2.0, eps1=1e-20, momentum=0.5)"),
        ("came", "came(beta3=0.999, clip=2.0, correct_instability=True)"),
        ("micro_adam", "micro_adam(alpha=0.5, bias_correction=window)"),
        ("apollo(rank=2)", "apollo(limiter=1.05, limiter_floor=1e-3, rank=2, scale=2.0)"),
        ("apollo_mini", "apollo_mini(scale=64.0)"),
        ("galore(rank=2)", "galore(rank=2, scale=1.0)"),
        ("adapprox(rank=2, store=lowrank)", "adapprox(clip=2.0, power_iterations=3, rank=2, store=lowrank)"),
        ("lion", "lion(cautious=paper, seed=5)"),
        ("adamw(first_moment=int8)", "adamw(first_moment=int8, seed=5)"),
    ],
)
def test_options_that_change_no_state_convert_trivially(old: str, new: str) -> None:
    before = trained(old)
    with pytest.raises(OptimizerError, match="its state stays as it is"):
        trained(new, 0).load_state_dict(before.state_dict())
    after = converted(before, new)
    assert state_of(after).keys() == state_of(before).keys()
    assert all(torch.equal(value, state_of(after)[name]) for name, value in state_of(before).items())
    assert feed(after, 2, first=4).isfinite().all()


def test_the_lists_name_methods_and_options_that_exist() -> None:
    for method, options in conversion.FREE.items():
        assert options <= set(method_info(method).options), method
    assert set(list_methods()) >= conversion.SEEDLESS


# ---------------------------------------------------------------- a whole plan


def test_a_plan_that_changes_in_mid_run() -> None:
    first = Plan(rules=(Rule("**", "adamw"),))
    second = Plan(
        rules=(
            Rule("embed", "slimadam", {"axes": [1]}),
            Rule("conv", "adamw", {"first_moment": "int8"}),
            Rule("query", "adam_mini", {"partition": "head", "heads": 4}),
            Rule("**", "adamw"),
        )
    )
    model = Toy()
    optimizer = create_optimizer(model, first, lr=1e-2)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    smaller = create_optimizer(model, second, lr=5.0)
    with pytest.raises(OptimizerError, match="embed was trained with adamw, this optimizer uses slimadam") as caught:
        smaller.load_state_dict(saved)
    assert "load_state_dict(..., convert=True) convert it" in str(caught.value)
    assert len(smaller.state) == 0
    assert smaller.param_groups[0]["lr"] == 5.0
    smaller.load_state_dict(saved, convert=True)
    assert smaller.param_groups[0]["lr"] == 1e-2
    real = sum(v.numel() * v.itemsize for state in smaller.state.values() for v in state.values())
    assert real == sum(m.state_bytes for m in smaller.memory())
    loss = loss_of(model, 3).item()
    for _ in range(20):
        smaller.zero_grad()
        loss_of(model, 3).backward()
        smaller.step()
    assert loss_of(model, 3).item() < loss
    for index, state in before["state"].items():  # copies: training on leaves what was loaded
        assert all(torch.equal(value, saved["state"][index][name]) for name, value in state.items())
    largest = create_optimizer(model, first, lr=1e-2)
    largest.load_state_dict(smaller.state_dict(), convert=True)
    train(model, largest, 2)


def test_a_plan_whose_learning_rate_factors_change_in_mid_run() -> None:
    """Parameters in other groups are put by name; groups keep their rate for a factor of 1 and their schedule."""
    model = Toy()
    first = Plan(rules=(Rule("query", "adamw", lr_factor=10.0), Rule("**", "adamw")))
    second = Plan(rules=(Rule("embed", "slimadam", {"axes": [1]}, lr_factor=2.0), Rule("**", "adamw")))
    optimizer = create_optimizer(model, first, lr=1e-2, weight_decay=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    other = create_optimizer(model, second, lr=5.0)
    with pytest.raises(OptimizerError, match=r"the same parameters in other groups\n  hint: .*convert=True"):
        other.load_state_dict(saved)
    assert not other.state
    other.load_state_dict(saved, convert=True)
    named = {n: other.state[p] for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        old, new = optimizer.state[p], named[name]
        assert torch.equal(old["exp_avg"], new["exp_avg"])
        wanted = old["exp_avg_sq"].mean(1, keepdim=True) if name == "embed" else old["exp_avg_sq"]
        torch.testing.assert_close(new["exp_avg_sq"], wanted)
    assert [(g["lr"], g["initial_lr"], g["lr_factor"], g["weight_decay"]) for g in other.param_groups] == [
        (pytest.approx(1e-2), pytest.approx(2e-2), 2.0, 0.1),
        (pytest.approx(5e-3), pytest.approx(1e-2), 1.0, 0.1),
    ]
    train(model, other, 1)
    plain = create_optimizer(model, Plan(rules=(Rule("**", "adamw"),)), lr=5.0)
    plain.load_state_dict(saved, convert=True)
    assert plain.param_groups[0]["lr"] == pytest.approx(5e-3)
    assert "lr_factor" not in plain.param_groups[0]
    saved["param_groups"][0]["weight_decay"] = 0.2
    with pytest.raises(OptimizerError, match=r"which are one group now, had different weight_decay: 0\.\d and 0\.\d"):
        create_optimizer(model, Plan(rules=(Rule("**", "adamw"),)), lr=5.0).load_state_dict(saved, convert=True)


def test_convert_changes_nothing_where_nothing_has_to_change() -> None:
    model, twin = Toy(), Toy()
    one, two = (optimizer_for(m, Setting("slimadam", {"axes": [1]}), 1e-2) for m in (model, twin))
    train(model, one, 3)
    twin.load_state_dict(model.state_dict())
    two.load_state_dict(one.state_dict(), convert=True)
    train(model, one, 2, first=3)
    train(twin, two, 2, first=3)
    assert same(weights(model), weights(twin))


def test_parameters_without_state_have_nothing_to_convert() -> None:
    model = Toy()
    optimizer = optimizer_for(model, Setting("lion"), 1e-2)
    other = optimizer_for(Toy(), Setting("adamw"), 1e-2)
    with pytest.raises(OptimizerError, match="embed was trained with lion"):
        other.load_state_dict(optimizer.state_dict())
    other.load_state_dict(optimizer.state_dict(), convert=True)
    assert len(other.state) == 0


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("slimadam(axes=[1])", "slimadam(axes=[0])", "means over other blocks"),
        ("adam_mini(partition=row)", "adam_mini(partition=whole)", "means over other blocks"),  # nested, and still
        ("adam_mini(partition=row)", "adam_mini(heads=4, partition=head)", "means over other blocks"),
        ("adamw", "lion", "they keep other quantities"),
        ("lion", "adamw", "they keep other quantities"),
        ("sgd(momentum=0.9)", "lion", "they keep other quantities"),
        ("sgd(momentum=0.9)", "sgd(momentum=0.5)", "the options of sgd say what its state means"),
        ("adafactor", "adamw", "they keep other quantities"),
        ("adamw", "adafactor", "they keep other quantities"),
        ("apollo(rank=2)", "apollo(rank=2, seed=3)", "its random numbers had seed 0, and would have seed 3"),
        ("apollo(rank=2)", "apollo(projection=sketch, rank=2)", "the options of apollo say what its state means"),
        ("apollo(rank=2)", "apollo(rank=2, update_every=7)", "the options of apollo say"),
        ("apollo(rank=2)", "apollo(limiter_on=corrected, rank=2)", "the options of apollo say"),
        ("apollo(rank=2)", "apollo(limiter=None, rank=2)", "its state has another form"),
        ("apollo(rank=2)", "apollo(rank=3)", "the options of apollo say"),
        ("galore(rank=2)", "galore(rank=2, update_every=7)", "the options of galore say"),
        ("galore(rank=2)", "galore(rank=2, seed=3)", "its random numbers had seed 0"),
        ("adapprox(adam=True, rank=2)", "adapprox(rank=2)", "the options of adapprox say what its state means"),
        ("adafactor", "adafactor(momentum=0.9)", "its state has another form"),
        ("micro_adam(block=48, bucket=8)", "micro_adam(block=24, bucket=8)", "the options of micro_adam say"),
        ("adamw", "adamw(compat=official)", "only one of them follows the official code"),
    ],
)
def test_anything_else_is_refused_with_the_reason(old: str, new: str, reason: str) -> None:
    saved = trained(old).state_dict()
    target = trained(new, 2)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(OptimizerError) as caught:
        target.load_state_dict(saved, convert=True)
    assert caught.value.message.startswith(f"w was trained with {canonical_key(setting_of(old))}, this optimizer uses ")
    assert reason in caught.value.message
    assert caught.value.hint is not None
    assert "only adamw, slimadam and adam_mini convert to each other" in caught.value.hint
    after = target.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(value, after["state"][0][name]) for name, value in before["state"][0].items())
    with pytest.raises(OptimizerError, match="w was trained with") as caught:
        target.load_state_dict(saved)
    assert "convert" not in str(caught.value)


def test_one_parameter_that_cannot_be_converted_keeps_all_as_they_were() -> None:
    model = Toy()
    optimizer = create_optimizer(model, Plan(rules=(Rule("experts.w", "sgd"), Rule("**", "adamw"))), lr=1e-2)
    train(model, optimizer, 2)
    twin = Toy()
    target = create_optimizer(twin, Plan(rules=(Rule("embed", "slimadam", {"axes": [1]}), Rule("**", "adamw"))), lr=5.0)
    train(twin, target, 1)
    before, lr = copy.deepcopy(target.state_dict()), target.param_groups[0]["lr"]
    with pytest.raises(OptimizerError, match=r"^experts.w was trained with sgd.*they keep other quantities"):
        target.load_state_dict(optimizer.state_dict(), convert=True)
    assert target.param_groups[0]["lr"] == lr == 5.0
    for index, state in before["state"].items():
        assert all(torch.equal(value, target.state_dict()["state"][index][name]) for name, value in state.items())


def test_state_that_is_not_what_its_setting_says_is_refused() -> None:
    saved = trained("adamw").state_dict()
    saved["state"][0]["exp_avg_sq"] = torch.zeros(8, 1)
    with pytest.raises(OptimizerError, match=r"not the state of w: its exp_avg_sq has shape \[8, 1\], adamw needs"):
        trained("slimadam(axes=[1])", 0).load_state_dict(saved, convert=True)
    saved["memadvise"]["settings"][0] = "frobnicate(x=1)"
    with pytest.raises(OptimizerError, match=r"trained with frobnicate.*there is no method 'frobnicate'"):
        trained("slimadam(axes=[1])", 0).load_state_dict(saved, convert=True)


def test_corrections_of_weights_are_not_made_up() -> None:
    saved = trained("adamw(weights=ecc8)", dtype=torch.bfloat16).state_dict()
    for new in ("adamw", "adamw(weights=ecc16)"):
        with pytest.raises(OptimizerError, match="keep other corrections"):
            trained(new, 0, dtype=torch.bfloat16).load_state_dict(saved, convert=True)
    kept = trained("slimadam(axes=[1], weights=ecc8)", 0, dtype=torch.bfloat16)
    kept.load_state_dict(saved, convert=True)
    name = next(name for name in saved["state"][0] if name.startswith("weight_"))
    assert torch.equal(state_of(kept)[name], saved["state"][0][name])


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_sharded_parameters_are_not_converted(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    sharded = nn.Parameter(distribute_tensor(torch.zeros(SHAPE), mesh, [Shard(0)]))
    target = MemadviseOptimizer([("w", sharded)], Setting("slimadam", {"axes": [1]}), lr=1e-2)
    with pytest.raises(OptimizerError, match="it is a DTensor: convert the state before"):
        target.load_state_dict(trained("adamw").state_dict(), convert=True)


# ---------------------------------------------------------------- names of settings


@pytest.mark.parametrize("setting", [setting for _, setting in all_settings()], ids=lambda setting: setting.key)
def test_the_name_of_a_setting_says_all_of_it(setting: Setting) -> None:
    key = canonical_key(setting)
    assert canonical_key(setting_of(key)) == key
    assert canonical_key(setting_of(setting.key)) == key
