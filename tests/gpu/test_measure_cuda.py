"""Measured mode on a real GPU: the allocator's events against its own counters, and against the estimate's fields."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from bench_support.workloads import examples, switches
from torch import nn

from memadvise.cli.app import run
from memadvise.errors import EnvironmentProblem
from memadvise.ledger import load_scan
from memadvise.memory.measure import measure
from memadvise.memory.meter import CudaMeter
from memadvise.plan.schema import Switches
from memadvise.target import Target

pytestmark = pytest.mark.gpu
MIB = 2**20
EXAMPLES = {workload.name: workload for workload in examples(large=True)}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_events_add_up_to_the_counters(name: str) -> None:
    """No warning: in every phase the events' peak is that of torch.cuda.max_memory_allocated()."""
    ledger = measure(EXAMPLES[name].make(), device="cuda")
    print(name, ledger.assumptions, ledger.overhead, ledger.by_category)
    assert not ledger.warnings
    assert ledger.device == "cuda"
    assert {p.phase for p in ledger.phases} == {"forward", "backward", "step"}
    assert sum(ledger.by_category.values()) == ledger.peak_bytes
    assert sum(sum(cells.values()) for cells in ledger.by_module.values()) == ledger.peak_bytes
    assert ledger.by_category["weights"] > 0 and ledger.by_category["optimizer_state"] > 0  # noqa: PT018
    assert ledger.reserved[0].peak_allocated_bytes == ledger.peak_bytes
    assert ledger.reserved[0].peak_reserved_bytes >= ledger.peak_bytes
    # Nearly all activations have a module: an op in compute_loss itself has none.
    named = sum(cells.get("activations", 0) for module, cells in ledger.by_module.items() if module[0] != "(")
    assert named > 0.5 * ledger.by_category.get("activations", 0)


def test_checkpointing_lowers_the_activations() -> None:
    target = EXAMPLES["gpt_text (large)"].make()
    patterns = switches(target)["checkpoint"].checkpoint
    plain = measure(target, device="cuda")
    again = measure(EXAMPLES["gpt_text (large)"].make(), device="cuda", switches=Switches(checkpoint=patterns))
    assert not again.warnings
    assert again.phase("forward").by_category["activations"] < plain.phase("forward").by_category["activations"]


def test_weights_state_and_gradients_are_exact() -> None:
    """64 MiB of weights, which the allocator hands out without spare: every byte is known."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4096, 4096))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight * x).sum()

    target = Target(build_model=Table, build_batches=lambda: [torch.ones(1)])
    ledger = measure(
        target, device="cuda", optimizer=lambda m: torch.optim.AdamW(m.parameters(), fused=True)
    )  # a step without temporaries
    assert not ledger.warnings
    step = ledger.phase("step").by_category
    assert (step["weights"], step["gradients"]) == (64 * MIB, 64 * MIB)
    assert 128 * MIB <= step["optimizer_state"] <= 128 * MIB + 4096


def test_other_memory_of_the_process_is_a_workspace() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1024, 1024))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight * x).sum()

    target = Target(build_model=Small, build_batches=lambda: [torch.ones(1)])
    gc.collect()
    before = measure(target, device="cuda").by_category.get("workspace", 0)
    held = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
    after = measure(target, device="cuda").by_category["workspace"]
    assert after - before == 32 * MIB
    del held


def test_nvml_tells_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    lines, said = CudaMeter().overhead()
    print(lines, said)
    assert said[0].startswith("NVML: ")
    if lines:  # in a container NVML may not know the process, and CUDA was in use before
        assert lines[0].name == "CUDA context and loaded kernels"
        assert 50 * MIB < lines[0].low_bytes < 3000 * MIB


def test_a_step_that_does_not_fit_is_told() -> None:
    free, _ = torch.cuda.mem_get_info()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).sum() + torch.empty(2 * free, dtype=torch.uint8, device="cuda").sum()

    target = Target(build_model=lambda: nn.Linear(4, 4), build_batches=lambda: [torch.ones(2, 4)], compute_loss=loss)
    with pytest.raises(EnvironmentProblem, match="does not fit"):
        measure(target, device="cuda")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, file = EXAMPLES["gpt_text (large)"].make(), tmp_path / "scan.json"
    assert run(["scan", str(target.path), "--no-probe", "--measure", "-o", str(file)]) == 0
    scan = load_scan(file)
    assert scan.measured is not None
    assert scan.measured.optimizer == scan.memory[0].optimizer
    assert run(["compare-ledgers", str(file)]) == 0
    print(capsys.readouterr().out)
