"""An optimizer in backward: the weights of the ordinary loop, less gradient memory, and a sentence for the rest."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Case, every_dtype, every_setting
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint
from toy import Toy, loss_of, same, weights

from memadvise import optim
from memadvise.errors import OptimizerError
from memadvise.optim import AdamW, MemadviseOptimizer, SlimAdam, create_optimizer, release
from memadvise.plan.schema import Plan, Rule, Setting


def released(model: nn.Module, setting: Setting | None = None, lr: Any = 1e-2, **options: Any) -> Any:
    setting = setting or Setting("slimadam", {"axes": [1]})
    return release.attach(model, lambda params: MemadviseOptimizer(params, setting, lr=lr, weight_decay=0.1), **options)


def plain(model: nn.Module, setting: Setting | None = None, lr: Any = 1e-2) -> MemadviseOptimizer:
    setting = setting or Setting("slimadam", {"axes": [1]})
    return MemadviseOptimizer(model.named_parameters(), setting, lr=lr, weight_decay=0.1)


def same_state(left: dict[str, Any], right: dict[str, Any]) -> bool:
    assert left["state"].keys() == right["state"].keys()
    assert left["param_groups"] == right["param_groups"]
    return all(
        torch.equal(value, right["state"][index][name])
        for index, state in left["state"].items()
        for name, value in state.items()
    )


def run(model: Toy, optimizer: Any, steps: int, first: int = 0, then: Callable[[], Any] = lambda: None) -> None:
    for number in range(first, first + steps):
        loss_of(model, number).backward()
        optimizer.step()
        then()
        optimizer.zero_grad()


# ---------------------------------------------------------------- the same weights


@every_dtype
@every_setting
def test_weights_and_state_are_those_of_the_ordinary_loop_bit_for_bit(
    case: Case, setting: Setting, dtype: torch.dtype
) -> None:
    model, twin = Toy().to(dtype), Toy().to(dtype)
    left, right = released(model, setting, case.lr), plain(twin, setting, case.lr)
    schedulers = [LambdaLR(o, lambda step: 1.0 if step % 2 else 0.5) for o in (left, right)]
    run(model, left, 5, then=schedulers[0].step)
    run(twin, right, 5, then=schedulers[1].step)
    assert same(weights(model), weights(twin))
    assert same_state(left.state_dict(), right.state_dict())
    assert left.memory() == right.memory()
    assert left.settings() == right.settings()


def test_weights_move_in_backward_and_gradients_are_gone() -> None:
    model = Toy()
    optimizer = released(model, guard=False)
    before = weights(model)
    loss_of(model, 0).backward()
    after = weights(model)
    assert all(p.grad is None for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.zero_grad(set_to_none=False)
    assert same(after, weights(model))
    assert all(p.grad is None for p in model.parameters())


def test_one_set_of_groups_for_users_and_schedulers() -> None:
    def groups(model: Toy) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        return [{"params": named[:2], "lr": 0.5}, {"params": named[2:], "weight_decay": 0.0}]

    model, twin = Toy(), Toy()
    left = release.attach(model, lambda _: SlimAdam(groups(model), lr=1e-2))
    right = SlimAdam(groups(twin), lr=1e-2)
    assert isinstance(left, torch.optim.Optimizer)
    assert left.param_groups is left.optimizer.param_groups
    assert left.state is left.optimizer.state
    assert left.defaults == right.defaults
    plateaus = [ReduceLROnPlateau(o, patience=0) for o in (left, right)]
    for number in range(4):
        run(model, left, 1, first=number)
        run(twin, right, 1, first=number)
        for optimizer, plateau in zip((left, right), plateaus, strict=True):
            plateau.step(float(number))
            optimizer.param_groups[1]["weight_decay"] = 0.1 * number
        assert same(weights(model), weights(twin))
    assert [g["lr"] for g in left.param_groups] == [g["lr"] for g in right.param_groups] != [0.5, 1e-2]
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)"):  # schedulers do see whether step() was called
        LambdaLR(released(Toy()), lambda step: 1.0).step()


def test_a_tensor_lr_and_the_factory_of_plans() -> None:
    plan = Plan(rules=(Rule("conv", "slimadam", {"axes": [2, 3]}), Rule("**", "adamw")))
    model, twin = Toy(), Toy()
    lr = torch.tensor(1e-2)
    left = release.attach(model, lambda _: create_optimizer(model, plan, lr=lr))
    right = create_optimizer(twin, plan, lr=lr)
    for number in range(3):
        run(model, left, 1, first=number)
        run(twin, right, 1, first=number)
        lr.mul_(0.5)
    assert same(weights(model), weights(twin))
    assert optim.release is release


def test_a_closure_is_called_once_with_gradients_enabled() -> None:
    model, twin = Toy(), Toy()
    optimizer = released(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        losses.append(loss)
        return loss

    losses: list[Tensor] = []
    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    run(twin, plain(twin), 1)
    assert same(weights(model), weights(twin))


@every_setting
def test_backward_within_autocast_steps_in_full_precision(case: Case, setting: Setting) -> None:
    model, twin = Toy(), Toy()
    left, right = released(model, setting, case.lr), plain(twin, setting, case.lr)
    for number in range(2):
        losses = loss_of(model, number), loss_of(twin, number)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses[0].backward()
            losses[1].backward()
            if number:
                right.step()
        if not number:
            right.step()
        left.step()
        right.zero_grad()
    assert same(weights(model), weights(twin))


def test_backward_and_attach_without_gradients_enabled() -> None:
    model, twin = Toy(), Toy()
    with torch.no_grad():
        left = released(model)
    right = plain(twin)
    for number in range(2):
        losses = loss_of(model, number), loss_of(twin, number)
        with torch.no_grad():
            losses[0].backward()
            losses[1].backward()
        with torch.inference_mode():
            model(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 4, 6, 6))
        left.step()
        right.step()
        right.zero_grad()
    assert same(weights(model), weights(twin))


# ---------------------------------------------------------------- state in and out


def test_state_goes_from_either_kind_to_the_other() -> None:
    model, twin = Toy(), Toy()
    left, right = released(model), plain(twin)
    run(model, left, 2)
    run(twin, right, 2)
    stream = io.BytesIO()
    torch.save([left.state_dict(), right.state_dict()], stream)
    stream.seek(0)
    first, second = torch.load(stream, weights_only=True)
    model, twin = copy.deepcopy(twin), copy.deepcopy(model)
    left, right = released(model, lr=9.0), plain(twin, lr=9.0)
    left.load_state_dict(second)
    right.load_state_dict(first)
    assert left.param_groups is left.optimizer.param_groups
    assert left.state is left.optimizer.state
    run(model, left, 2, first=2)
    run(twin, right, 2, first=2)
    assert same(weights(model), weights(twin))
    assert same_state(left.state_dict(), right.state_dict())


def test_load_begins_a_new_iteration_and_can_convert() -> None:
    model, twin, other = Toy(), Toy(), Toy()
    left, right, source = released(model), plain(twin), plain(other, Setting("adamw"), lr=0.05)
    run(other, source, 1)
    loss_of(model, 0).backward()
    left.load_state_dict(source.state_dict(), convert=True)
    assert all(p.grad is None for p in model.parameters())
    twin.load_state_dict(model.state_dict())
    right.load_state_dict(source.state_dict(), convert=True)
    run(model, left, 2)
    run(twin, right, 2)
    assert same(weights(model), weights(twin))


def test_hooks_of_the_user_run() -> None:
    model = Toy()
    optimizer = released(model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append(f"load {d['extra']}"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    run(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "save", "load 1", "loaded"]


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_distributed_checkpoints_prime_and_load_it(mesh: Any) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, twin = Toy(), Toy()
    left = released(model)
    run(model, left, 2)
    saved = get_optimizer_state_dict(model, left)
    twin.load_state_dict(model.state_dict())
    right = released(twin, lr=9.0)
    before = weights(twin)
    set_optimizer_state_dict(twin, right, saved)  # makes a step with gradients of zero and lr 0 to have state
    assert same(before, weights(twin))
    run(model, left, 2, first=2)
    run(twin, right, 2, first=2)
    assert same(weights(model), weights(twin))


def test_sharded_parameters_step_when_their_gradients_are_reduced(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        fully_shard(model[0], mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model, twin = build(), build()
    left, right = released(model), plain(twin)
    for number in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()
        assert all("freed" in repr(p.grad) for p in model.parameters())
        left.step()
        twin(x).square().mean().backward()
        right.step()
        right.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())
    model(x).mean().backward()
    with pytest.raises(OptimizerError, match=r"gradient of 0.weight was used in backward"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)


# ---------------------------------------------------------------- memory


def peak_bytes(work: Callable[[], Any]) -> int:
    """The highest point of live allocations while ``work`` runs, from the CPU allocator's events."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_gradients_are_never_alive_together() -> None:
    size, layers = 512, 12
    one = size * size * 4

    def deep() -> nn.Module:
        return nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers)))

    x = torch.ones(1, size)
    setting = Setting("adamw")  # the fused op needs no scratch: what is left are gradients
    twin = deep()
    ordinary = plain(twin, setting)
    model = deep()
    optimizer = released(model, setting)
    alive = []
    for p in model.parameters():  # runs after the optimizer's hook
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(type(q.grad) is Tensor for q in model.parameters()))
        )
    for _ in range(2):  # the first makes the state
        loss = model(x).mean(), twin(x).mean()
        together = peak_bytes(lambda loss=loss: (loss[1].backward(), ordinary.step()))
        apart = peak_bytes(lambda loss=loss: (loss[0].backward(), optimizer.step()))
        ordinary.zero_grad()
    assert together >= layers * one
    assert apart <= 2 * one
    assert alive == [0] * 2 * layers


def test_placeholders_take_no_memory_and_nothing_keeps_the_model() -> None:
    model = Toy()
    optimizer = released(model)
    loss_of(model, 0).backward()
    for p in model.parameters():
        with pytest.raises(RuntimeError, match="data pointer"):
            p.grad.untyped_storage().data_ptr()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    optimizer.step()
    refs = weakref.ref(model.embed), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


# ---------------------------------------------------------------- odd models


class Tower(nn.Module):
    """Layers of one width, each in a checkpoint of its own; ``tied``: the first and the third share their weight."""

    def __init__(self, reentrant: bool, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.unused = nn.Linear(2, 2)
        self.reentrant = reentrant
        if tied:
            self.layers[2].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda h, layer=layer: torch.tanh(layer(h)), x, use_reentrant=self.reentrant)
        return x.square().mean()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_checkpointed_tied_and_unused_parameters(reentrant: bool, tied: bool) -> None:
    model, twin = Tower(reentrant, tied), Tower(reentrant, tied)
    left, right = released(model), plain(twin)
    assert len(left.param_groups[0]["params"]) == 10 - tied
    for number in range(3):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number), requires_grad=True)
        if reentrant and tied:  # one backward for each segment: the first gives a part of the gradient only
            with pytest.raises(OptimizerError, match=r"layers.0.weight got a second gradient"):
                model(x).backward()
            return
        model(x).backward()
        left.step()
        twin(x).backward()
        right.step()
        right.zero_grad()
    assert same(weights(model), weights(twin))
    assert left.state[model.layers[0].weight]["step"] == 3
    assert model.unused.weight not in left.state


def test_parameters_frozen_and_thawed_in_mid_run() -> None:
    model, twin = Toy(), Toy()
    left = release.attach(model, lambda _: SlimAdam(model.named_parameters(), lr=1e-2))
    right = SlimAdam(twin.named_parameters(), lr=1e-2)
    for number in range(6):
        for each in (model, twin):
            each.embed.requires_grad_(number in (0, 1, 4, 5))
            each.query.requires_grad_(number >= 2)
        run(model, left, 1, first=number)
        run(twin, right, 1, first=number)
        assert same(weights(model), weights(twin))
        assert model.query.grad is None

    frozen = Toy()
    frozen.embed.requires_grad_(False)
    offered: list[str] = []
    release.attach(frozen, lambda params: offered.extend(n for n, _ in params) or SlimAdam(params))
    assert offered == ["query", "bias", "conv", "gain", "experts.w"]
    late = release.attach(Toy(), lambda params: SlimAdam([p for n, p in params if n != "embed"]))
    assert len(late.memory()) == 5


def test_a_parameter_frozen_from_the_start_is_hooked_once_it_is_thawed() -> None:
    model = Toy()
    model.query.requires_grad_(False)
    optimizer = release.attach(model, lambda _: SlimAdam(model.named_parameters(), lr=1e-2))
    run(model, optimizer, 1)
    model.query.requires_grad_(True)
    loss_of(model, 1).backward()
    assert type(model.query.grad) is Tensor
    before = model.query.detach().clone()
    optimizer.step()  # as any optimizer steps it
    assert not torch.equal(before, model.query)
    loss_of(model, 2).backward()
    assert type(model.query.grad) is not Tensor


def test_groups_added_later_step_in_backward_too() -> None:
    model, twin = Toy(), Toy()
    named, others = list(model.named_parameters()), list(twin.named_parameters())
    left, right = release.attach(model, lambda _: SlimAdam(named[:2])), SlimAdam(others[:2])
    left.add_param_group({"params": named[2:], "lr": 0.1})
    right.add_param_group({"params": others[2:], "lr": 0.1})
    run(model, left, 2)
    run(twin, right, 2)
    assert same(weights(model), weights(twin))
    foreign = nn.Parameter(torch.ones(3))
    with pytest.raises(OptimizerError, match="not of this model"):
        left.add_param_group({"params": [("foreign", foreign)]})
    assert len(left.param_groups) == len(left.optimizer.param_groups) == 2
    run(model, left, 1, first=2)


def test_gradients_set_by_hand_make_their_step() -> None:
    model, twin = Toy(), Toy()
    left, right = released(model), plain(twin)
    for number in range(2):
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = torch.full_like(mine, number + 0.5)
            theirs.grad = mine.grad.clone()
        left.step()
        right.step()
        assert all(p.grad is None for p in model.parameters())
    assert same(weights(model), weights(twin))
    loss_of(model, 0).backward()
    model.embed.grad = torch.ones_like(model.embed)
    with pytest.raises(OptimizerError, match="embed got a second gradient"):
        left.step()


# ---------------------------------------------------------------- what is refused


def _after_backward(**options: Any) -> tuple[Toy, Any]:
    model = Toy()
    optimizer = released(model, **options)
    loss_of(model, 0).backward()
    return model, optimizer


@pytest.mark.parametrize(
    "read",
    [
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False),
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=float("inf"), foreach=True),
        lambda model: nn.utils.clip_grad_value_(model.parameters(), 1.0),
        lambda model: nn.utils.get_total_norm([p.grad for p in model.parameters()]),
        lambda model: sum(p.grad.norm() for p in model.parameters() if p.grad is not None),
        lambda model: model.embed.grad.clone(),
        lambda model: model.embed.grad.mul_(0.5),
        lambda model: torch.isfinite(model.embed.grad).all(),
    ],
)
def test_reading_a_gradient_after_backward_is_refused(read: Callable[[Toy], Any]) -> None:
    model, optimizer = _after_backward()
    after = weights(model)
    with pytest.raises(OptimizerError, match=r"the gradient of \w+ was used in backward and freed") as caught:
        read(model)
    assert "clipping by global norm" in str(caught.value)
    optimizer.step()
    assert same(after, weights(model))
    run(model, optimizer, 1)


def test_zeroing_the_gradients_of_the_model() -> None:
    model, optimizer = _after_backward()
    assert repr(model.embed.grad) == "<the gradient of embed, used in backward and freed>"
    with pytest.raises(OptimizerError, match=r"embed was freed in backward and cannot be set to zero"):
        model.zero_grad(set_to_none=False)
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    run(model, optimizer, 1)


def test_without_the_guard_clipping_finds_nothing() -> None:
    model, _ = _after_backward(guard=False)
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e-9) == 0


@pytest.mark.parametrize("guard", [True, False])
def test_grad_scaler_is_refused(guard: bool) -> None:
    model = Toy()
    optimizer = released(model, guard=guard)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(OptimizerError, match="GradScaler does not go with an optimizer in backward"):
        scaler.step(optimizer)
    if guard:
        with pytest.raises(OptimizerError, match="GradScaler does not go with an optimizer in backward"):
            scaler.unscale_(optimizer)

    model, twin = Toy(), Toy()
    optimizer, off = released(model, guard=guard), torch.amp.GradScaler("cpu", enabled=False)
    off.scale(loss_of(model, 0)).backward()
    off.step(optimizer)
    off.update()
    run(twin, plain(twin), 1)
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("clear", [False, True])
def test_accumulation_is_refused_and_names_the_parameter(guard: bool, clear: bool) -> None:
    model, optimizer = _after_backward(guard=guard)
    if clear:
        optimizer.zero_grad()  # takes no step back
    middle = weights(model)
    with pytest.raises(OptimizerError, match=r"^(gain|experts\.w) got a second gradient before step"):
        loss_of(model, 1).backward()
    assert same(middle, weights(model))
    optimizer.zero_grad()
    optimizer.step()
    run(model, optimizer, 1)
    assert not same(middle, weights(model))


def test_an_exception_in_backward_leaves_every_parameter_whole() -> None:
    model, twin = Toy(), Toy()
    left, right = released(model), plain(twin)
    run(model, left, 1)
    run(twin, right, 1)

    def fail(_: Tensor) -> None:
        raise RuntimeError("no memory left")

    before = weights(model)
    handle = model.query.register_hook(fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        loss_of(model, 1).backward()
    handle.remove()
    assert torch.equal(before[1], model.query)
    assert left.state[model.query]["step"] == 1
    assert left.state[model.experts["w"]]["step"] == 2
    loss_of(twin, 1).backward()
    right.step()
    assert torch.equal(model.experts["w"], twin.experts["w"])  # stepped before the failure
    left.zero_grad()
    left.step()
    run(model, left, 2, first=1)
    assert left.state[model.query]["step"] == 3
    assert left.state[model.experts["w"]]["step"] == 4


def test_a_gradient_that_cannot_be_stepped_is_refused_by_name() -> None:
    table = nn.Embedding(16, 12, sparse=True)
    optimizer = released(table)
    before = table.weight.detach().clone()
    with pytest.raises(OptimizerError, match="weight has a sparse gradient"):
        table(torch.tensor([1, 2])).sum().backward()
    assert torch.equal(before, table.weight)
    assert len(optimizer.state) == 0


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_second_derivatives() -> None:
    def penalised(model: Toy) -> Tensor:
        loss = loss_of(model, 0)
        (slope,) = torch.autograd.grad(loss, model.query, create_graph=True)
        return loss + slope.square().sum()

    model, twin = Toy(), Toy()
    left, right = released(model), plain(twin)
    penalised(model).backward()
    left.step()
    penalised(twin).backward()
    right.step()
    assert same(weights(model), weights(twin))
    with pytest.raises(OptimizerError, match=r"create_graph=True\) keeps the gradient of"):
        loss_of(model, 1).backward(create_graph=True)
    for p in model.parameters():
        p.grad = None  # a cycle through the graph otherwise


def test_copies_and_pickles_are_refused_and_the_model_is_not() -> None:
    model, optimizer = _after_backward()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps, lambda o: torch.save(o, io.BytesIO())):
        with pytest.raises(OptimizerError, match="cannot be copied or pickled"):
            attempt(optimizer)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = weights(other)
        loss_of(other, 1).backward()
        assert all(type(p.grad) is Tensor for p in other.parameters())
        assert same(before, weights(other))
        release.attach(other, lambda params: AdamW(params))


def test_detach_returns_the_ordinary_optimizer() -> None:
    model, twin = Toy(), Toy()
    left, right = released(model), plain(twin)
    run(model, left, 2)
    run(twin, right, 2)
    loss_of(model, 2).backward()
    run(twin, right, 1, first=2)
    ordinary = left.detach()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(OptimizerError, match="was detached"):
        left.step()
    left.detach()
    run(model, ordinary, 2, first=3)
    run(twin, right, 2, first=3)
    assert same(weights(model), weights(twin))
    again = release.attach(model, lambda _: ordinary)
    run(model, again, 1, first=5)
    run(twin, right, 1, first=5)
    assert same(weights(model), weights(twin))


def test_one_optimizer_in_backward_for_each_parameter_and_somebody_must_hold_it() -> None:
    model = Toy()
    optimizer = released(model)
    with pytest.raises(OptimizerError, match="embed has an optimizer in backward already"):
        released(model)
    run(model, optimizer, 1)
    del optimizer
    gc.collect()
    with pytest.raises(OptimizerError, match="is gone: nobody holds"):
        loss_of(model, 1).backward()
    model.zero_grad()
    run(model, released(model), 1)


def test_what_a_factory_may_not_return() -> None:
    with pytest.raises(OptimizerError, match=r"returned a torch.optim.\w+.SGD"):
        release.attach(Toy(), lambda params: torch.optim.SGD(params))  # type: ignore[arg-type, return-value]
    with pytest.raises(OptimizerError, match="not of this model"):
        release.attach(Toy(), lambda params: SlimAdam(Toy().parameters()))
    with pytest.raises(OptimizerError, match=r"returned a memadvise.optim.release.Rel"):
        release.attach(Toy(), lambda params: released(Toy()))


@pytest.mark.filterwarnings("ignore:Grad strides do not match")
def test_distributed_data_parallel_is_refused_before_and_after(mesh: Any) -> None:
    with pytest.raises(OptimizerError, match="DistributedDataParallel averages gradients"):
        released(nn.parallel.DistributedDataParallel(Toy()))
    model = nn.Linear(3, 2)
    optimizer = released(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(OptimizerError, match="DistributedDataParallel"):
        wrapped(torch.ones(1, 3)).sum().backward()
    optimizer.zero_grad()


def test_a_trace_of_fake_tensors_runs_through_it() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        model = Toy()
        optimizer = released(model)
        for number in range(2):
            tokens, image = torch.zeros(6, 7, dtype=torch.long), torch.randn(6, 4, 6, 6)
            (model(tokens, image) * number).mean().backward()
            with pytest.raises(OptimizerError, match="embed was used in backward and freed: linalg_vector_norm"):
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # a trace meets the refusal that training would
            optimizer.step()
            assert all(p.grad is None for p in model.parameters())
    real = sum(v.numel() * v.itemsize for state in optimizer.state.values() for v in state.values())
    assert real == sum(m.state_bytes for m in optimizer.memory())
