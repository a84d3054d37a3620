from __future__ import annotations

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn

from memadvise.batches import batch_size, split_batch
from memadvise.errors import UsageError
from memadvise.optim.weights import FORMS
from memadvise.plan.schema import WEIGHT_FORMS, Switches
from memadvise.switches import apply_checkpoint, checkpoint_patterns


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(torch.relu(self.norm(self.conv(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())])
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    loss = model(x).square().sum()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_changes_nothing_but_memory(momentum: float | None) -> None:
    torch.manual_seed(0)
    plain = Net()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    recomputed = copy.deepcopy(plain)
    assert checkpoint_patterns(recomputed) == ("stages.*",)
    assert apply_checkpoint(recomputed, ["stages.*"]) == ["stages.0", "stages.1"]
    assert apply_checkpoint(recomputed, ["stages.*"]) == ["stages.0", "stages.1"]  # twice is once
    x = torch.randn(4, 3, 5, 5)
    for _ in range(3):
        assert torch.equal(run(plain, x), run(recomputed, x))
    for (name, a), (_, b) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    state, other = plain.state_dict(), recomputed.state_dict()
    assert list(state) == list(other)
    for name, value in state.items():
        assert torch.equal(value, other[name]), name


def test_checkpointing_keeps_fewer_activations() -> None:
    saved = {}
    for name, patterns in (("plain", []), ("recomputed", ["stages.*"])):
        torch.manual_seed(0)
        model = Net()
        apply_checkpoint(model, patterns)
        total = 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(4, 3, 5, 5))
        saved[name] = total
    assert saved["recomputed"] < 0.5 * saved["plain"]


def test_no_recomputation_in_evaluation() -> None:
    model = Net().eval()
    apply_checkpoint(model, ["stages.*"])
    assert model(torch.randn(1, 3, 5, 5)).shape == (1, 2)


def test_a_pattern_that_matches_no_module_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"'layers\.\*' matches no module"):
        apply_checkpoint(Net(), ["layers.*"])


def test_nested_matches_checkpoint_the_outermost_only() -> None:
    assert apply_checkpoint(Net(), ["stages.*", "stages.*.*"]) == ["stages.0", "stages.1"]


def test_models_without_repeated_blocks_have_nothing_to_checkpoint() -> None:
    assert checkpoint_patterns(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ()


Pair = namedtuple("Pair", "x y")


def test_batches_are_split_without_copies() -> None:
    x, y = torch.arange(8.0).view(4, 2), torch.arange(4)
    for batch in (x, (x, y), [x, y], {"x": x, "y": y, "flag": True}, Pair(x, y), {"deep": {"x": x}}):
        assert batch_size(batch) == 4
        parts = split_batch(batch, 2)
        assert len(parts) == 2
        assert type(parts[0]) is type(batch)
    first = split_batch(Pair(x, y), 2)[0]
    assert first.x.data_ptr() == x.data_ptr()
    assert torch.equal(torch.cat([p["x"] for p in split_batch({"x": x}, 4)]), x)
    assert split_batch(x, 1)[0] is x


@pytest.mark.parametrize("batch", [torch.zeros(3, 1), (torch.zeros(4), torch.zeros(2)), {"a": 1}, torch.zeros(())])
def test_batches_that_cannot_be_split(batch: object) -> None:
    with pytest.raises(UsageError, match="cannot be split in 2"):
        split_batch(batch, 2)


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        (Switches(), ""),
        (Switches(4, ("h.*",)), "checkpointing and 4 micro-batches"),
        (Switches(1, ("h.*",), True, "int8"), "checkpointing, gradient release and int8 weights"),
    ],
)
def test_switches_in_words(switches: Switches, words: str) -> None:
    assert switches.describe() == words


def test_switches_that_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        Switches(2, gradient_release=True)
    with pytest.raises(UsageError, match="there is at least one"):
        Switches(0)
    with pytest.raises(UsageError, match="none of bf16, stochastic, ecc8, ecc16, int8"):
        Switches(weights="int4")


def test_the_switch_knows_the_forms_that_weights_have() -> None:
    assert {*WEIGHT_FORMS, "nearest"} == {*FORMS, "bf16"}
