"""Weights in int8 groups: rounding, the tensor inside a model, and every method on top of it."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, all_settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_executors import transient_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy import Toy, batch, loss_of, same, train

from memadvise.errors import Mark, OptimizerError, PlanError
from memadvise.optim import AdamW, SlimAdam, create_optimizer, noise, release
from memadvise.optim.create import hold_weights
from memadvise.optim.executors import chunked
from memadvise.optim.int8_groups import decode, encode_
from memadvise.optim.int8_weights import Int8Weight, dequantize_weights, quantize_weights
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import problems_of
from memadvise.plan.schema import Plan, Rule, Setting

SETTINGS = [(case, setting) for case, setting in all_settings() if "weights" not in setting.options]
COMPOSED = [
    Setting("adamw", {"first_moment": "int8", "second_moment": "int8"}),
    Setting("slimadam", {"axes": [1], "first_moment": "int4", "cautious": True}),
    Setting("lion", {"cautious": True, "cautious_decay": True}),
]
CASES = {case.method: case for case, _ in SETTINGS}
every_setting = pytest.mark.parametrize(
    ("case", "setting"),
    SETTINGS + [(CASES[s.method], s) for s in COMPOSED],
    ids=lambda x: x.key if isinstance(x, Setting) else None,
)
FIRST = [(case, setting) for case, setting in SETTINGS if setting in case.settings[:1]]
every_method = pytest.mark.parametrize(("case", "setting"), FIRST, ids=[setting.key for _, setting in FIRST])
MATRICES = ["embed", "query", "conv", "experts.w"]


def held(p: Tensor) -> Int8Weight:
    assert isinstance(p, Int8Weight)
    return p


def bytes_of(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return held(p).codes.clone(), held(p).scale.clone(), held(p).zero.clone()


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bytes_of(left), bytes_of(right), strict=True))


def scales(w: Int8Weight) -> Tensor:
    """The scale of every element."""
    expanded = w.scale.double().repeat_interleave(w.group, 1)[:, : w.rows.length]
    return expanded.reshape(w.shape)


def values(model: nn.Module) -> list[Tensor]:
    return [p.dequantize() if isinstance(p, Int8Weight) else p.detach().clone() for p in model.parameters()]


def int8_toy(seed: int = 0, dtype: torch.dtype = torch.float32, group: int = 128) -> Toy:
    model = Toy(seed).to(dtype)
    assert quantize_weights(model, group=group) == MATRICES
    return model


def optimizer_for(model: nn.Module, setting: Setting, lr: float, executor: str | None = None) -> MemadviseOptimizer:
    return MemadviseOptimizer(model.named_parameters(), setting, lr=lr, weight_decay=0.1, executor=executor)


# ---------------------------------------------------------------- rounding


def requantized(target: Tensor, start: Int8Weight, times: int, key: int) -> Tensor:
    """``target`` (one group) written back that many times, each time over ``start`` and with other random numbers."""
    codes, scale, zero = (t.reshape(1, -1).repeat(times, 1) for t in (start.codes, start.scale, start.zero))
    uniform = noise.uniform(key, 0, times * target.numel(), "cpu").view(times, -1)
    encode_(target.expand(times, -1), codes, scale, zero, start.group, uniform)
    return decode(codes, scale, zero, start.group, torch.empty(codes.shape))


@pytest.mark.parametrize("fresh", [False, True], ids=["scale kept", "fresh scale"])
def test_golden_9_stochastic_rounding_is_unbiased(fresh: bool) -> None:
    times = 10_000
    w = Int8Weight.from_float(torch.randn(1, 128, generator=torch.Generator().manual_seed(0)) * 0.02)
    scale = w.scale.item()
    target = w.dequantize() + 0.1 * scale
    if fresh:
        w.scale.zero_()
    results = requantized(target, w, times, key=9).double()
    lowest, highest = results.amin(0), results.amax(0)
    steps = ((highest - lowest) / scale).round()  # the two neighbours of each weight
    assert steps.max() == 1
    share = ((target - lowest) / (highest - lowest)).double().nan_to_num(0).clamp(0, 1)
    sigma = (highest - lowest) * (share * (1 - share) / times).sqrt()
    off = (results.mean(0) - target).abs()
    assert off.mean() < 3 * sigma.mean() / math.sqrt(2)  # of a normal error: E|x| = 0.8 sigma
    assert (results.mean() - target.mean()).abs() < 3 * sigma.square().sum().sqrt() / 128
    beyond = (off > 3 * sigma + 1e-12).double().mean()
    assert beyond <= 0.02  # 0.3 % are expected of 128 weights, each on its own
    ends = [target.argmin(), target.argmax()]  # no clamping there
    assert all(off.flatten()[end] <= 4 * sigma.flatten()[end] + 1e-12 for end in ends)


def test_golden_9_an_all_positive_group_comes_back_within_half_a_scale() -> None:
    w = torch.linspace(1.0, 1.1, 128).view(1, 128)
    q = Int8Weight.from_float(w)
    assert q.scale.item() == pytest.approx(1.1 / 254, rel=2**-7)
    assert (q.dequantize() - w).abs().max() <= q.scale.item() / 2
    q = Int8Weight.from_float(-w)
    assert (q.dequantize() + w).abs().max() <= q.scale.item() / 2


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.sampled_from([1, 3, 8, 128]),
    st.floats(-20, 20),
    st.floats(-8, 8),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 2**32),
)
def test_groups_round_trip(
    shape: list[int], group: int, shift: float, exponent: float, dtype: torch.dtype, seed: int
) -> None:
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exponent = max(exponent, -2) if dtype == torch.float16 else exponent
    w = ((draw + shift) * 10.0 ** min(exponent, 2)).to(dtype)
    q = Int8Weight.from_float(w, group)
    assert (q.shape, q.dtype, q.codes.dtype, q.scale.dtype, q.zero.dtype) == (
        w.shape, dtype, torch.uint8, torch.bfloat16, torch.uint8,
    )  # fmt: skip
    exact = (q.codes.double().view(q.rows.count, -1) - _each(q, q.zero)) * _each(q, q.scale)
    exact = exact.view(w.shape)
    s = scales(q)
    assert ((exact - w.double()).abs() <= s * (0.5 + 1e-5)).all()
    torch.testing.assert_close(q.dequantize(), exact.to(dtype), rtol=0, atol=0)
    # whatever the noise, a weight on the grid stays where it is
    codes = q.codes.clone()
    wide = exact.to(torch.promote_types(dtype, torch.float32))
    uniform = torch.rand(w.numel(), generator=torch.Generator().manual_seed(seed)).view(q.rows.count, -1)
    parts = q.region(0, w.numel())
    encode_(wide.reshape(parts[0].shape), *parts, group, uniform.reshape(parts[0].shape))
    again = ((q.codes.double().view(q.rows.count, -1) - _each(q, q.zero)) * _each(q, q.scale)).view(w.shape)
    if torch.equal(s, scales(q)):
        assert torch.equal(again, exact)
    else:  # few elements may not use the range of their scale: then it shrinks
        assert ((again - exact).abs() <= s).all()
    assert codes.shape == q.codes.shape


def _each(q: Int8Weight, t: Tensor) -> Tensor:
    return t.double().repeat_interleave(q.group, 1)[:, : q.rows.length]


def test_small_updates_arrive_on_average_and_to_the_nearest_they_are_lost() -> None:
    for executor, rounding in (("chunked", "random"), ("chunked", "nearest")):
        p = nn.Parameter(Int8Weight.from_float(torch.randn(64, 128, generator=torch.Generator().manual_seed(1))))
        before, step = p.dequantize(), p.scale.float().mean().item() / 50
        optimizer = MemadviseOptimizer([("p", p)], Setting("sgd", {"momentum": 0.0}), lr=1.0, executor=executor)
        for _ in range(100):
            if rounding == "random":
                p.grad = torch.full_like(p, step)
                optimizer.step()
            else:
                with torch.no_grad():
                    p.copy_(p.dequantize() - step)
        moved = (before - p.dequantize()).mean().item()
        if rounding == "random":
            assert moved == pytest.approx(100 * step, rel=0.05)
        else:
            assert abs(moved) < 0.05 * 100 * step


def test_zero_constant_and_non_finite_groups() -> None:
    w = torch.zeros(6, 128)
    w[1] = 3.0
    w[2, 5], w[3, 6] = float("nan"), float("inf")
    w[4] = 1e-42
    w[5, 0] = 3e38
    q = Int8Weight.from_float(w)
    back = q.dequantize()
    assert torch.equal(back[0], torch.zeros(128))
    torch.testing.assert_close(back[1], w[1], rtol=2e-3, atol=0)
    assert not back[2].isfinite().any()  # the whole group, and no other
    assert not back[3].isfinite().any()
    assert back[[0, 1, 4, 5]].isfinite().all()
    torch.testing.assert_close(back[5], w[5], rtol=4e-3, atol=0)


# ---------------------------------------------------------------- the tensor in a model


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(3, 16, 32))])
        self.d = nn.ParameterDict({"a": nn.Parameter(torch.randn(16, 32))})

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("bi,eoi->beo", x, self.w[0]).mean(1) + x @ self.w[0][2].t()
        return mixed + torch.cat([nn.functional.linear(x, w) for w in self.d["a"].chunk(2)], 1)


class Recomputed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]


TOKENS = torch.arange(20).view(4, 5)
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "linear": (lambda: nn.Linear(300, 40), (torch.randn(2, 3, 300),)),
    "embedding": (lambda: nn.Embedding(30, 40, padding_idx=3), (TOKENS,)),
    "embedding of few columns": (lambda: nn.Embedding(30, 6), (TOKENS,)),
    "bag": (lambda: nn.EmbeddingBag(30, 16), (TOKENS,)),
    "conv": (lambda: nn.Conv2d(8, 16, 3), (torch.randn(2, 8, 9, 9),)),
    "lstm": (lambda: nn.LSTM(16, 32, num_layers=2), (torch.randn(5, 3, 16),)),
    "attention": (lambda: nn.TransformerEncoderLayer(32, 4, dropout=0.0), (torch.randn(5, 3, 32),)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(40, 40)), (torch.randn(3, 40),)),
    "views": (Experts, (torch.randn(7, 32),)),
    "checkpoint": (lambda: Recomputed(nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 40)), (torch.randn(3, 40),)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_forward_and_backward_are_those_of_the_floats(name: str, dtype: torch.dtype) -> None:
    make, inputs = MODULES[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    assert quantize_weights(model)
    plain = copy.deepcopy(model)
    assert dequantize_weights(plain)
    outputs = []
    for each in (model, plain):
        output = each(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        output.square().mean().backward()
        outputs.append(output)
    assert torch.equal(*outputs)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert type(p.grad) is Tensor
        assert torch.equal(p.grad, q.grad)
        assert p.grad.stride() == q.grad.stride()


def test_autograd_keeps_bytes_not_floats() -> None:
    model = nn.Sequential(nn.Embedding(50, 256), nn.Linear(256, 300), nn.GELU(), nn.Linear(300, 50, bias=False))
    quantize_weights(model)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for autocast in (False, True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", enabled=autocast):
            model(TOKENS)
        assert sum(isinstance(t, Int8Weight) for t in kept) == 2
        floats = [t for t in kept if not isinstance(t, Int8Weight) and t.is_floating_point()]
        assert max(t.numel() for t in floats) <= TOKENS.numel() * 300


def test_a_backward_pass_through_weights_that_were_stepped_is_an_error_as_for_floats() -> None:
    layer = nn.Linear(40, 40)
    quantize_weights(layer)
    optimizer = optimizer_for(layer, Setting("adamw"), 1e-2)
    loss = layer(torch.randn(3, 40, requires_grad=True)).sum()
    layer.weight.grad = torch.ones(40, 40)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bytes_held() -> None:
    p = Int8Weight.from_float(torch.randn(512, 1024))
    assert p.nbytes_held == 512 * 1024 * (1 + 3 / 128)
    assert p.nbytes_held == sum(t.untyped_storage().nbytes() for t in (p.codes, p.scale, p.zero))
    assert p.nbytes == 4 * 512 * 1024
    ragged = Int8Weight.from_float(torch.randn(10, 300))
    assert ragged.nbytes_held == 10 * (300 + 3 * 3)
    conv = Int8Weight.from_float(torch.randn(16, 64, 3, 3))
    assert conv.nbytes_held == 16 * (576 + 3 * 5)  # a group runs along [in, kh, kw]
    everything = vars(p).values()
    assert sum(t.nbytes for t in everything if isinstance(t, Tensor)) == p.nbytes_held


@pytest.mark.parametrize("through", ["quantize_weights", "create_optimizer"])
def test_turning_a_model_into_int8_frees_its_floats_one_by_one(through: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(12)])
        if through == "quantize_weights":
            quantize_weights(model)
        else:
            create_optimizer(model, Setting("lion", {"weights": "int8"}), lr=1e-3)
    assert recorded.profiler is not None
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    one = 1024 * 1024
    assert live == 12 * one * (1 + 3 / 128)
    assert peak < 12 * 4 * one + 12 * one  # not 12 * 4 and 12 * 1: what rounding takes of one layer


def test_copies_files_and_state_dicts() -> None:
    model = int8_toy()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert [name for name, value in state.items() if isinstance(value, Int8Weight)] == MATRICES
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), int8_toy(seed=5)]
    others[2].load_state_dict(state)
    for other in others:
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert isinstance(q, nn.Parameter)
            assert p is not q
            assert q.requires_grad
            if isinstance(p, Int8Weight):
                assert same_bytes(p, q)
                assert held(q).codes.data_ptr() != p.codes.data_ptr()
            else:
                assert torch.equal(p, q)
    plain = Toy(seed=5)
    plain.load_state_dict(state)  # into floats: what the bytes stand for
    assert all(torch.equal(a, b) for a, b in zip(values(model), plain.parameters(), strict=True))
    assert not any(isinstance(p, Int8Weight) for p in plain.parameters())
    again = int8_toy(seed=5)
    again.load_state_dict(Toy().state_dict())  # from floats: rounded to the nearest
    assert all(same_bytes(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True) if p.ndim > 1)
    other_group = int8_toy(seed=5, group=16)
    other_group.load_state_dict(state)
    assert held(other_group.embed).group == 16
    assert (other_group.embed.dequantize() - held(model.embed).dequantize()).abs().max() < 0.01
    part = pickle.loads(pickle.dumps(held(model.query).detach().t()))
    assert type(part) is Tensor
    assert torch.equal(part, held(model.query).dequantize().t())


def test_devices_and_dtypes() -> None:
    model = int8_toy()
    before = bytes_of(model.conv)
    loss_of(model, 0).backward()
    embed = model.embed
    model.bfloat16()
    assert model.embed is embed
    assert isinstance(embed, nn.Parameter)
    assert (embed.dtype, held(embed).codes.dtype, held(embed).scale.dtype) == (
        torch.bfloat16, torch.uint8, torch.bfloat16,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, bytes_of(model.conv), strict=True))
    assert model(*batch(0)[:2]).dtype == torch.bfloat16
    assert embed.dequantize().dtype == torch.bfloat16
    copied = held(embed).to(torch.float32)
    assert isinstance(copied, Int8Weight)
    assert copied.codes.data_ptr() != held(embed).codes.data_ptr()
    assert held(embed).to(torch.int32).dtype == torch.int32
    model.to("meta")
    assert held(model.embed).codes.device.type == model.embed.device.type == "meta"
    ordinary = torch.zeros_like(copied), torch.empty_like(copied, dtype=torch.float64), copied.new_zeros(3, 4)
    assert all(type(t) is Tensor and t.is_contiguous() for t in ordinary)
    assert "shape=[16, 12]" in repr(copied)


def test_changes_in_place() -> None:
    model = int8_toy()
    p = held(model.embed)
    for change in (
        lambda: p.data.add_(1),
        lambda: torch.optim.SGD([p], lr=0.1).step(),
        lambda: torch._foreach_mul_([p.detach()], 2.0),
        lambda: p.data.t().zero_(),
        lambda: setattr(p, "data", torch.zeros(16, 12)),
    ):
        p.grad = torch.ones_like(p)
        with pytest.raises(OptimizerError, match=r"int8 weights cannot|part of int8 weights cannot"):
            change()
    whole = torch.randn(16, 12)
    with torch.no_grad():
        p.copy_(whole)
    assert ((p.dequantize() - whole).abs() <= scales(p) * 0.50001).all()
    nn.init.zeros_(p)
    assert not p.dequantize().any()
    nn.init.normal_(p, std=2.0)
    assert 1 < p.dequantize().std() < 3
    other = held(int8_toy(seed=3).embed)
    p.data = other.data
    assert same_bytes(p, other)


# ---------------------------------------------------------------- models


def test_quantize_weights_chooses_by_name_and_kind() -> None:
    model = Toy()
    model.register_parameter("frozen", nn.Parameter(torch.randn(4, 4), requires_grad=False))
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 4)))
    with pytest.raises(OptimizerError, match="'nothing' matches no parameter of the model"):
        quantize_weights(model, ["embed", "nothing"])
    with pytest.raises(OptimizerError, match="'bias' matches no matrix of floats of the model"):
        quantize_weights(model, "bias")
    with pytest.raises(OptimizerError, match="group should be"):
        quantize_weights(model, group=0)
    handle = model.query.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(OptimizerError, match="query has hooks"):
        quantize_weights(model)
    assert not any(isinstance(p, Int8Weight) for p in model.parameters())
    handle.remove()
    model.query._post_accumulate_grad_hooks = None
    assert quantize_weights(model, ["e*", "experts.w"], group=16) == ["embed", "experts.w"]
    assert held(model.embed).group == 16
    assert quantize_weights(model) == ["query", "conv", "frozen"]
    assert held(model.embed).group == 16  # in int8 already
    assert not model.frozen.requires_grad
    assert not isinstance(model.empty, Int8Weight)
    assert dequantize_weights(model) == ["embed", "query", "conv", "frozen", "experts.w"]
    assert not any(isinstance(p, Int8Weight) for p in model.parameters())
    assert not model.frozen.requires_grad


def test_tied_weights_stay_tied_and_are_stepped_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 40), "head": nn.Linear(40, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    plan = Plan(rules=(Rule("embed.*", "sgd", {"momentum": 0.0, "weights": "int8"}),))
    optimizer = create_optimizer(model, plan, lr=0.5)
    p = held(model["embed"].weight)
    assert model["head"].weight is p
    before = p.dequantize()
    model["head"](model["embed"](torch.arange(6))).sum().backward()
    optimizer.step()
    assert ((p.dequantize() - (before - 0.5 * p.grad)).abs() <= scales(p) * 1.001).all()
    dequantize_weights(model)
    assert model["head"].weight is model["embed"].weight


def test_create_optimizer_makes_int8_what_the_plan_says() -> None:
    rules = (Rule("e*", "slimadam", {"axes": [1], "weights": "int8"}), Rule("**", "adamw"))
    model, plan = Toy(), Plan(rules=rules)
    with pytest.raises(OptimizerError, match="lr should be"):
        create_optimizer(model, plan, lr=-1)
    with pytest.raises(OptimizerError, match="fused"):
        create_optimizer(model, Setting("adamw", {"weights": "int8"}), lr=1e-2, executor="fused")
    groups = [{"params": [model.bias]}, {"params": [model.query, model.embed]}]
    with pytest.raises(OptimizerError, match="group 1 holds embed, which weights: int8 would replace") as caught:
        create_optimizer(model, plan, lr=1e-2, param_groups=groups)
    assert "quantize_weights" in str(caught.value.hint)
    assert not any(isinstance(p, Int8Weight) for p in model.parameters())  # nothing is half done

    optimizer = create_optimizer(model, plan, lr=1e-2)
    assert [name for name, p in model.named_parameters() if isinstance(p, Int8Weight)] == ["embed"]
    assert {m.name: m.setting for m in optimizer.memory()}["embed"] == "slimadam(axes=[1], weights=int8)"
    groups = [{"params": [model.bias]}, {"params": [model.query, model.embed]}]
    assert len(create_optimizer(model, plan, lr=1e-2, param_groups=groups).param_groups) == 2
    train(model, optimizer, 2)

    model = Toy()
    assert hold_weights(model, plan) == ["embed"]
    assert hold_weights(model, plan) == []
    model = Toy()
    optimizer = create_optimizer(model, Setting("lion", {"weights": "int8"}), lr=1e-3)  # vectors stay as they are
    assert [name for name, p in model.named_parameters() if isinstance(p, Int8Weight)] == MATRICES
    assert optimizer.settings()["bias"] == Setting("lion")

    mark = Mark("plan.yaml", 3, 5)
    wrong = Plan(rules=(Rule("**", "adamw", {"weights": "int8"}, marks={"weights": mark}),))
    with pytest.raises(
        PlanError, match=r"bias: weights: int8 is for matrices, not for a tensor of shape \[8\]"
    ) as seen:
        create_optimizer(Toy(), wrong, lr=1e-2)
    assert seen.value.problems[0].where == mark


def test_plain_classes_take_int8_weights_and_refuse_to_make_them() -> None:
    model = Toy()
    with pytest.raises(OptimizerError, match=r"embed: weights: int8 needs a parameter .*quantize_weights\(model\)"):
        AdamW(model.named_parameters(), lr=1e-2, weights="int8")
    quantize_weights(model)
    optimizer = SlimAdam(model.named_parameters(), lr=1e-2)  # need not be said
    assert {m.setting for m in optimizer.memory()} == {"slimadam(axes=[1], weights=int8)", "adamw"}
    AdamW(model.named_parameters(), lr=1e-2, weights="int8")
    with pytest.raises(OptimizerError, match="embed holds int8 weights, which weights: stochastic cannot write"):
        AdamW(model.named_parameters(), lr=1e-2, weights="stochastic")
    with pytest.raises(OptimizerError, match="a part of int8 weights"):
        AdamW([("p", nn.Parameter(held(model.embed).detach().t()))], lr=1e-2)


# ---------------------------------------------------------------- every method


@every_setting
def test_chunked_is_eager_to_the_byte(case: Case, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_ELEMENTS", 600)
    generator = torch.Generator().manual_seed(0)
    checked = 0
    for shape in ((24, 128), (2, 1500), (9, 200), (120, 20), (6, 40, 3, 3), (5, 8, 64)):
        if problems_of(setting, shape, name="p"):
            continue
        checked += 1
        w = torch.randn(shape, generator=generator, dtype=torch.float64)
        grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
        results = []
        for executor in ("eager", "chunked"):
            p = nn.Parameter(Int8Weight.from_float(w))
            optimizer = MemadviseOptimizer([("p", p)], setting, lr=case.lr, weight_decay=0.1, executor=executor)
            for g in grads:
                p.grad = g.clone()
                optimizer.step()
            results.append(p)
            assert not torch.equal(p.dequantize(), Int8Weight.from_float(w).dequantize())
        differing = (held(results[0]).codes != held(results[1]).codes).double().mean()
        assert differing == 0 or not same_bytes(*results)
        assert differing == 0
    assert checked


@every_method
def test_state_is_ordinary_and_its_bytes_are_known(case: Case, setting: Setting) -> None:
    model = int8_toy(dtype=torch.bfloat16)
    optimizer = optimizer_for(model, setting, case.lr)
    train(model, optimizer, 2)
    found = [v for state in optimizer.state.values() for v in state.values()]
    assert {type(v) for v in found} <= {Tensor}
    assert sum(v.numel() * v.itemsize for v in found) == sum(m.state_bytes for m in optimizer.memory())
    assert all(isinstance(p, Int8Weight) == (p.ndim > 1) for p in model.parameters())


@every_method
def test_lr_zero_leaves_every_weight(case: Case, setting: Setting) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = int8_toy(dtype=dtype)
        before = values(model)
        train(model, optimizer_for(model, setting, 0.0), 3)
        assert same(before, values(model))


@every_method
def test_it_trains(case: Case, setting: Setting) -> None:
    model = int8_toy()
    optimizer = optimizer_for(model, setting, case.lr * (5 if case.method == "sgd" else 1))
    first = loss_of(model, 0).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()
    assert loss_of(model, 0).item() < 0.8 * first


@every_method
def test_resume_is_bit_for_bit(case: Case, setting: Setting) -> None:
    model = int8_toy()
    optimizer = optimizer_for(model, setting, case.lr)
    train(model, optimizer, 3)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = Toy(seed=7)
    loaded = create_optimizer(other, Plan(rules=_rules(optimizer)), lr=9.0, weight_decay=0.5)
    other.load_state_dict(saved["model"])
    loaded.load_state_dict(saved["optimizer"])
    for each, own in ((model, optimizer), (twin, twin_optimizer), (other, loaded)):
        train(each, own, 3, first=3)
    for p, q, r in zip(model.parameters(), twin.parameters(), other.parameters(), strict=True):
        for also in (q, r):
            assert same_bytes(p, also) if isinstance(p, Int8Weight) else torch.equal(p, also)


def _rules(optimizer: MemadviseOptimizer) -> tuple[Rule, ...]:
    return tuple(Rule(name, s.method, dict(s.options)) for name, s in optimizer.settings().items())


CHILD = """
import sys, torch
from toy import Toy, train
from memadvise.optim import create_optimizer
from memadvise.plan.schema import Setting
model = Toy(seed=7)
optimizer = create_optimizer(model, Setting("adamw", {"weights": "int8"}), lr=9.0)
saved = torch.load(sys.argv[1] + "/saved.pt", weights_only=True)
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
train(model, optimizer, 3, first=3)
torch.save(model.state_dict(), sys.argv[1] + "/out.pt")
"""


def test_resume_in_a_fresh_process(tmp_path: Path) -> None:
    model = int8_toy()
    optimizer = optimizer_for(model, Setting("adamw"), 1e-2)
    train(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(model, optimizer, 3, first=3)
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], check=True, env=environment, timeout=120)
    for name, value in torch.load(tmp_path / "out.pt", weights_only=True).items():
        p = dict(model.named_parameters())[name]
        assert same_bytes(p, value) if isinstance(p, Int8Weight) else torch.equal(p, value)


@every_method
@pytest.mark.parametrize("shape", [(2048, 1024), (2000, 1000)], ids=str)
def test_a_step_makes_no_floats_of_the_parameters_size(case: Case, setting: Setting, shape: tuple[int, int]) -> None:
    if problems_of(setting, shape, name="p"):
        pytest.skip("the setting does not fit the shape")
    p = nn.Parameter(Int8Weight.from_float(torch.ones(shape)))
    p.grad = torch.ones(shape)
    optimizer = MemadviseOptimizer([("p", p)], setting, lr=case.lr, weight_decay=0.1)
    optimizer.step()
    (record,) = optimizer.memory()
    assert record.executor in ("chunked", "compiled")
    measured = transient_bytes(optimizer)
    assert measured <= record.scratch_bytes + 4096
    if shape[1] % 128 == 0:  # rows of whole groups: boxes of any method fit them
        assert measured < math.prod(shape) * 4


@every_method
@pytest.mark.parametrize("executor", ["eager", "chunked"])
def test_a_step_reads_nothing_and_runs_in_a_trace(case: Case, setting: Setting, executor: str) -> None:
    from torch._subclasses import FakeTensorMode

    from memadvise.optim.method import assume_device

    def step(make: Callable[[tuple[int, ...]], Tensor], kind: str) -> None:
        names = {n: p.shape for n, p in Toy().named_parameters() if p.ndim > 1}
        ps = {n: nn.Parameter(Int8Weight.from_float(make(shape))) for n, shape in names.items()}
        optimizer = MemadviseOptimizer(ps.items(), setting, lr=1e-2, weight_decay=0.1, executor=executor)
        for _ in range(2):
            for p in ps.values():
                p.grad = torch.empty_like(p)
            optimizer.step()
        for p in ps.values():
            assert p.codes.device.type == kind
            for spec_name, value in optimizer.state.get(p, {}).items():
                assert value.device.type in (kind, "cpu"), spec_name

    step(lambda shape: torch.empty(shape, device="meta"), "meta")
    with FakeTensorMode(), assume_device("cuda"):
        step(torch.empty, "cpu")


def test_a_nan_gradient_spoils_its_group_and_no_other() -> None:
    p = nn.Parameter(Int8Weight.from_float(torch.randn(4, 256)))
    optimizer = MemadviseOptimizer([("p", p)], Setting("adamw"), lr=1e-2)
    p.grad = torch.zeros(4, 256)
    p.grad[1, 200] = float("nan")
    optimizer.step()
    lost = p.dequantize().isnan()
    assert lost[1, 128:].all()
    assert lost.sum() == 128


def test_steps_in_backward_are_the_steps_of_the_plain_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 300), nn.GELU(), nn.Linear(300, 10))
    other, setting = copy.deepcopy(model), Setting("adamw", {"weights": "int8"})
    released = release.attach(model, lambda _: create_optimizer(model, setting, lr=1e-3))
    plain = create_optimizer(other, setting, lr=1e-3)
    for _ in range(3):
        x = torch.randn(8, 40)
        for each, optimizer in ((model, released), (other, plain)):
            each(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same_bytes(model[0].weight, other[0].weight)
    assert same(values(model), values(other))
