"""Measuring real steps: what does not need a GPU, with counters that a test can foresee."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from memadvise.cli.app import run
from memadvise.errors import EnvironmentProblem
from memadvise.ledger import MemoryLedger, Overhead, Reservation, load_scan
from memadvise.memory.allocator_log import AllocatorLog
from memadvise.memory.device import DeviceUse
from memadvise.memory.measure import _Reader, measure
from memadvise.memory.meter import Meter, open_meter, outside_the_allocator
from memadvise.target import Target

MIB = 2**20
WORKSPACE = 8 * MIB


def make_target() -> Target:
    return Target(
        build_model=lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)),
        build_batches=lambda: [torch.randn(16, 32) for _ in range(3)],
        compute_loss=lambda model, batch: model(batch).square().mean(),
    )


def make_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)


class Counting(Meter):
    """Counters as CUDA has them: ``level`` before each step, and the peaks of forward, backward and step in turn."""

    warm_up_steps = 2
    measured_steps = 3
    name = "a test"

    def __init__(self, level: int, peaks: dict[str, int]) -> None:
        self.calls: list[str] = []
        self._level, self._peaks = level, list(peaks.values())

    def settle(self) -> None:
        self.calls.append("settle")

    def reset(self) -> None:
        self.calls.append("reset")

    def level(self) -> int:
        return self._level

    def peak(self) -> int:
        ended = self.calls[::-1].index("settle") if self.calls[-1] == "reset" else 0
        return self._peaks[(ended - 1) % len(self._peaks)]

    def reserved(self, peak_allocated: int) -> tuple[Reservation, ...]:
        return (Reservation("default", 20 * MIB, peak_allocated, 2),)

    def overhead(self) -> tuple[tuple[Overhead, ...], list[str]]:
        return (Overhead("context", 1, 1, "a test"),), ["said"]


@pytest.fixture(scope="module")
def plain() -> MemoryLedger:
    return measure(make_target(), optimizer=make_sgd)


def counted(plain: MemoryLedger, *, more: int = 0) -> MemoryLedger:
    """Measured with counters that say what is true of ``plain``, a workspace of 8 MiB, and ``more``."""
    held = sum(p.num_bytes for p in plain.live_groups if p.category in ("weights", "inputs"))
    peaks = {p.phase: p.peak_bytes + WORKSPACE + more for p in plain.phases}
    return measure(make_target(), optimizer=make_sgd, meter=Counting(held + WORKSPACE, peaks))


def test_what_the_device_counts_and_nobody_holds_is_a_workspace(plain: MemoryLedger) -> None:
    ledger = counted(plain)
    assert not ledger.warnings
    assert ledger.by_category["workspace"] == WORKSPACE
    assert ledger.peak_bytes == plain.peak_bytes + WORKSPACE
    assert [p.peak_bytes for p in ledger.phases] == [p.peak_bytes + WORKSPACE for p in plain.phases]
    without = {name: size for name, size in ledger.by_category.items() if name != "workspace"}
    assert without == plain.by_category
    assert sum(sum(cells.values()) for cells in ledger.by_module.values()) == ledger.peak_bytes
    assert ledger.reserved == (Reservation("default", 20 * MIB, ledger.peak_bytes, 2),)
    assert ledger.overhead[0].name == "context"
    assert ledger.assumptions[0].startswith("Measured: a test, the highest of 3 steps after 2: ")
    assert ledger.assumptions[-1] == "said"


@pytest.mark.parametrize("more", [512, -512, -MIB])
def test_counters_that_disagree_with_the_events_are_told_and_decide(plain: MemoryLedger, more: int) -> None:
    ledger = counted(plain, more=more)
    assert len(ledger.warnings) == 3
    assert "in the backward phase" in ledger.warnings[1]
    for phase in ledger.phases:
        events = plain.phase(phase.phase)
        assert phase.peak_bytes == events.peak_bytes + WORKSPACE + more
        assert phase.by_category == {**events.by_category, "workspace": WORKSPACE + more}
        assert sum(sum(cells.values()) for cells in phase.by_module.values()) == phase.peak_bytes
    assert ledger.peak_bytes == max(p.peak_bytes for p in ledger.phases) == ledger.reserved[0].peak_allocated_bytes
    assert sum(ledger.by_category.values()) == ledger.peak_bytes
    assert ledger.by_module == ledger.phase(ledger.peak_phase).by_module


def test_counters_below_what_the_tensors_take_do_not_decide(plain: MemoryLedger) -> None:
    """More cannot be taken from the workspace than is in it: the events stay, and the warning."""
    ledger = counted(plain, more=-2 * WORKSPACE)
    assert len(ledger.warnings) == 3
    assert all(p.peak_bytes == plain.phase(p.phase).peak_bytes + WORKSPACE for p in ledger.phases)


def test_fewer_bytes_than_the_tensors_have_is_told() -> None:
    ledger = measure(make_target(), optimizer=make_sgd, meter=Counting(1, {"forward": 1, "backward": 1, "step": 1}))
    assert any("before the step the allocator counted 1 bytes" in warning for warning in ledger.warnings)
    assert "workspace" not in ledger.by_category


def node(size: int, address: int, device: str) -> Any:
    fields = SimpleNamespace(alloc_size=size, ptr=address, device=torch.device(device))
    return SimpleNamespace(name="[memory]", extra_fields=fields, parent=None)


def test_only_events_of_the_measured_device_count() -> None:
    class OnCuda(Counting):
        device, granularity = "cuda", 512

    model = nn.Linear(4, 4)  # on the CPU: nothing of it is on the device
    reader = _Reader(model, [make_sgd(model)], torch.zeros(3), OnCuda(1024, {}), None)
    log = AllocatorLog()
    log.nodes = [
        node(4096, 1, "cuda"), node(999, 2, "cpu"), node(512, 3, "cuda"), node(-999, 2, "cpu"), node(-4096, 1, "cuda"),
    ]  # fmt: skip
    trace = reader.read(log)
    assert trace.device == "cuda"
    assert [trace.size(n) for n in range(len(trace.storages))] == [1024, 4096, 512]
    assert [s.kind for s in trace.storages] == ["workspace", None, None]
    assert trace.events[trace.start : trace.stop] == [1, 2, ~1]


def test_no_gpu_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match="there is no GPU to measure on") as caught:
        measure(make_target(), device="cuda")
    assert caught.value.exit_code == 3
    assert "--device cpu" in str(caught.value.hint)
    assert open_meter("cpu").level() is None


def test_a_step_that_does_not_fit() -> None:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).sum() + torch.empty(2**60).sum()

    with pytest.raises(EnvironmentProblem, match="does not fit") as caught:
        measure(replace(make_target(), compute_loss=loss))
    assert "without --measure" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("own", "before", "lines"),
    [
        (700, None, [("CUDA context and loaded kernels", 200), ("other processes and the driver", 300)]),
        (None, 100, [("CUDA context and loaded kernels", 400), ("other processes and the driver", 100)]),
        (None, 0, [("CUDA context and loaded kernels", 500)]),
        (None, None, []),
    ],
)
def test_what_lies_outside_the_allocator(own: int | None, before: int | None, lines: list[tuple[str, int]]) -> None:
    earlier = DeviceUse(2000, before, None) if before is not None else None
    found, said = outside_the_allocator(DeviceUse(2000, 1000, own), earlier, 500)
    assert [(line.name, line.low_bytes) for line in found] == lines
    assert all(line.low_bytes == line.high_bytes and "NVML" in line.source for line in found)
    assert "1000 B of the device's 1.95 KiB" in said[0]
    assert len(said) == (1 if lines else 2)


def test_without_nvml_it_is_said() -> None:
    assert outside_the_allocator(None, None, 500) == (
        (), ["NVML does not answer: the CUDA context and other processes were not measured."],
    )  # fmt: skip


def test_the_command_measures_what_it_estimates(
    mlp_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, file = mlp_file, tmp_path / "scan.json"
    assert run(["scan", str(target), "--no-probe", "--device", "cpu", "--measure", "-o", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "\nMeasured\n" in out
    assert f"memadvise compare-ledgers {file}" in err
    scan = load_scan(file)
    assert scan.measured is not None
    assert scan.measured.source == "measure"
    assert scan.measured.peak_bytes == pytest.approx(scan.memory[0].peak_bytes, rel=1e-3)
    for category in ("weights", "gradients", "optimizer_state", "inputs"):
        assert scan.measured.by_category.get(category) == scan.memory[0].by_category.get(category)
    assert run(["compare-ledgers", str(file), "--fail-above", "0.1%"]) == 0
    assert "peak: estimate" in capsys.readouterr().out


def test_the_command_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "model.py").write_text("raise SystemError('the target is not even loaded')")
    assert run(["scan", str(tmp_path / "model.py"), "--measure", "-o", str(tmp_path / "scan.json")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "there is no GPU to measure on" in err
    assert "hint: --measure --device cpu" in err
