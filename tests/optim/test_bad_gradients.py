"""Gradients that no method can step, or that ruin one: refused before anything moves, or passed through as in torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, every_setting
from torch import Tensor, nn
from toy import Toy, loss_of, optimizer_for, same, train, weights

from memadvise.errors import OptimizerError
from memadvise.optim import AdamW, MemadviseOptimizer, SlimAdam
from memadvise.plan.schema import Setting


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], dict[str, Any]]:
    return weights(model), copy.deepcopy(optimizer.state_dict())


def unchanged(before: tuple[list[Tensor], dict[str, Any]], after: tuple[list[Tensor], dict[str, Any]]) -> bool:
    assert before[1]["state"].keys() == after[1]["state"].keys()
    return same(before[0], after[0]) and all(
        torch.equal(value, after[1]["state"][index][name])
        for index, state in before[1]["state"].items()
        for name, value in state.items()
    )


# ---------------------------------------------------------------- refused, and nothing has moved


class WithTable(nn.Module):
    """A sparse table in the last group, after groups that could be stepped."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy()
        self.table = nn.Embedding(16, 5, sparse=True)


def _sparse(model: WithTable) -> None:
    model.table(torch.tensor([1, 2])).sum().backward()


def _other_shape(model: WithTable) -> None:
    model.table.weight.data = torch.zeros(5, 16)
    model.table.weight.grad = torch.zeros(5, 16)


def _other_precision(model: WithTable) -> None:
    model.table.weight.data = model.table.weight.data.double()
    model.table.weight.grad = torch.zeros(16, 5, dtype=torch.float64)


@every_setting
@pytest.mark.parametrize(
    ("spoil", "steps", "words"),
    [
        (_sparse, 0, r"^table.weight has a sparse gradient \(torch.sparse_coo\)"),
        (_sparse, 2, r"^table.weight has a sparse gradient \(torch.sparse_coo\)"),
        (_other_shape, 2, r"^table.weight had shape \[16, 5\] when the optimizer was made and has \[5, 16\] now"),
        (_other_precision, 2, r"^table.weight was float32 when the optimizer was made and is float64 now"),
    ],
)
def test_one_parameter_that_cannot_be_stepped_stops_all_groups(
    case: Case, setting: Setting, spoil: Callable[[WithTable], None], steps: int, words: str
) -> None:
    model = WithTable()
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:-1], "lr": 0.5}, {"params": named[-1:]}]
    optimizer = MemadviseOptimizer(groups, setting, lr=case.lr, weight_decay=0.1)
    for number in range(steps):
        train(model.toy, optimizer, 1, first=number)
    optimizer.zero_grad()
    loss_of(model.toy, steps).backward()
    spoil(model)
    before = snapshot(model, optimizer)
    for _ in range(2):
        with pytest.raises(OptimizerError, match=words) as caught:
            optimizer.step()
        assert caught.value.hint is not None
        assert unchanged(before, snapshot(model, optimizer))
        assert len(optimizer.state) == len(before[1]["state"])
    model.table.weight.grad = None
    optimizer.step()  # the others may go on
    assert not torch.equal(before[0][0], weights(model)[0])


def test_a_complex_gradient_is_refused() -> None:
    """torch refuses to assign one, unless it knows gradient dtypes and the parameter has one of its own."""
    p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
    with pytest.raises(RuntimeError):
        q.grad = torch.ones(4, dtype=torch.complex64)
    if not hasattr(q, "grad_dtype"):
        return
    q.grad_dtype = torch.complex64
    optimizer = AdamW([("p", p), ("q", q)])
    p.grad, q.grad = torch.ones(4), torch.ones(4, dtype=torch.complex64)
    with pytest.raises(OptimizerError, match=r"^q has a complex gradient"):
        optimizer.step()
    assert len(optimizer.state) == 0


def test_another_narrow_dtype_is_no_other_precision() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = SlimAdam([p], lr=0.25)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p.data = p.data.to(dtype)
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    assert optimizer.state[p]["step"] == 3
    stochastic = SlimAdam([("p", nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)))], weights="stochastic")
    (q,) = stochastic.param_groups[0]["params"]
    q.data = q.data.float()
    q.grad = torch.ones_like(q)
    with pytest.raises(OptimizerError, match="p was bfloat16 when the optimizer was made and is float32 now"):
        stochastic.step()


@every_setting
def test_no_state_is_kept_when_it_cannot_all_be_made(
    case: Case, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memadvise.optim import engine

    model = Toy()
    optimizer = optimizer_for(model, setting, case.lr)
    loss_of(model, 0).backward()
    make = engine.new_state

    def fail(resolved: engine.Resolved, *rest: Any) -> Any:
        if resolved.name == "experts.w":
            raise RuntimeError("no memory left")
        return make(resolved, *rest)

    monkeypatch.setattr(engine, "new_state", fail)
    if not optimizer.memory()[-1].state_bytes:
        return
    before = weights(model)
    with pytest.raises(RuntimeError, match="no memory left"):
        optimizer.step()
    assert len(optimizer.state) == 0
    assert same(before, weights(model))
    monkeypatch.undo()
    optimizer.step()
    twin = Toy()
    train(twin, optimizer_for(twin, setting, case.lr), 1)
    assert same(weights(model), weights(twin))


@every_setting
def test_a_parameter_can_be_stepped_alone_with_the_same_result(case: Case, setting: Setting) -> None:
    model, twin = Toy().double(), Toy().double()
    one, all_ = (optimizer_for(m, setting, case.lr) for m in (model, twin))
    for number in range(6):
        for m in (model, twin):
            m.zero_grad()
            loss_of(m, number).backward()
        all_.step()
        for p in reversed(list(model.parameters())):
            one.step_parameters(one.param_groups[0], [p])
    assert same(weights(model), weights(twin))


def test_the_company_of_other_parameters_changes_no_bit() -> None:
    """torch.pow gives whole vectors other last bits than the remainder: bias corrections have to be padded."""
    results = []
    for alone in (False, True):
        ps = [nn.Parameter(torch.ones(2, 1, dtype=torch.float64)) for _ in range(200)]
        optimizer = SlimAdam(ps, lr=1e-2)
        for _ in range(2):
            for number, p in enumerate(ps):
                p.grad = torch.full_like(p, 0.3)
                if p in optimizer.state:
                    optimizer.state[p]["step"].fill_(float(number))
            for chosen in [[p] for p in ps] if alone else [ps]:
                optimizer.step_parameters(optimizer.param_groups[0], chosen)
        results.append(torch.stack(ps))
    assert torch.equal(*results)


# ---------------------------------------------------------------- NaN and inf


@pytest.mark.parametrize("executor", ["fused", "chunked", "eager"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_pass_through_adamw_as_in_torch(bad: float, executor: str) -> None:
    model, twin = Toy(), Toy()
    ours = optimizer_for(model, Setting("adamw"), 1e-2, executor)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1, fused=executor == "fused")
    for number in range(4):
        for m, optimizer in ((model, ours), (twin, theirs)):
            for index, p in enumerate(m.parameters()):
                p.grad = torch.full_like(p, 0.5)
                if number == 1 and index < 3:
                    p.grad.view(-1)[index] = bad
            optimizer.step()
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(left, right, equal_nan=True, rtol=1e-5, atol=1e-7)
        for name, value in theirs.state[right].items():
            torch.testing.assert_close(ours.state[left][name], value, equal_nan=True, rtol=1e-5, atol=1e-7)
    lost = [int((~torch.isfinite(p)).sum()) for p in model.parameters()]
    assert lost == [1, 1, 1, 0, 0, 0]


@every_setting
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_gradient_that_is_not_finite_stays_with_its_parameter_and_shows(
    case: Case, setting: Setting, bad: float
) -> None:
    """No method looks for it (that would wait for the device) and none hides it: the weights or the state tell.

    Lion's sign drops NaN from the weights, and so does caution; their first moment keeps it. That is what torch's own
    operators do. Everything else of the model is as if nothing had been.
    """
    model, twin = Toy(), Toy()
    one, two = (optimizer_for(m, setting, case.lr) for m in (model, twin))
    for number in range(3):
        for m, optimizer in ((model, one), (twin, two)):
            optimizer.zero_grad()
            # of the twin's weights for both: the spoilt model's own would be NaN throughout
            grads = torch.autograd.grad(loss_of(twin, number), list(twin.parameters()))
            for p, g in zip(m.parameters(), grads, strict=True):
                p.grad = g.clone()
            if m is model and number == 1:
                m.query.grad[2, 3] = bad
        one.step()
        two.step()
    for (name, left), right in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name != "query":
            assert torch.equal(left, right)
    state = [v for v in one.state.get(model.query, {}).values() if v.is_floating_point()]
    assert any(not torch.isfinite(v).all() for v in (model.query, *state))


@pytest.mark.parametrize(
    ("setting", "lost"),
    [
        (Setting("adamw"), "element"),
        (Setting("slimadam", {"axes": [1]}), "row"),
        (Setting("slimadam", {"axes": [0]}), "column"),
        (Setting("adam_mini", {"partition": "whole"}), "all"),
        (Setting("sgd", {"momentum": 0.9}), "element"),
        (Setting("lion"), "none"),
    ],
    ids=lambda value: getattr(value, "key", value),
)
@pytest.mark.parametrize("executor", ["chunked", "eager"])
def test_how_far_a_nan_goes(setting: Setting, lost: str, executor: str) -> None:
    p = nn.Parameter(torch.ones(4, 5))
    optimizer = MemadviseOptimizer([p], setting, lr=1e-2, executor=executor)
    for number in range(2):
        p.grad = torch.full_like(p, 0.5)
        if number == 0:
            p.grad[1, 2] = float("nan")
        optimizer.step()
    expected = torch.zeros(4, 5, dtype=torch.bool)
    index: dict[str, Any] = {"element": (1, 2), "row": 1, "column": (slice(None), 2), "all": ...}
    if lost in index:
        expected[index[lost]] = True
    assert torch.equal(p.isnan(), expected)


# ---------------------------------------------------------------- state dicts that are none


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda sd: {"model": sd, "epoch": 3}, "this is not the state of an optimizer: it holds epoch, model"),
        (lambda sd: _with(sd, "exp_avg", "text"), "not the state of embed: its exp_avg is of type str, not a tensor"),
        (lambda sd: _with(sd, "exp_avg", None), "not the state of embed: its exp_avg is of type NoneType"),
        (lambda sd: _with(sd, "exp_avg", torch.zeros(3)), r"not the state of embed: its exp_avg has shape \[3\]"),
        (
            lambda sd: _with(sd, "exp_avg", torch.zeros(16, 12, dtype=torch.int64)),
            "not the state of embed: its exp_avg is int64, .* needs float32",
        ),
    ],
)
def test_a_state_dict_that_is_none_changes_nothing(spoil: Callable[[Any], Any], words: str) -> None:
    model = Toy()
    optimizer = optimizer_for(model, Setting("slimadam", {"axes": [1]}), 1e-2)
    train(model, optimizer, 2)
    before = snapshot(model, optimizer)
    broken = spoil(copy.deepcopy(optimizer.state_dict()))
    if "param_groups" in broken:
        broken["param_groups"][0]["lr"] = 7.0
    for convert in (False, True):
        with pytest.raises(OptimizerError, match=words):
            optimizer.load_state_dict(broken, convert=convert)
        assert unchanged(before, snapshot(model, optimizer))
        assert optimizer.param_groups[0]["lr"] == 1e-2


def _with(state_dict: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    state_dict["state"][0][name] = value
    return state_dict


def test_codes_that_some_tool_made_floats_are_no_codes() -> None:
    model = Toy()
    optimizer = optimizer_for(model, Setting("adamw", {"first_moment": "int8"}), 1e-2)
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    codes = {name for name, v in saved["state"][0].items() if not v.is_floating_point()}
    assert codes
    for name in codes:
        broken = copy.deepcopy(saved)
        broken["state"][0][name] = broken["state"][0][name].to(torch.bfloat16)
        with pytest.raises(OptimizerError, match=f"its {name} is bfloat16, .* needs u?int8"):
            optimizer.load_state_dict(broken)
    optimizer.load_state_dict(saved)


def test_a_state_dict_numbered_in_another_way_goes_by_position() -> None:
    """As in torch: distributed checkpoints use names for numbers."""
    model, twin = Toy(), Toy()
    one, two = (optimizer_for(m, Setting("slimadam", {"axes": [1]}), 1e-2) for m in (model, twin))
    train(model, one, 2)
    saved = one.state_dict()
    del saved["memadvise"]
    names = saved["param_groups"][0]["param_names"]
    saved["state"] = {names[index]: state for index, state in saved["state"].items()}
    saved["param_groups"][0]["params"] = list(names)
    twin.load_state_dict(model.state_dict())
    two.load_state_dict(saved)
    train(model, one, 2, first=2)
    train(twin, two, 2, first=2)
    assert same(weights(model), weights(twin))
