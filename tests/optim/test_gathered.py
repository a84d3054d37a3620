"""Small tensors stepped together end where they end one by one, in a handful of operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memadvise.optim.executors import gathered
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.plan.schema import Setting

SETTINGS = [
    Setting("lion"),
    Setting("sgd"),
    Setting("adamw", {"compat": "official"}),
    Setting("adamw", {"cautious_decay": True}),
    Setting("adamw", {"cautious": True}),
    Setting("adamw", {"cautious": "paper", "cautious_decay": True}),
    Setting("lion", {"cautious": "support"}),
    Setting("rmsprop"),
    Setting("adagrad"),
    Setting("slimadam", {"axes": [1]}),
]


class Vectors(nn.Module):
    def __init__(self, dtype: torch.dtype, count: int = 40) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = [(3,), (), (64,), (7, 5), (0,)]
        made = [torch.randn(sizes[i % len(sizes)], generator=generator).to(dtype) for i in range(count)]
        self.vectors = nn.ParameterList(map(nn.Parameter, made))


def run(model: nn.Module, setting: Setting, together: bool, monkeypatch: pytest.MonkeyPatch) -> MemadviseOptimizer:
    monkeypatch.setattr(gathered, "SMALL", 1 << 14 if together else 0)
    optimizer = MemadviseOptimizer(model.named_parameters(), setting, lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for number in range(4):
        for i, p in enumerate(model.parameters()):
            g = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if i == 2 and number == 1 else g  # it lags one step behind from here on
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.key)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_together_is_one_by_one_bit_for_bit(
    setting: Setting, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = Vectors(dtype), Vectors(dtype)
    ours, theirs = run(model, setting, True, monkeypatch), run(twin, setting, False, monkeypatch)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        for name, value in theirs.state[q].items():
            assert torch.equal(ours.state[p][name], value)


class Count(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not str(func).startswith(("aten.view", "aten.detach", "aten.split", "aten.reshape"))
        return func(*args, **(kwargs or {}))


def test_operations_do_not_grow_with_the_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for number in (40, 80):
        model = Vectors(torch.bfloat16, number)
        optimizer = run(model, Setting("lion"), True, monkeypatch)
        with Count() as count:
            optimizer.step()
        counts.append(count.operations)
    assert counts[0] == counts[1]


def test_never_more_than_so_many_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gathered.TOGETHER, "cpu", 100)
    model, twin = Vectors(torch.float32), Vectors(torch.float32)
    run(model, Setting("lion"), True, monkeypatch)
    run(twin, Setting("lion"), False, monkeypatch)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
