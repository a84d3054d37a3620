"""The compiled executor agrees with eager, compiles once, allocates nothing, and steps aside with one warning."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memadvise.memory.allocator_log import allocator_log
from memadvise.optim import Int8Weight, quantize_weights
from memadvise.optim.executors import compiled
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.plan.schema import Setting

COMPILER = any(map(shutil.which, ("g++", "clang++", "c++", os.environ.get("CXX", "g++"))))
pytestmark = [
    pytest.mark.slow,  # a kernel takes a second or two to compile
    pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler here; everything runs chunked"),
]

INT8 = {"first_moment": "int8", "second_moment": "int8"}
SETTINGS = [
    Setting("adamw", {"compat": "official"}),
    Setting("adamw", {"cautious": True}),
    Setting("adamw", {"cautious": "paper", "cautious_decay": True, "first_moment": "bf16"}),
    Setting("adamw", INT8),
    Setting("slimadam", {"axes": [1]}),
    Setting("slimadam", {"axes": [0]}),
    Setting("slimadam", {"axes": [0, 1]}),
    Setting("slimadam", {"axes": [1], "first_moment": "int8", "cautious": True}),
    Setting("adam_mini", {"partition": "head", "heads": 4}),
    Setting("lion", {"first_moment": "int8"}),
    Setting("sgd"),
    Setting("adafactor"),
    Setting("adafactor", {"momentum": 0.9, "step_size": "relative"}),
    Setting("came", {"correct_instability": True}),
    Setting("rmsprop", {"store": "factored"}),
    Setting("rmsprop", {"store": "mean", "momentum": 0.9}),
    Setting("adagrad"),
]
FORMS = [
    (Setting("slimadam", {"axes": [1], "weights": "stochastic"}), torch.bfloat16),
    (Setting("adamw", {"weights": "stochastic", "second_moment": "int8"}), torch.bfloat16),
    (Setting("sgd"), torch.float16),
    (Setting("slimadam", {"axes": [0]}), torch.bfloat16),
    (Setting("lion"), torch.float64),
]
ROWS = (192, 448)  # one kernel for both


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    compiled.forget()
    yield
    compiled.forget()


class Matrices(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = ROWS, columns: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(n, columns, generator=generator) for n in rows]
        self.matrices = nn.ParameterList(nn.Parameter(m.to(dtype)) for m in made)


def run(model: nn.Module, setting: Setting, executor: str | None, steps: int = 4) -> MemadviseOptimizer:
    """Some steps on a schedule of learning rates, with the same gradients for every executor."""
    if setting.options.get("weights") == "int8":
        quantize_weights(model)
    optimizer = MemadviseOptimizer(model.named_parameters(), setting, lr=1e-2, weight_decay=0.1, executor=executor)
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (number + 1)
        for p in model.parameters():
            p.grad = (torch.randn(p.shape, generator=generator) * 0.1).to(p.device, p.dtype)
        optimizer.step()
    return optimizer


def close(left: Tensor, right: Tensor, tolerance: float, *, codes: bool) -> None:
    """Equal but for rounding; of codes and of what was rounded at random few may have fallen the other way."""
    left, right = left.double().cpu(), right.double()
    near = (left - right).abs() <= tolerance * (1 + right.abs())
    assert near.double().mean() >= (0.999 if codes else 1.0), (left - right).abs().max()


def agree(setting: Setting, dtype: torch.dtype, device: str = "cpu", columns: int = 128) -> None:
    """Compiled on ``device`` against eager on the CPU."""
    oracle, model = Matrices(dtype, columns=columns), Matrices(dtype, columns=columns).to(device)
    slow, quick = run(oracle, setting, "eager"), run(model, setting, "compiled")
    assert {m.executor for m in quick.memory()} == {"compiled"}
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    tolerance *= 1 if device == "cpu" else 10  # contracted products, and divisions that are not quite exact
    rounded = any(key in setting.options for key in ("first_moment", "second_moment", "weights"))
    for p, q in zip(oracle.parameters(), model.parameters(), strict=True):
        close(floats(q), floats(p), tolerance, codes=rounded)
        for name, value in slow.state[p].items():
            held = quick.state[q][name]
            assert held.dtype == value.dtype
            close(held, value, max(tolerance, 1e-5) if value.is_floating_point() else 0.0, codes=rounded)


def floats(p: Tensor) -> Tensor:
    return p.dequantize() if isinstance(p, Int8Weight) else p.detach()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.key)
def test_agrees_with_eager(setting: Setting) -> None:
    agree(setting, torch.float32)
    kinds = {key[0] if not isinstance(key[0], tuple) else key[0][0] for key in compiled._kernels}
    # one kernel for all numbers of rows, but where blocks of rows are cut
    shared = 1 if setting.method != "adam_mini" else len(ROWS)
    assert sum(map(len, compiled._kernels.values())) == shared * len(kinds)


INT8_MOMENTUM = {"first_moment": "int8", "rounding": "nearest"}


@pytest.mark.parametrize(
    ("setting", "shape"),
    [
        (Setting("slimadam", {"axes": [0], **INT8_MOMENTUM}), (96, 64)),  # rows of one block
        (Setting("came", INT8_MOMENTUM), (96, 64)),
        (Setting("adafactor", {"momentum": 0.9, **INT8_MOMENTUM}), (128, 256)),
        (Setting("slimadam", {"axes": [2], **INT8_MOMENTUM}), (6, 4, 64)),
        (Setting("adam_mini", {"partition": "head", "heads": 4, **INT8_MOMENTUM}), (128, 256)),
    ],
    ids=str,
)
def test_sums_over_rows_that_are_seen_by_blocks(setting: Setting, shape: tuple[int, ...]) -> None:
    found = []
    for executor in ("eager", "compiled"):
        p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        optimizer = MemadviseOptimizer([("p", p)], setting, lr=1e-2, executor=executor)
        for number in range(3):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            optimizer.step()
        assert optimizer.memory()[0].executor == executor
        found.append(p.detach())
    near = (found[1] - found[0]).abs() <= 2e-6 * (1 + found[0].abs())
    assert near.double().mean() > 0.99  # but for the codes that fall the other way, which a step of came enlarges


def test_a_plan_does_not_outlive_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    call = compiled.Kernel.__call__

    def seen(kernel: Any, *tensors: Tensor) -> Any:
        devices.append({t.device.type for t in tensors if t.ndim})
        return call(kernel, *tensors)

    monkeypatch.setattr(compiled.Kernel, "__call__", seen)
    p = nn.Parameter(torch.randn(40, 128))
    optimizer = MemadviseOptimizer([("p", p)], Setting("lion"), lr=1e-2, executor="compiled")
    p.grad = torch.randn(40, 128)
    optimizer.step()
    saved = optimizer.state_dict()
    p.grad = None
    torch.utils.swap_tensors(p, nn.Parameter(torch.empty(40, 128, device="meta")))  # as model.cuda() may
    optimizer.load_state_dict(saved)
    p.grad = torch.empty(40, 128, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is compiled for meta
        optimizer.step()
    assert devices[0] == {"cpu"}
    assert all(len(found) == 1 for found in devices), "pointers of one device for a kernel of another"


@pytest.mark.parametrize(("setting", "dtype"), FORMS, ids=lambda x: getattr(x, "key", str(x)))
def test_weights_of_every_form_and_dtype(setting: Setting, dtype: torch.dtype) -> None:
    agree(setting, dtype)


def test_a_schedule_compiles_nothing_anew() -> None:
    from torch._dynamo.utils import counters

    model = Matrices()
    optimizer = run(model, Setting("slimadam", {"axes": [1]}), "compiled", steps=1)
    kernels, before = (
        {key: list(made) for key, made in compiled._kernels.items()},
        {name: dict(count) for name, count in counters.items()},
    )
    for number in range(5):
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-3 / (number + 1)) if number % 2 else 1e-3 / (number + 1)
        optimizer.step()
    assert {name: dict(count) for name, count in counters.items() if count} == {k: v for k, v in before.items() if v}
    assert compiled._kernels == kernels


def test_nothing_of_a_parameters_size_is_allocated() -> None:
    coded = Setting("slimadam", {"axes": [1], "first_moment": "int8"})
    column_means = Setting("slimadam", {"axes": [0]})
    for setting in (
        column_means,
        coded,
        Setting("adafactor"),
        Setting("came", {"first_moment": "int8"}),
        Setting("adamw", INT8),
    ):
        model = Matrices(rows=(4096,), columns=256)
        optimizer = run(model, setting, "compiled", steps=2)
        with allocator_log() as log:
            optimizer.step()
        level = peak = 0
        for size in log.sizes():
            level += size
            peak = max(peak, level)
        (memory,) = optimizer.memory()
        assert peak <= memory.scratch_bytes + 4096  # and 0-dim tensors
        assert memory.scratch_bytes < 4096 * 256 * 4 // 4


def test_a_failure_is_told_once_and_chunked_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such instruction\nand a page of log")

    monkeypatch.setattr(compiled, "Kernel", broken)
    model, twin = Matrices(), Matrices()
    with pytest.warns(UserWarning, match="slimadam on cpu .* no such instruction$") as told:
        optimizer = run(model, Setting("slimadam", {"axes": [1]}), "compiled")
    assert len(told) == 1
    run(twin, Setting("slimadam", {"axes": [1]}), "chunked")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert {m.executor for m in optimizer.memory()} == {"chunked"}


def test_without_a_compiler_nothing_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    class InvalidCxxCompiler(RuntimeError):
        pass

    def broken(*_: Any) -> None:
        tried.append(1)
        raise RuntimeError("wrapped") from InvalidCxxCompiler("no C++ compiler")

    monkeypatch.setattr(compiled, "Kernel", broken)
    with pytest.warns(UserWarning, match="without a compiled kernel"):
        run(Matrices(), Setting("lion"), "compiled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Matrices(), Setting("sgd"), "compiled")
    assert len(tried) == 1


def test_too_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_KERNELS", 0)
    with pytest.warns(UserWarning, match="more than 0 different shapes"):
        run(Matrices(), Setting("lion"), "compiled")


def test_constants_that_are_scheduled_are_not_compiled_for_ever() -> None:
    model, twin = Matrices(), Matrices()
    for each, executor in ((model, "compiled"), (twin, "chunked")):
        optimizer = MemadviseOptimizer(each.named_parameters(), Setting("lion"), lr=1e-3, executor=executor)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for number in range(compiled.MOST_CONSTANTS + 3):
                optimizer.param_groups[0]["betas"] = (0.9 - number / 100, 0.99)
                for p in each.parameters():
                    p.grad = torch.full_like(p, 0.1)
                optimizer.step()
        found = [str(w.message) for w in told if "betas" in str(w.message)]
        assert len(found) == (executor == "compiled")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_small_tensors_are_not_compiled_unasked() -> None:
    optimizer = run(Matrices(), Setting("lion"), None)
    assert {m.executor for m in optimizer.memory()} == {"chunked"}
    assert not compiled._kernels
    large = Matrices(rows=(compiled.LEAST["cpu"] // 128,))
    assert MemadviseOptimizer(large.named_parameters(), Setting("lion"), lr=1e-3).memory()[0].executor == "compiled"


def test_a_users_own_compilation_of_the_step_works() -> None:
    setting = Setting("slimadam", {"axes": [1]})
    model, twin = Matrices(), Matrices()
    run(twin, setting, "chunked", steps=3)
    optimizer = MemadviseOptimizer(model.named_parameters(), setting, lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    step = torch.compile(optimizer.step)
    for number in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 / (number + 1)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * 0.1
        step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
