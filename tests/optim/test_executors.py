"""Every executor computes what the pure functions say, bit for bit torch.optim.AdamW where that is promised,
and none but eager allocates a temporary of a parameter's size."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from cases import Case, all_settings
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import Toy, optimizer_for, same, train, weights

from memadvise.errors import OptimizerError
from memadvise.optim.executors import chunked, eager, inplace
from memadvise.optim.executors.cuts import Cuts, box_shape, boxes
from memadvise.optim.executors.work import Work
from memadvise.optim.method import Context, Hyper, Method, Options, Part, Runs, Shape, StateSpec, Tensors
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.recipe import make_recipe
from memadvise.optim.registry import fitted, list_methods, problems_of
from memadvise.plan.schema import Setting

every_setting = pytest.mark.parametrize(
    ("case", "setting"), all_settings(), ids=lambda x: x.key if isinstance(x, Setting) else None
)
SHAPES = [(), (1,), (7,), (5, 1), (1, 60), (4, 3, 3, 3), (16, 12), (12, 16), (3, 8, 5), (2, 40)]
FITTING = [
    (case, setting, shape)
    for case, setting in all_settings()
    for shape in SHAPES
    if not problems_of(fitted(setting, shape), shape, name="p")
]


def run_one(
    setting: Setting, p: Tensor, grads: list[Tensor], lr: float, executor: str | None, **arguments: Any
) -> tuple[list[Tensor], MemadviseOptimizer]:
    p = nn.Parameter(p.clone(memory_format=torch.preserve_format))
    optimizer = MemadviseOptimizer([("p", p)], setting, lr=lr, weight_decay=0.1, executor=executor, **arguments)
    seen = []
    for g in grads:
        p.grad = g.clone(memory_format=torch.preserve_format)
        optimizer.step()
        seen.append(p.detach().clone())
    return seen, optimizer


def inputs(shape: Shape, dtype: torch.dtype, steps: int = 4) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(len(shape))
    make = lambda: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return make().to(dtype), [make().to(dtype) for _ in range(steps)]


@pytest.mark.parametrize(("case", "setting", "shape"), FITTING, ids=lambda x: getattr(x, "key", None))
def test_chunked_agrees_with_eager_and_eager_with_the_reference(
    case: Case, setting: Setting, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = fitted(setting, shape)
    monkeypatch.setattr(chunked, "CPU_ELEMENTS", 17)  # boxes of a few rows, and parts of rows
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        p, grads = inputs(shape, dtype)
        slow, first = run_one(setting, p, grads, case.lr, "eager")
        quick, second = run_one(setting, p, grads, case.lr, "chunked")
        for left, right in zip(slow, quick, strict=True):
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
        assert list(first.state_dict()["state"]) == list(second.state_dict()["state"])
        for index, state in first.state_dict()["state"].items():
            for name, value in state.items():
                near = tolerance * max(value.abs().max().item() if value.numel() else 0.0, 1.0)  # sums of squares grow
                other = second.state_dict()["state"][index][name]
                torch.testing.assert_close(value, other, rtol=tolerance * 10, atol=near)
        if setting.method != case.method:
            continue  # a vector that fell back to dense state: the adamw case has its reference
        expected = case.reference(p, grads, case.lr, (0.9, 0.999), 1e-8, 0.1, setting.options)
        for left, right in zip(slow, expected, strict=True):
            torch.testing.assert_close(left.double(), right, rtol=tolerance * 10, atol=tolerance * 10)


@every_setting
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_are_computed_in_fp32(case: Case, setting: Setting, dtype: torch.dtype) -> None:
    p, grads = inputs((16, 12), dtype)
    slow, _ = run_one(setting, p, grads, case.lr, "eager")
    quick, _ = run_one(setting, p, grads, case.lr, "chunked")
    wide, _ = run_one(setting, p.float(), [g.float() for g in grads[:1]], case.lr, "eager")
    assert torch.equal(slow[0], wide[0].to(dtype))
    resolution = torch.finfo(dtype).eps
    for left, right in zip(slow, quick, strict=True):
        torch.testing.assert_close(left, right, rtol=resolution, atol=resolution)


@every_setting
def test_layout_in_memory_does_not_matter(case: Case, setting: Setting) -> None:
    p, grads = inputs((8, 4, 3, 3), torch.float32)
    plain, _ = run_one(setting, p, grads, case.lr, None)
    last = [g.to(memory_format=torch.channels_last) for g in grads]
    for left, right in (
        run_one(setting, p.to(memory_format=torch.channels_last), last, case.lr, None),
        run_one(setting, p.to(memory_format=torch.channels_last), grads, case.lr, None),
        run_one(setting, p, last, case.lr, None),
    ):
        assert right.state_dict()["state"].keys() <= {0}
        for a, b in zip(left, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adamw_is_torchs_fused_adamw_bit_for_bit(dtype: torch.dtype) -> None:
    for lr in (1e-2, torch.tensor(1e-2)):
        model = Toy().to(dtype)
        twin = copy.deepcopy(model)
        theirs = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, fused=True)
        ours = optimizer_for(twin, Setting("adamw"), lr)
        assert {m.executor for m in ours.memory()} == {"fused"}
        train(model, theirs, 10)
        train(twin, ours, 10)
        assert same(weights(model), weights(twin))
        for left, right in zip(model.parameters(), twin.parameters(), strict=True):
            for name, value in theirs.state[left].items():
                assert torch.equal(value, ours.state[right][name])


@pytest.mark.parametrize("executor", ["eager", "chunked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str)
def test_adamw_is_torchs_single_tensor_adamw(executor: str, dtype: torch.dtype, tolerance: float) -> None:
    model = Toy().to(dtype)
    twin = copy.deepcopy(model)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=False), 100)
    train(twin, optimizer_for(twin, Setting("adamw"), 1e-3, executor), 100)
    assert max((a - b).abs().max().item() for a, b in zip(weights(model), weights(twin), strict=True)) < tolerance


def test_sgd_is_torchs_sgd_without_decay_or_without_momentum() -> None:
    for momentum, decay in ((0.9, 0.0), (0.0, 0.1)):
        model = Toy().double()
        twin = copy.deepcopy(model)
        train(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=decay), 20)
        setting = Setting("sgd", {"momentum": momentum})
        train(twin, MemadviseOptimizer(twin.parameters(), setting, lr=0.05, weight_decay=decay), 20)
        for left, right in zip(weights(model), weights(twin), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


def test_forcing_fused_where_it_is_not_the_same_arithmetic() -> None:
    with pytest.raises(OptimizerError, match=r"embed \(slimadam\(axes=\[1\]\), float32\) cannot use the fused"):
        optimizer_for(Toy(), Setting("slimadam", {"axes": [1]}), 1e-2, "fused")
    with pytest.raises(OptimizerError, match=r"embed \(adamw, bfloat16\) cannot use the fused executor"):
        optimizer_for(Toy().bfloat16(), Setting("adamw"), 1e-2, "fused")
    assert {m.executor for m in optimizer_for(Toy(), Setting("adamw"), 1e-2, "fused").memory()} == {"fused"}


# ---------------------------------------------------------------- boxes


@given(st.lists(st.integers(0, 7), max_size=4), st.integers(1, 60))
def test_boxes_cover_every_element_once_and_are_bounded(shape: list[int], limit: int) -> None:
    found: list[tuple[int, ...]] = []
    for box in boxes(tuple(shape), limit):
        assert math.prod(box_shape(box)) <= limit
        found += itertools.product(*(range(part.start, part.stop) for part in box))
    assert sorted(found) == sorted(itertools.product(*(range(size) for size in shape)))
    assert len(found) == math.prod(shape)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 60), st.integers(1, 4), st.integers(1, 3))
def test_boxes_hold_whole_runs_and_what_belongs_to_them(
    shape: list[int], limit: int, length: int, entries: int
) -> None:
    cuts = Cuts(tuple(shape), limit, granule=length)
    inner = math.prod(shape[1:])
    assert all(box[0].start % length == 0 for box in cuts.boxes)
    if length > 1:
        assert all(math.prod(cut) <= max(limit, length * inner) for cut in cuts.shapes)
        held = torch.arange(3 * (shape[0] // length * entries + min(shape[0] % length, entries))).view(3, -1)
        parts = cuts.runs(held, Runs(length, entries, axis=1))
        assert torch.equal(torch.cat(list(parts), 1), held)  # nothing twice, nothing lost
        for box, part in zip(cuts.boxes[:-1], parts, strict=False):
            assert part.shape == (3, (box[0].stop - box[0].start) // length * entries)


# ---------------------------------------------------------------- methods to come


class TwoPasses(Method):
    """Scales by the inverse of the column means of (g - mean g)^2: two rounds, sums across rows, no in-place form."""

    name = "two_passes"
    summary = source = bytes_help = "for this test"

    def spec(self, shape: Shape, options: Any, dtype: torch.dtype) -> dict[str, StateSpec]:
        return {"columns": StateSpec((1, shape[1]), dtype), "last": StateSpec(shape, dtype, elementwise=True)}

    def rounds(self, options: Any) -> int:
        return 2

    def sums_spec(self, shape: Shape, options: Any, round_: int) -> dict[str, Shape]:
        return {"total": (1, 1)} if round_ == 0 else {"squares": (1, shape[1])}

    def reduced_axes(self, shape: Shape, options: Any) -> tuple[int, ...] | None:
        return None

    def stats(self, part: Part, ctx: Context, round_: Any) -> Tensors:
        if round_ == 0:
            return {"total": part.g.sum().reshape(1, 1)}
        return {"squares": (part.g - part.small["mean"]).square().sum(0, keepdim=True)}

    def finish(
        self, sums: Tensors, state: Tensors, small: Tensors, ctx: Context, round_: int
    ) -> tuple[Tensors, Tensors]:
        if round_ == 0:
            return {"mean": sums["total"] / math.prod(ctx.shape)}, {}
        columns = state["columns"] + sums["squares"] / ctx.shape[0]
        return {"scale": 1 / columns}, {"columns": columns}

    def update(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        return ctx.h.lr * part.small["scale"] * (part.g + part.state["last"]), {"last": part.g}


def test_a_method_of_several_rounds_without_in_place_form_runs_in_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_ELEMENTS", 20)
    assert set(inplace.APPLY) <= set(list_methods())
    method, h = TwoPasses(), Hyper(0.1, 0.9, 0.999, 1e-8, 0.0)
    p, grads = inputs((9, 6), torch.float64)
    results = []
    for executor in (eager, chunked):
        recipe = make_recipe(method, Options(), (9, 6), torch.float64)
        state = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in recipe.specs.items()}
        x = p.clone()
        for g in grads:
            executor.step([Work(x, g, state, recipe)], h)
        results.append((x, state))
    torch.testing.assert_close(results[0], results[1])
    assert not torch.equal(results[0][0], p)
    predicted = chunked.scratch_bytes(recipe, "cpu")
    assert 8 * 20 < predicted < 8 * 20 * 9


# ---------------------------------------------------------------- memory of a step


def transient_bytes(optimizer: MemadviseOptimizer) -> int:
    """The highest point of live allocations within one step, from the CPU allocator's events."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    assert recorded.profiler is not None
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_setting
def test_a_step_allocates_no_more_than_its_scratch(case: Case, setting: Setting, dtype: torch.dtype) -> None:
    rows, columns = 2048, 1024
    p = nn.Parameter(torch.zeros(rows, columns, dtype=dtype))
    p.grad = torch.ones_like(p)
    optimizer = MemadviseOptimizer([("p", p)], setting, lr=case.lr, weight_decay=0.1)
    optimizer.step()  # makes the state
    (record,) = optimizer.memory()
    measured = transient_bytes(optimizer)
    assert measured <= record.scratch_bytes + 4096  # 0-dim scalars of the step
    assert measured < 4 * 2**20 < rows * columns * 4
    if record.executor == "chunked" and not case.rare_scratch:
        assert record.scratch_bytes < 3 * max(measured, 1)  # an upper bound, not a guess far above

    oracle = MemadviseOptimizer([("p", p)], setting, lr=case.lr, weight_decay=0.1, executor="eager")
    oracle.step()
    seen = transient_bytes(oracle)  # the measure does see temporaries of a parameter's size
    assert rows * columns * 4 <= seen <= oracle.memory()[0].scratch_bytes + 4096


@every_setting
def test_many_parameters_share_one_scratch(case: Case, setting: Setting) -> None:
    ps = [nn.Parameter(torch.zeros(512, 512)) for _ in range(6)]
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer = MemadviseOptimizer(ps, setting, lr=case.lr)
    optimizer.step()
    assert transient_bytes(optimizer) <= max(m.scratch_bytes for m in optimizer.memory()) + 16384
