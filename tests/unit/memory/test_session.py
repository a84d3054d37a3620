"""Targets that put their model and batches on CUDA themselves are traced where there is no CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memadvise.memory.estimate import estimate
from memadvise.memory.session import fake_session
from memadvise.plan.schema import Setting
from memadvise.target import Target
from memadvise.whatif import trace_setting


class Net(nn.Module):
    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16, device=device), nn.Linear(16, 8, device=device)
        self.register_buffer("scale", torch.ones(8, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.zeros(x.shape, device=self.first.weight.device) + torch.zeros_like(x, device="cuda")
        return (self.second(self.first(x + noise).relu()) * self.scale).square().mean()


def _in_context() -> nn.Module:
    with torch.device("cuda"):
        return Net()


def _by_default() -> nn.Module:
    torch.set_default_device("cuda")
    try:
        return Net()
    finally:
        torch.set_default_device(None)


def _from_meta() -> nn.Module:
    with torch.device("meta"):
        model = Net()
    return model.to_empty(device="cuda")


BUILDS: dict[str, Callable[[], nn.Module]] = {
    ".cuda()": lambda: Net().cuda(),
    ".cuda(0)": lambda: Net().cuda(0),
    '.to("cuda")': lambda: Net().to("cuda"),
    ".to(device, dtype)": lambda: Net().to(torch.device("cuda", 0), torch.half).to(device="cuda:0", dtype=torch.float),
    "device=": lambda: Net(device="cuda"),
    "with torch.device": _in_context,
    "default device": _by_default,
    "meta first": _from_meta,
    "compiled": lambda: torch.compile(Net().cuda()),
}


def _batches() -> list[torch.Tensor]:
    return [torch.randn(4, 8)] * 2


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_model_that_goes_to_cuda_costs_what_it_costs(build: Callable[[], nn.Module]) -> None:
    plain = estimate(Target(build_model=Net, build_batches=_batches))
    moved = estimate(Target(build_model=build, build_batches=_batches))
    assert moved.peak_bytes == plain.peak_bytes
    assert moved.by_category == plain.by_category
    assert {name.removeprefix("_orig_mod.") for name in moved.by_module} == set(plain.by_module)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_everything_lies_on_one_device(build: Callable[[], nn.Module]) -> None:
    with fake_session(Target(build_model=build, build_batches=_batches)) as (model, batches):
        tensors = [*model.parameters(), *model.buffers(), *batches]
        assert all(isinstance(t, FakeTensor) for t in tensors)
        assert {t.device.type for t in tensors} == {"cpu"}


def _cuda_batches() -> Iterator[torch.Tensor]:
    while True:
        yield torch.randn(4, 8, device="cuda") + torch.randn(4, 8).to("cuda", non_blocking=True).cuda()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA: its batches are made there")
def test_batches_that_go_to_cuda() -> None:
    plain = estimate(Target(build_model=Net, build_batches=_batches))
    target = Target(build_model=Net, build_batches=_cuda_batches)
    assert estimate(target).peak_bytes == plain.peak_bytes
    with fake_session(target) as (_, batches):
        assert [(tuple(b.shape), b.device.type) for b in batches] == [((4, 8), "cpu")] * 2


def test_the_engine_on_a_model_that_goes_to_cuda() -> None:
    setting = Setting("slimadam", {"axes": [1]})
    ledgers = [
        trace_setting(Target(build_model=build, build_batches=_batches), setting, device="cuda", label="plan")
        for build in (Net, BUILDS[".cuda()"])
    ]
    assert ledgers[0].peak_bytes == ledgers[1].peak_bytes
    assert ledgers[0].state_bytes == ledgers[1].state_bytes


def test_a_model_that_was_built_elsewhere_is_copied_to_fakes_and_left_alone() -> None:
    plain = estimate(Target(build_model=Net, build_batches=_batches))
    elsewhere = Net(device="meta")  # stands for any device that is not the CPU
    elsewhere.second.weight = nn.Parameter(torch.empty(16, 8, device="meta").t())
    target = Target(build_model=lambda: elsewhere, build_batches=_batches)
    with fake_session(target) as (model, _):
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
        assert model.second.weight.stride() == (1, 8)
    assert estimate(target).peak_bytes == plain.peak_bytes
    assert {p.device.type for p in elsewhere.parameters()} == {"meta"}


@pytest.mark.parametrize("tied", [False, True])
def test_filling_in_a_meta_model_keeps_what_is_frozen_and_can_be_tied(tied: bool) -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[0].weight.requires_grad_(False)
        model.to_empty(device="cuda")
        if tied:
            model[1].weight = model[0].weight
        return model

    with fake_session(Target(build_model=build, build_batches=_batches)) as (model, _):
        first, second = model
        assert (first.weight is second.weight) == tied
        assert not first.weight.requires_grad
        assert second.weight.requires_grad != tied
        assert first.bias.requires_grad
