"""The probe on a model that its target builds on CUDA; batches come from CUDA or are moved there by the loss."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import TinyTransformer, describe, language_batches, language_loss, language_target
from torch import Tensor, nn

from memadvise.advise.candidates import candidate_settings
from memadvise.ledger import ProbeLedger
from memadvise.plan.schema import Setting
from memadvise.probe.runner import run_probe
from memadvise.target import Target

pytestmark = pytest.mark.gpu

METHODS = [
    Setting("adamw"),
    Setting("slimadam", {"axes": [1]}),
    Setting("adam_mini", {"partition": "row"}),
    Setting("lion"),
]


def probe(target: Target, **options: Any) -> ProbeLedger:
    parameters = describe(TinyTransformer())
    return run_probe(
        target,
        parameters,
        settings={p.name: candidate_settings(p) for p in parameters},
        methods=METHODS,
        **{"num_steps": 20, "optimizer_steps": 5, "lr": 3e-3, **options},
    )


def build_on(device: str) -> nn.Module:
    torch.manual_seed(0)
    return TinyTransformer().to(device)


def on_the_device(device: str) -> Target:
    return language_target(
        build_model=lambda: build_on(device), build_batches=lambda: [b.to(device) for b in language_batches(20)]
    )


@pytest.fixture
def moved_by_the_loss(device: str) -> Target:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return language_loss(model, batch.to(device, non_blocking=True))

    return language_target(build_model=lambda: build_on(device), compute_loss=loss)


def test_everything_is_measured(device: str) -> None:
    ledger = probe(on_the_device(device))
    assert ledger.warnings == ()
    assert ledger.num_steps == 20
    assert ledger.losses[-1] < ledger.losses[0]
    for parameter in ledger.parameters:
        assert parameter.unknown is None
        assert parameter.snr
        assert parameter.fidelity
    by_name = {p.name: p for p in ledger.parameters}
    for name in ("query.weight", "up.weight"):
        estimators = {value.estimator for value in by_name[name].hessian}
        assert estimators == {"gradient-covariance", "hessian-vector-products"}, name
    for run in ledger.runs:
        assert run.problem is None
        assert run.num_steps == 5
        assert run.state_bytes > 0
        assert run.step_seconds is not None
        assert 0 < run.step_seconds < 1


def test_it_is_the_probe_of_the_cpu(device: str) -> None:
    here, there = probe(on_the_device("cpu")), probe(on_the_device(device))
    assert there.recorded_steps == here.recorded_steps
    assert there.losses == pytest.approx(here.losses, rel=1e-3)
    for left, right in zip(here.parameters, there.parameters, strict=True):
        assert [value.axes for value in right.snr] == [value.axes for value in left.snr]
        for one, other in zip(left.snr, right.snr, strict=True):
            if one.snr is not None:
                assert other.snr == pytest.approx(one.snr, rel=0.05), (left.name, one.axes)
        assert [value.candidate for value in right.fidelity] == [value.candidate for value in left.fidelity]
        for one_fidelity, other_fidelity in zip(left.fidelity, right.fidelity, strict=True):
            assert other_fidelity.abs_d1 == pytest.approx(one_fidelity.abs_d1, rel=0.05, abs=1e-9)
    for one_run, other_run in zip(here.runs, there.runs, strict=True):
        assert replace(other_run, step_seconds=None, last_loss=None, first_loss=None) == replace(
            one_run, step_seconds=None, last_loss=None, first_loss=None
        )
        assert other_run.last_loss == pytest.approx(one_run.last_loss, rel=1e-3)


def test_batches_may_be_moved_by_the_loss(moved_by_the_loss: Target, device: str) -> None:
    assert probe(moved_by_the_loss).losses == pytest.approx(probe(on_the_device(device)).losses, rel=1e-4)


def test_the_random_state_of_the_device_is_left_as_found(device: str) -> None:
    torch.rand(1, device=device)
    before = torch.cuda.get_rng_state()
    probe(language_target(dropout=0.1, build_model=lambda: TinyTransformer(0.1).to(device),
                          build_batches=lambda: [b.to(device) for b in language_batches(20)]))  # fmt: skip
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_running_out_of_the_devices_memory_is_told_and_ends_nothing(device: str) -> None:
    calls = 0

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 3:
            torch.empty(1 << 50, dtype=torch.uint8, device=device)  # 1 PiB
        return language_loss(model, batch)

    target = replace(on_the_device(device), compute_loss=loss)
    ledger = probe(target, hessian=False)
    assert ledger.num_steps == 3
    assert any("out of memory at step 3" in warning for warning in ledger.warnings)
    assert all(p.unknown is not None and "out of memory" in p.unknown for p in ledger.parameters)
    assert all(run.problem is not None and "out of memory" in run.problem for run in ledger.runs)
    torch.ones(1, device=device).add_(1)  # the device works on


def test_nothing_stays_on_the_device(device: str) -> None:
    probe(on_the_device(device))  # workspaces of libraries stay
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    probe(on_the_device(device))
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
