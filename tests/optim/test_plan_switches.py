"""What create_optimizer does of a plan's switches: gradient release, and one form for all weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import Toy, loss_of, same, train, weights

from memadvise.errors import OptimizerError, PlanError
from memadvise.optim import Int8Weight, create_optimizer, release
from memadvise.optim.create import hold_weights
from memadvise.plan.schema import Plan, Rule, Setting, Switches

ALL = (Rule("**", "adamw"),)


def bfloat16_toy() -> Toy:
    return Toy().to(torch.bfloat16)


def test_a_plan_with_gradient_release_steps_in_backward_with_the_same_weights() -> None:
    plan = Plan(rules=ALL, switches=Switches(gradient_release=True))
    plain, released = Toy(), Toy()
    ordinary = create_optimizer(plain, plan, lr=1e-2, switches=Switches())
    optimizer = create_optimizer(released, plan, lr=1e-2)
    assert isinstance(optimizer, release.ReleasedOptimizer)
    assert not isinstance(ordinary, release.ReleasedOptimizer)
    for number in range(3):
        for model, stepper in ((plain, ordinary), (released, optimizer)):
            loss_of(model, number).backward()
            stepper.step()
            stepper.zero_grad()
    assert same(weights(plain), weights(released))


def test_attach_takes_a_plan_that_releases_and_one_that_does_not() -> None:
    model = Toy()
    optimizer = release.attach(
        model, lambda _: create_optimizer(model, Plan(rules=ALL, switches=Switches(gradient_release=True)), lr=1e-2)
    )
    loss_of(model, 0).backward()
    optimizer.step()
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("form", ["stochastic", "ecc8", "ecc16", "bf16"])
def test_a_float32_model_is_cast_and_trains(form: str) -> None:
    model, reference = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), Toy()
    first = dict(model.named_parameters())
    switches = Switches(weights=form)
    assert hold_weights(model, Plan(rules=ALL), switches=switches) == []
    optimizer = create_optimizer(model, Plan(rules=ALL), lr=1e-2, switches=switches)
    assert all(p is first[name] and p.dtype == torch.bfloat16 for name, p in model.named_parameters())
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.bfloat16}
    before = [p.detach().clone() for p in model.parameters()]
    out = model(torch.randn(4, 6))  # float32 inputs are cast on the way in
    assert out.dtype == torch.bfloat16
    out.square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    expected = {"bf16": 0, "stochastic": 0, "ecc8": 1, "ecc16": 2}[form]
    numel = sum(p.numel() for p in model.parameters())
    plain = create_optimizer(reference, Plan(rules=ALL), lr=1e-2)
    assert sum(m.state_bytes for m in plain.memory()) >= 8 * sum(p.numel() for p in reference.parameters())
    corrections = [state["weight_correction"] for state in optimizer.state.values() if "weight_correction" in state]
    assert sum(v.nbytes for v in corrections) == expected * numel
    assert sum(m.state_bytes for m in optimizer.memory()) == sum(
        v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)
    )
    hooks = len(model._forward_pre_hooks)
    hold_weights(model, Plan(rules=ALL), switches=switches)
    assert len(model._forward_pre_hooks) == hooks  # twice is once


def test_the_switch_is_the_same_as_rules_that_say_it() -> None:
    by_switch, by_rules = bfloat16_toy(), bfloat16_toy()
    train(by_switch, create_optimizer(by_switch, Setting("adamw"), lr=1e-2, switches=Switches(weights="ecc8")), 3)
    train(by_rules, create_optimizer(by_rules, Setting("adamw", {"weights": "ecc8"}), lr=1e-2), 3)
    assert same(weights(by_switch), weights(by_rules))


def test_int8_takes_the_matrices_and_a_rules_own_word_stands() -> None:
    model = Toy()
    plan = Plan(
        rules=(
            Rule("embed", "adamw", {"weights": "nearest"}),
            Rule("query", "slimadam", {"axes": [1]}),
            Rule("**", "adamw"),
        ),
        switches=Switches(weights="int8"),
    )
    optimizer = create_optimizer(model, plan, lr=1e-2)
    held = {name for name, p in model.named_parameters() if isinstance(p, Int8Weight)}
    assert held == {name for name, p in model.named_parameters() if p.ndim >= 2 and name != "embed"}
    assert {name: s.options.get("weights") for name, s in optimizer.settings().items()}["embed"] in (None, "nearest")
    train(model, optimizer, 2)


def test_a_rule_may_name_a_form_that_the_cast_makes_possible() -> None:
    plan = Plan(rules=(Rule("embed", "adamw", {"weights": "ecc16"}), Rule("**", "adamw")))
    with pytest.raises(PlanError, match="embed: weights: ecc16 corrects bfloat16"):
        create_optimizer(Toy(), plan, lr=1e-2)
    optimizer = create_optimizer(Toy(), plan, lr=1e-2, switches=Switches(weights="ecc8"))
    assert optimizer.settings()["embed"].options["weights"] == "ecc16"


def test_a_form_that_no_parameter_takes_is_refused() -> None:
    model = nn.Linear(3, 2).to(torch.float16)
    with pytest.raises(OptimizerError, match=r"stochastic holds no parameter of this model \(of float16\)"):
        create_optimizer(model, Setting("adamw"), lr=1e-2, switches=Switches(weights="stochastic"))
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    with pytest.raises(OptimizerError, match="int8 holds no parameter"):
        create_optimizer(nn.LayerNorm(4), Setting("adamw"), lr=1e-2, switches=Switches(weights="int8"))
