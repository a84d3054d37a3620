"""From a plan to an optimizer: which rule decides, and every mistake at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from toy import Toy, loss_of, same, train, weights

import memadvise
from memadvise.errors import Mark, OptimizerError, PlanError
from memadvise.names import repeat_pattern
from memadvise.optim import bind_plan, create_optimizer
from memadvise.optim.registry import (
    METHODS,
    approximate_second_moment,
    default_lr_factor,
    list_methods,
    method_info,
    state_bytes,
    validate,
)
from memadvise.plan.schema import ModelShape, Plan, Rule, Setting

PLAN = Plan(
    rules=(
        Rule("query", "adam_mini", {"partition": "head", "heads": 4}),
        Rule("conv", "slimadam", {"axes": [1, 2, 3]}),
        Rule("e*", "slimadam", {"axes": [1]}),
        Rule("**", "adamw"),
    )
)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def model_shape(model: nn.Module) -> ModelShape:
    shapes = {repeat_pattern(name)[0]: shape for name, shape in shapes_of(model).items()}
    return ModelShape("sha256:0", sum(p.numel() for p in model.parameters()), shapes)


def test_the_first_rule_that_matches_decides() -> None:
    bound = bind_plan(PLAN, shapes_of(Toy()))
    assert {name: setting.key for name, setting in bound.items()} == {
        "embed": "slimadam(axes=[1])",
        "query": "adam_mini(heads=4, partition=head)",
        "bias": "adamw",
        "conv": "slimadam(axes=[1, 2, 3])",
        "experts.w": "adamw",  # one star stays within a segment
        "gain": "adamw",
    }


def test_a_plan_trains_and_its_bytes_are_the_real_ones() -> None:
    model = Toy()
    optimizer = create_optimizer(model, PLAN, lr=1e-2, weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    before = loss_of(model, 0).item()
    train(model, optimizer, 30)
    assert loss_of(model, 0).item() < 0.9 * before
    predicted = sum(state_bytes(s, shapes_of(model)[name]) for name, s in bind_plan(PLAN, shapes_of(model)).items())
    real = sum(v.numel() * v.itemsize for state in optimizer.state.values() for v in state.values())
    assert predicted == real == sum(m.state_bytes for m in optimizer.memory())
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_a_plan_file_with_mistakes_shows_all_of_them_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "memadvise.yaml"
    path.write_text(
        'version: 1\nrules:\n  - {match: "query", method: adam_mini, partition: head, heads: 5}\n'
        '  - {match: "conv", method: slimadm}\n  - {match: "embd", method: adamw}\n'
        '  - {match: "bias", method: slimadam, axis: 0}\n  - {match: "gain", method: adamw, axes: [1]}\n'
        '  - {match: "re:exp.*w", method: slimadam, axes: [-1]}\n'
    )
    with pytest.raises(PlanError) as caught:
        create_optimizer(Toy(), path, lr=1e-2)
    text = str(caught.value)
    lines = [problem.where.line for problem in caught.value.problems if problem.where]
    assert lines == sorted(lines) == [2, 3, 4, 5, 6, 6, 7, 8]
    assert all(problem.where.column for problem in caught.value.problems if problem.where)
    for words in (
        "query: the 8 rows of [8, 12] do not divide in 5 heads",
        "there is no method 'slimadm'",
        "did you mean 'slimadam'?",
        "'embd' matches no trainable parameter",
        "the closest name is embed",
        "slimadam has no option 'axis'",
        "did you mean 'axes'?",
        "bias: axes [1] do not fit a tensor of shape [8]",
        "adamw has no option 'axes'",
        "its options: compat",
        "axes [-1] has a negative axis",
        "no rule matches embed",
        f"{path}:3:",
    ):
        assert words in text, text
    path.write_text('version: 1\nrules:\n  - {match: "**", method: adamw}\n')
    assert {m.setting for m in create_optimizer(Toy(), str(path), lr=1e-2).memory()} == {"adamw"}
    assert memadvise.create_optimizer is create_optimizer


def test_one_mistake_of_a_rule_is_one_message() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(30)])
    mark = Mark("plan.yaml", 3, 9, "text")
    plan = Plan(rules=(Rule("*.weight", "slimadam", {"axes": [2]}, marks={"axes": mark, "method": mark}),))
    with pytest.raises(PlanError) as caught:
        bind_plan(plan, shapes_of(model))
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].where == mark
    with pytest.raises(PlanError, match=r"no rule matches 0.weight \(and 29 more like \*.weight\)"):
        bind_plan(Plan(rules=()), shapes_of(model))
    with pytest.raises(PlanError, match="not a regular expression"):
        bind_plan(Plan(rules=(Rule("re:(", "adamw"),)), shapes_of(model))


def test_a_shadowed_rule_is_no_mistake() -> None:
    plan = Plan(rules=(Rule("**", "adamw"), Rule("embed", "lion")))
    assert {s.method for s in bind_plan(plan, shapes_of(Toy())).values()} == {"adamw"}


def test_a_plan_for_another_model_names_the_parameters_that_differ() -> None:
    plan = Plan(rules=(Rule("**", "adamw"),), model=model_shape(Toy()))
    bind_plan(plan, shapes_of(Toy()))
    other = Toy()
    other.query = nn.Parameter(torch.zeros(8, 24))
    other.extra = nn.Parameter(torch.zeros(3))
    del other.bias
    with pytest.raises(PlanError) as caught:
        create_optimizer(other, plan, lr=1e-2)
    text = str(caught.value)
    assert "another model (sha256:0)" in text
    assert "query has shape [8, 24], the plan's model [8, 12]" in text
    assert "extra is not in the plan's model" in text
    assert "bias [8] is missing from this model" in text

    def stack(depth: int) -> nn.Module:
        return nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])

    deep = Plan(rules=(Rule("**", "adamw"),), model=model_shape(stack(3)))
    bind_plan(deep, shapes_of(stack(3)))
    with pytest.raises(PlanError, match="it had 60 trainable values, this one has 40"):
        bind_plan(deep, shapes_of(stack(2)))


def test_frozen_parameters_need_no_rule_and_satisfy_none() -> None:
    model = Toy()
    model.embed.requires_grad_(False)
    rest = Rule("[!e]*", "adamw"), Rule("experts.w", "lion")
    optimizer = create_optimizer(model, Plan(rules=rest), lr=1e-2)
    assert "embed" not in optimizer.settings()
    with pytest.raises(PlanError, match="'embed' matches only frozen parameters"):
        create_optimizer(model, Plan(rules=(Rule("embed", "adamw"), *rest)), lr=1e-2)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(OptimizerError, match="no trainable parameter"):
        create_optimizer(model, Plan(rules=rest), lr=1e-2)


def test_tied_parameters_are_stepped_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    optimizer = create_optimizer(model, Setting("adamw"), lr=0.1)
    assert [m.name for m in optimizer.memory()] == ["embed.weight"]
    model.embed.weight.data.fill_(1.0)
    model.embed.weight.grad = torch.ones(6, 4)
    optimizer.step()
    torch.testing.assert_close(model.head.weight, torch.full((6, 4), 0.9))


def test_wrappers_do_not_change_the_names() -> None:
    class Wrapper(nn.Module):  # as DistributedDataParallel names its child
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    plan = Plan(rules=PLAN.rules, model=model_shape(Toy()))
    optimizer = create_optimizer(Wrapper(Toy()), plan, lr=1e-2)
    assert optimizer.settings() == bind_plan(plan, shapes_of(Toy()))
    compiled = torch.compile(Toy(), backend="eager")
    assert list(create_optimizer(compiled, plan, lr=1e-2).settings()) == list(shapes_of(Toy()))


def test_one_setting_for_a_model_leaves_vectors_dense() -> None:
    model = Toy()
    mini = Setting("adam_mini", {"partition": "head", "heads": 4})
    settings = create_optimizer(model, mini, lr=1e-2).settings()
    assert {name for name, setting in settings.items() if setting == Setting("adamw")} == {"bias", "gain"}
    assert {name for name, setting in settings.items() if setting == mini} == {"embed", "query", "conv", "experts.w"}
    assert all(s == Setting("lion") for s in create_optimizer(model, Setting("lion"), lr=1e-2).settings().values())
    with pytest.raises(OptimizerError, match=r"embed: the 16 rows of .* do not divide in 3 heads"):
        create_optimizer(model, Setting("adam_mini", {"partition": "head", "heads": 3}), lr=1e-2)


def test_betas_default_to_those_of_the_only_method() -> None:
    model = Toy()
    assert create_optimizer(model, Setting("lion"), lr=1e-3).param_groups[0]["betas"] == (0.9, 0.99)
    assert create_optimizer(model, Setting("lion"), lr=1e-3, betas=(0.5, 0.6)).param_groups[0]["betas"] == (0.5, 0.6)
    mixed = Plan(rules=(Rule("embed", "lion"), Rule("**", "adamw")))
    assert create_optimizer(model, mixed, lr=1e-3).param_groups[0]["betas"] == (0.9, 0.999)


def test_the_users_groups_keep_number_and_order() -> None:
    model, plain = Toy(), Toy()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": decay, "lr": 1e-3}]
    optimizer = create_optimizer(model, PLAN, lr=1e-2, weight_decay=0.1, param_groups=groups)
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(rest), len(decay)]
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 1e-3]
    assert optimizer.settings() == {n: bind_plan(PLAN, shapes_of(model))[n] for n in optimizer.settings()}
    train(model, optimizer, 2)
    one = create_optimizer(plain, PLAN, lr=1e-2, weight_decay=0.1, param_groups=plain.parameters())
    assert len(one.param_groups) == 1
    train(plain, one, 2)
    assert not same(weights(model), weights(plain))
    with pytest.raises(OptimizerError, match="group 0 holds a parameter that is no trainable parameter"):
        create_optimizer(model, PLAN, lr=1e-2, param_groups=[nn.Parameter(torch.zeros(3))])


FACTORS = Plan(
    rules=(
        Rule("query", "apollo", {"rank": 2}, lr_factor=10.0),
        Rule("b*", "lion", lr_factor=0.1),
        Rule("conv", "adamw", lr_factor=10.0),
        Rule("**", "adamw"),
    )
)


def test_a_rules_learning_rate_factor_is_a_group_that_schedulers_know() -> None:
    model = Toy()
    optimizer = create_optimizer(model, FACTORS, lr=1e-2, weight_decay=0.1)
    found = [(g["lr_factor"], g["lr"], g["param_names"]) for g in optimizer.param_groups]
    by_factor = {factor: (lr, set(names)) for factor, lr, names in found}
    assert by_factor == {
        1.0: (1e-2, {"embed", "experts.w", "gain"}),
        10.0: (0.1, {"query", "conv"}),
        0.1: (pytest.approx(1e-3), {"bias"}),
    }
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, 1)
    scheduler.step()
    assert [g["lr"] / g["lr_factor"] for g in optimizer.param_groups] == pytest.approx([5e-3] * 3)


def test_a_learning_rate_factor_is_what_a_group_with_that_rate_would_be() -> None:
    model, twin = Toy(), Toy()
    optimizer = create_optimizer(model, FACTORS, lr=1e-2)
    plain = Plan(rules=tuple(Rule(r.match, r.method, r.options) for r in FACTORS.rules))
    rates = {"query": 0.1, "conv": 0.1, "bias": 1e-2 * 0.1}
    groups = [{"params": [p], "lr": rates.get(n, 1e-2)} for n, p in twin.named_parameters()]
    other = create_optimizer(twin, plain, lr=1e-2, param_groups=groups)
    assert "lr_factor" not in other.param_groups[0]
    train(model, optimizer, 3)
    train(twin, other, 3)
    assert same(weights(model), weights(twin))
    resumed = create_optimizer(model, FACTORS, lr=5.0)
    resumed.load_state_dict(optimizer.state_dict())
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_learning_rate_factors_multiply_those_of_the_users_groups() -> None:
    model = Toy()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    lr = torch.tensor(2.0)
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": rest, "lr": lr}]
    optimizer = create_optimizer(model, FACTORS, lr=1e-2, param_groups=groups)
    assert [(len(g["params"]), float(g["lr"]), g["weight_decay"]) for g in optimizer.param_groups] == [
        (2, 1e-2, 0.5),
        (2, 0.1, 0.5),
        (1, pytest.approx(0.2), 0.0),
        (1, 2.0, 0.0),
    ]
    assert optimizer.param_groups[3]["lr"] is lr


def test_weights_that_a_parameter_cannot_be_written_to_have_a_place(tmp_path: Path) -> None:
    path = tmp_path / "memadvise.yaml"
    path.write_text(
        'version: 1\nrules:\n  - {match: "query", method: adamw, weights: stochastic}\n'
        '  - {match: "e*", method: adamw, weights: ecc8}\n  - {match: "**", method: adamw, weights: ecc8}\n'
    )
    with pytest.raises(PlanError) as caught:
        create_optimizer(Toy(), path, lr=1e-2)
    text = str(caught.value)
    assert f"{path}:3:46: error: query: weights: stochastic is for bfloat16 parameters, not float32" in text
    assert f"{path}:4:43: error: embed: weights: ecc8 corrects bfloat16 and float16" in text
    assert len(caught.value.problems) == 3
    create_optimizer(Toy().bfloat16(), path, lr=1e-2)


def test_a_learning_rate_in_a_rule_is_told_the_word() -> None:
    for option in ("lr", "lr_facter"):
        with pytest.raises(PlanError, match=rf"adamw has no option '{option}'\n  hint: did you mean 'lr_factor'"):
            create_optimizer(Toy(), Plan(rules=(Rule("**", "adamw", {option: 10}),)), lr=1e-2)


# ---------------------------------------------------------------- the registry


def test_the_registry_lists_what_it_can_do() -> None:
    assert list_methods()[:5] == ("adamw", "slimadam", "adam_mini", "lion", "sgd")
    assert [default_lr_factor(name) for name in list_methods()[:5]] == [1.0, 1.0, 1.0, 0.1, 100.0]
    for info in METHODS:
        assert info.options.keys() == info.defaults.keys()
        assert info.source.startswith("arXiv ")
        module = __import__(f"memadvise.optim.methods.{info.name}", fromlist=["x"])
        assert info.source in module.__doc__
        assert "State:" in module.__doc__
    with pytest.raises(OptimizerError, match="no method 'adam'"):
        method_info("adam")
    with pytest.raises(OptimizerError, match="did you mean 'adam_mini'"):
        method_info("adammini")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (Setting("slimadam", {"axes": []}), "axes is empty"),
        (Setting("slimadam", {"axes": 1}), "list of axis numbers"),
        (Setting("slimadam", {"axes": [True]}), "list of axis numbers"),
        (Setting("slimadam", {"axes": [0, 0]}), "names an axis twice"),
        (Setting("slimadam", {"axes": [-1]}), "negative axis"),
        (Setting("slimadam", {"axes": [2]}), r"do not fit a tensor of shape \[4, 4\]"),
        (Setting("sgd", {"momentum": 1.0}), r"in \[0, 1\)"),
        (Setting("sgd", {"momentum": "much"}), r"in \[0, 1\)"),
        (Setting("lion", {"betas": [0.9, 0.99]}), "no option 'betas'"),
    ],
)
def test_validate_points_at_the_option(setting: Setting, words: str) -> None:
    marks = {option: Mark("plan.yaml", 7, 5) for option in setting.options} | {"method": Mark("plan.yaml", 6)}
    with pytest.raises(OptimizerError, match=words) as caught:
        validate(setting, (4, 4), name="p", marks=marks)
    assert caught.value.where == Mark("plan.yaml", 7, 5)


def test_the_second_moment_of_an_expert_stack_and_of_heads() -> None:
    v = torch.rand(4, 6)
    held = approximate_second_moment(Setting("adam_mini", {"partition": "head", "heads": 2}), v)
    torch.testing.assert_close(held, v.reshape(2, 12).mean(1, keepdim=True).expand(2, 12).reshape(4, 6))
    v = torch.rand(2, 3, 5)
    held = approximate_second_moment(Setting("adam_mini", {"partition": "row"}), v)
    torch.testing.assert_close(held, v.mean(2, keepdim=True).expand(2, 3, 5))


def test_eps_is_the_methods_own_like_its_betas() -> None:
    model = nn.Linear(8, 8)
    assert create_optimizer(model, Setting("apollo"), lr=1e-2).defaults["eps"] == 1e-6
    assert create_optimizer(model, Setting("apollo"), lr=1e-2, eps=1e-3).defaults["eps"] == 1e-3
    assert create_optimizer(model, Setting("adamw"), lr=1e-2).defaults["eps"] == 1e-8


def test_rounding_without_codes_to_round_means_nothing() -> None:
    optimizer = create_optimizer(nn.Linear(8, 8), Setting("adamw", {"rounding": "nearest"}), lr=1e-2)
    plain = create_optimizer(nn.Linear(8, 8), Setting("adamw"), lr=1e-2)
    plain.load_state_dict(optimizer.state_dict())  # the same setting: nothing to convert


def test_the_readmes_plan_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    (block,) = [block for block in blocks if "self_attn" in block]
    path = tmp_path / "memadvise.yaml"
    path.write_text(block, encoding="utf-8")
    layer = nn.ModuleDict(
        {
            "self_attn": nn.ModuleDict({name: nn.Linear(32, 32, bias=False) for name in ("q_proj", "k_proj")}),
            "mlp": nn.ModuleDict({"up_proj": nn.Linear(32, 64, bias=False)}),
            "norm": nn.LayerNorm(32),
        }
    )
    model = nn.ModuleDict(
        {"model": nn.ModuleDict({"embed_tokens": nn.Embedding(50, 32), "layers": nn.ModuleList([layer])})}
    )
    optimizer = create_optimizer(model, path, lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    methods = {name: setting.method for name, setting in optimizer.settings().items()}
    assert methods["model.layers.0.self_attn.q_proj.weight"] == "adapprox"
    assert methods["model.layers.0.mlp.up_proj.weight"] == "slimadam"
