"""What every method must do inside training code: the ten traps of integrations, and what frameworks rely on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case, all_cases, every_dtype, every_setting
from torch import nn
from toy import Toy, batch, loss_of, optimizer_for, same, train, weights

from memadvise.errors import OptimizerError
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import METHODS, list_methods, method_info
from memadvise.plan.schema import Setting


def test_every_method_has_a_case_and_a_class() -> None:
    cases = {case.method: case for case in all_cases()}
    assert sorted(cases) == sorted(list_methods())
    for info in METHODS:
        case = cases[info.name]
        options = {f.name for f in dataclasses.fields(info.method.options_type)}
        assert options == set(info.options)
        assert options <= set(inspect.signature(case.make.__init__).parameters)
        optimizer = case.make(Toy().parameters())
        assert optimizer.defaults["lr"] == info.method.default_lr
        assert optimizer.defaults["betas"] == info.method.default_betas
        assert optimizer.defaults["weight_decay"] == info.method.default_weight_decay
        assert {s.method for s in case.settings} == {case.method}


# ---------------------------------------------------------------- construction and groups


@every_setting
def test_three_ways_to_construct_give_the_same_weights(case: Case, setting: Setting) -> None:
    def run(params: Any) -> list[torch.Tensor]:
        optimizer = case.make(params, lr=case.lr, weight_decay=0.1, **setting.options)
        train(model, optimizer, 3)
        return weights(model)

    model = Toy()
    by_name = run(model.named_parameters())
    model = Toy()
    named = list(model.named_parameters())
    assert same(by_name, run([{"params": named[:2]}, {"params": named[2:]}]))
    model = Toy()
    plain = run(model.parameters())
    if case.random(setting.options):  # nameless parameters are told apart by their number
        model = Toy()
        assert same(plain, run(model.parameters()))
    else:
        assert same(plain, by_name)


@every_setting
def test_groups_keep_number_order_and_extra_keys(case: Case, setting: Setting) -> None:
    model = Toy()
    named = list(model.named_parameters())
    groups = [{"params": named[3:], "weight_decay": 0.0, "tag": "b"}, {"params": named[:3], "lr": 0.5}]
    optimizer = MemadviseOptimizer(groups, setting, lr=case.lr, weight_decay=0.1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(named) - 3, 3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1]
    assert [g["lr"] for g in optimizer.param_groups] == [case.lr, 0.5]
    assert optimizer.param_groups[0]["tag"] == "b"
    assert optimizer.param_groups[1]["param_names"] == [name for name, _ in named[:3]]
    train(model, optimizer, 2)
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(named) - 3, 3]


@every_setting
def test_unknown_arguments_and_mixed_names_are_refused(case: Case, setting: Setting) -> None:
    model = Toy()
    with pytest.raises(TypeError):
        case.make(model.parameters(), lr=case.lr, amsgrad=True, **setting.options)
    with pytest.raises(ValueError, match="with/without names"):
        MemadviseOptimizer([{"params": [("a", model.embed)]}, {"params": [model.query]}], setting, lr=case.lr)
    with pytest.raises(OptimizerError, match="twice"):
        case.make([model.embed, model.embed], **setting.options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": -1.0}, "lr should be"),
        ({"lr": "x"}, "lr should be"),
        ({"lr": torch.ones(2)}, "one element"),
        ({"lr": 1.0, "betas": (0.9, 1.0)}, "betas should be"),
        ({"lr": 1.0, "betas": (0.9,)}, "betas should be"),
        ({"lr": 1.0, "eps": -1e-8}, "eps should be"),
        ({"lr": 1.0, "weight_decay": -0.1}, "weight_decay should be"),
        ({"lr": 1.0, "executor": "quick"}, "no executor 'quick'"),
    ],
)
def test_hyper_parameters_out_of_range(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(OptimizerError, match=words):
        MemadviseOptimizer(Toy().parameters(), Setting("adamw"), **arguments)


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.method)
def test_foreach_and_fused_flags(case: Case) -> None:
    case.make(Toy().parameters(), foreach=None, fused=None)
    case.make(Toy().parameters(), foreach=False, fused=False)
    with pytest.raises(ValueError, match="chunked"):
        case.make(Toy().parameters(), foreach=True)
    if case.fused:
        assert {m.executor for m in case.make(Toy().parameters(), fused=True).memory()} == {"fused"}
        assert {m.executor for m in case.make(Toy().parameters(), fused=False).memory()} == {"chunked"}
    else:
        with pytest.raises(ValueError, match="chunked"):
            case.make(Toy().parameters(), fused=True)


def test_a_group_may_have_another_method() -> None:
    """The way to leave embedding tables to AdamW in the plain classes of APOLLO and GaLore."""
    from memadvise.optim import APOLLO

    model, twin = Toy(), Toy()
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if n != "embed"]},
        {"params": [("embed", model.embed)], "method": "adamw", "lr": 1e-3},
    ]
    optimizer = APOLLO(groups, rank=2, cautious_decay=True)
    assert optimizer.settings()["embed"].key == "adamw(cautious_decay=True)"
    assert optimizer.settings()["query"].key == "apollo(cautious_decay=True, rank=2)"
    assert optimizer.param_groups[1]["lr"] == 1e-3
    assert "method" not in optimizer.param_groups[1]
    settings = optimizer.settings()
    rates = {"embed": 1e-3}
    others = [{"params": [(n, p)], "lr": rates.get(n, 1e-2)} for n, p in twin.named_parameters()]
    train(model, optimizer, 3)
    train(twin, MemadviseOptimizer(others, settings, lr=1e-2, eps=1e-6), 3)
    assert same(weights(model), weights(twin))
    before = len(optimizer.param_groups)
    with pytest.raises(OptimizerError, match="there is no method 'adam'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))], "method": "adam"})
    for options, words in (
        ({"method": "adamw", "rank": 2}, "group 2 holds rank, which would do nothing: adamw has no such option"),
        ({"axes": [0]}, "group 2 holds axes, which would do nothing: apollo has no such option"),
    ):
        with pytest.raises(OptimizerError, match=words):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))], **options})
    with pytest.raises(OptimizerError, match="group 0 holds momentum, which would do nothing: the plan decides it"):
        MemadviseOptimizer([{"params": twin.named_parameters(), "momentum": 0.9}], settings, lr=1e-2)
    assert len(optimizer.param_groups) == before


def test_a_group_may_override_the_options_and_a_refused_group_leaves_no_trace() -> None:
    model = Toy()
    from memadvise.optim import SlimAdam

    optimizer = SlimAdam([{"params": [model.embed]}, {"params": [model.query], "axes": [0]}], axes=(1,))
    assert [m.setting for m in optimizer.memory()] == ["slimadam(axes=[1])", "slimadam(axes=[0])"]
    assert "axes" not in optimizer.param_groups[1]
    with pytest.raises(OptimizerError, match="parameter 0 of group 2"):
        optimizer.add_param_group({"params": [model.conv], "axes": [4]})
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": [model.conv]})
    train(model, optimizer, 1)
    assert len(optimizer.state) == 3


# ---------------------------------------------------------------- steps


@every_dtype
@every_setting
def test_lr_zero_leaves_weights_bit_equal(case: Case, setting: Setting, dtype: torch.dtype) -> None:
    for lr in (0.0, torch.tensor(0.0)):
        model = Toy().to(dtype)
        before = weights(model)
        optimizer = optimizer_for(model, setting, lr)
        train(model, optimizer, 2)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # T3, T4: the step of a distributed checkpoint's lazy initialisation
        optimizer.step()
        assert same(before, weights(model))


@every_dtype
@every_setting
@pytest.mark.parametrize("kind", ["zero", "one-hot", "tiny", "huge", "alternating", "zero row"])
def test_odd_gradients_stay_finite(case: Case, setting: Setting, dtype: torch.dtype, kind: str) -> None:
    model = Toy().to(dtype)
    optimizer = optimizer_for(model, setting, case.lr)
    for number in range(20):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
            if kind == "one-hot":
                p.grad.view(-1)[0] = 1
            elif kind in ("tiny", "huge"):
                p.grad.fill_(1e-30 if kind == "tiny" else 1e4)
            elif kind == "alternating":
                p.grad.fill_((-1.0) ** number)
            elif kind == "zero row" and p.ndim > 1:
                p.grad[1:] = 1
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(torch.isfinite(v).all() for state in optimizer.state.values() for v in state.values())


@every_setting
def test_parameters_without_gradient_are_skipped_and_keep_their_step(case: Case, setting: Setting) -> None:
    model = Toy()
    optimizer = optimizer_for(model, setting, case.lr)
    train(model, optimizer, 2)
    loss_of(model, 2).backward()
    model.embed.grad = None
    before = model.embed.detach().clone()
    step = optimizer.state[model.embed]["step"].clone() if "step" in optimizer.state.get(model.embed, {}) else None
    optimizer.step()
    assert torch.equal(before, model.embed)
    if step is not None:
        assert torch.equal(optimizer.state[model.embed]["step"], step)
        assert optimizer.state[model.query]["step"] == 3


@every_setting
def test_weight_decay_alone_shrinks_the_weights(case: Case, setting: Setting) -> None:
    model = Toy()
    before = weights(model)
    optimizer = optimizer_for(model, setting, lr=0.25)  # weight decay 0.1
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for old, new in zip(before, weights(model), strict=True):
        torch.testing.assert_close(new, old * 0.975)


@every_setting
def test_closure_is_called_once_with_gradients_enabled(case: Case, setting: Setting) -> None:
    model, other = Toy(), Toy()
    optimizer, plain = optimizer_for(model, setting, case.lr), optimizer_for(other, setting, case.lr)
    calls = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    train(other, plain, 1)
    assert same(weights(model), weights(other))


@every_setting
def test_a_tensor_lr_is_read_at_every_step(case: Case, setting: Setting) -> None:
    model, other = Toy().double(), Toy().double()
    lr = torch.tensor(case.lr, dtype=torch.float64)
    optimizer, plain = optimizer_for(model, setting, lr), optimizer_for(other, setting, case.lr)
    train(model, optimizer, 2)
    train(other, plain, 2)
    lr.mul_(0.5)
    plain.param_groups[0]["lr"] = case.lr * 0.5
    train(model, optimizer, 2, first=2)
    train(other, plain, 2, first=2)
    for left, right in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


@every_setting
def test_schedulers(case: Case, setting: Setting) -> None:
    from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau, SequentialLR

    model = Toy()
    optimizer = optimizer_for(model, setting, case.lr)
    scheduler = LambdaLR(optimizer, lambda step: 0.0 if step == 1 else 1.0)
    train(model, optimizer, 1)
    scheduler.step()
    before = weights(model)
    train(model, optimizer, 1)
    assert same(before, weights(model))  # lr x 0 for one step
    scheduler.step()
    train(model, optimizer, 1)
    assert not same(before, weights(model))

    optimizer = optimizer_for(model, setting, case.lr)
    parts = [LinearLR(optimizer, 0.1, 1.0, 2), LambdaLR(optimizer, lambda step: 0.5**step)]
    sequence, plateau = SequentialLR(optimizer, parts, [2]), ReduceLROnPlateau(optimizer, patience=0)
    for number in range(4):
        train(model, optimizer, 1, first=number)
        sequence.step()
    lr = optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(case.lr * 0.25)
    plateau.step(1.0)
    plateau.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * 0.1)


@every_setting
def test_grad_scaler_skips_an_overflow_without_making_state(case: Case, setting: Setting) -> None:
    model = Toy()
    before = weights(model)
    optimizer = optimizer_for(model, setting, case.lr)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, 0)).backward()
    model.query.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert same(before, weights(model))
    assert len(optimizer.state) == 0
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    other = Toy()
    train(other, optimizer_for(other, setting, case.lr), 1)
    for left, right in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(left, right)


@every_setting
def test_scaling_all_gradients_changes_nothing_where_that_is_promised(case: Case, setting: Setting) -> None:
    results = []
    for factor in (1.0, 64.0):
        model = Toy().double()
        optimizer = MemadviseOptimizer(model.parameters(), setting, lr=case.lr, eps=0.0)
        for number in range(3):
            optimizer.zero_grad()
            (loss_of(model.double(), number).double() * factor).backward()
            model.embed.grad.add_(factor * 1e-3)  # no row of zeros: 0/0 without eps
            optimizer.step()
        results.append(weights(model))
    close = all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*results, strict=True))
    promised = case.scale_invariant
    assert close == (promised(setting.options) if callable(promised) else promised)


@every_setting
def test_it_trains(case: Case, setting: Setting) -> None:
    model = Toy()
    optimizer = optimizer_for(model, setting, case.lr * (5 if case.method == "sgd" else 1))
    first = loss_of(model, 0).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()
    assert loss_of(model, 0).item() < 0.8 * first


# ---------------------------------------------------------------- what is refused, and odd worlds


@every_setting
def test_what_cannot_be_stepped_is_refused_by_name(case: Case, setting: Setting) -> None:
    table = nn.Embedding(16, 12, sparse=True)
    optimizer = MemadviseOptimizer(table.named_parameters(), setting, lr=case.lr)
    table(batch(0)[0]).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(OptimizerError, match="weight has a sparse gradient"):
        optimizer.step()
    assert torch.equal(before, table.weight)
    assert len(optimizer.state) == 0

    model = Toy()
    optimizer = optimizer_for(model, setting, case.lr)
    model.query.data = torch.zeros(24, 4)
    model.query.grad = torch.zeros(24, 4)
    with pytest.raises(OptimizerError, match=r"query had shape \[8, 12\]"):
        optimizer.step()

    with pytest.raises(OptimizerError, match=r"w has dtype torch.complex64"):
        MemadviseOptimizer([("w", nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64)))], setting, lr=case.lr)
    with pytest.raises(OptimizerError, match="no shape yet"):
        MemadviseOptimizer(nn.LazyLinear(4).parameters(), setting, lr=case.lr)


@every_setting
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_runs_on_fake_tensors(case: Case, setting: Setting, device: str) -> None:
    from torch._subclasses import FakeTensorMode

    from memadvise.optim.method import assume_device

    with FakeTensorMode(), assume_device(device):
        model = Toy()
        optimizer = optimizer_for(model, setting, case.lr)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            optimizer.step()
    real = sum(v.numel() * v.itemsize for state in optimizer.state.values() for v in state.values())
    assert real == sum(m.state_bytes for m in optimizer.memory())


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@every_setting
def test_distributed_tensors_keep_their_kind_in_the_state(case: Case, setting: Setting, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    plain = {name: p for name, p in Toy().named_parameters() if p.ndim > 1}
    sharded = {n: nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for n, p in plain.items()}
    if not method_info(setting.method).method.sharded:
        with pytest.raises(OptimizerError, match=rf"embed is a DTensor, which {setting.method}.* cannot step yet"):
            MemadviseOptimizer(sharded.items(), setting, lr=case.lr)
        return
    reference = MemadviseOptimizer(plain.items(), setting, lr=case.lr, weight_decay=0.1, executor="eager")
    optimizer = MemadviseOptimizer(sharded.items(), setting, lr=case.lr, weight_decay=0.1)
    for number in range(2):
        for name, p in plain.items():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            sharded[name].grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
        reference.step()
        if setting.options.get("heads"):
            with pytest.raises(OptimizerError, match=r"embed is a DTensor: adam_mini.* groups its rows"):
                optimizer.step()
            return
        optimizer.step()
    for name, p in plain.items():
        assert all(isinstance(v, DTensor) for key, v in optimizer.state[sharded[name]].items() if key != "step")
        torch.testing.assert_close(sharded[name].full_tensor(), p)


def test_memory_is_known_before_the_first_step() -> None:
    model = Toy()
    optimizer = optimizer_for(model, Setting("slimadam", {"axes": [1]}), 1e-2)
    records = {m.name: m for m in optimizer.memory()}
    assert list(records) == [name for name, _ in model.named_parameters()]
    embed, bias = records["embed"], records["bias"]
    assert (embed.setting, embed.executor, embed.shape) == ("slimadam(axes=[1])", "chunked", (16, 12))
    assert embed.state_bytes == 4 + 4 * 16 * 12 + 4 * 16
    assert embed.scratch_bytes >= 4 * 16 * 12
    assert (bias.setting, bias.executor, bias.state_bytes, bias.scratch_bytes) == ("adamw", "fused", 4 + 8 * 8, 0)
    assert optimizer.settings()["embed"] == Setting("slimadam", {"axes": [1]})
