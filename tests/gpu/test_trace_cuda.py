"""The estimate for the GPU at hand against ``torch.cuda.max_memory_allocated()`` of the steady step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_support.cuda import CudaPeak, measure_cuda
from bench_support.workloads import OPTIMIZERS, Workload, examples, llama_bf16, make_optimizer, switches
from torch import nn

from memadvise.memory.architecture import local_device
from memadvise.memory.estimate import estimate
from memadvise.memory.session import fake_session
from memadvise.plan.schema import Switches
from memadvise.target import Target

pytestmark = pytest.mark.gpu

TOLERANCE, MAX_UNDER = 0.03, 0.02
# A step of a few MiB: what the caching allocator hands out in spare (up to 1 MiB a large block) counts here.
SMALL_SLACK_BYTES = 2 * 2**20
MIB = 2**20
NAMES = ["cnn_digits", "gpt_text", "llama_hf", "vit_digits"]


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workload]:
    folders = [tmp_path_factory.mktemp(name) for name in ("small", "large")]

    def find(name: str) -> Workload:
        found = [*examples(), *examples(large=True), llama_bf16(folders[0]), llama_bf16(folders[1], large=True)]
        return next(w for w in found if w.name == name)

    return find


def compare(workload: Workload, optimizer: str, switch: str = "none", *, slack: int = 0) -> CudaPeak:
    """Estimate and measure, print the ratio, hold it."""
    target = workload.make()
    change = Switches() if switch == "none" else switches(target).get(switch)
    if change is None:
        pytest.skip(f"{workload.name} cannot run with {switch}")
    make = make_optimizer(optimizer, target)
    ledger = estimate(target, device=local_device(), optimizer=make, switches=change)
    measured = measure_cuda(target, optimizer=make, switches=change)
    ratio = ledger.allocated_bytes / measured.allocated_bytes
    print(
        f"{workload.name}, {optimizer}, {switch}: estimate / measured = {ratio:.4f} "
        f"({ledger.allocated_bytes / MIB:.2f} / {measured.allocated_bytes / MIB:.2f} MiB, "
        f"peak in the {ledger.peak_phase}; "
        f"requested {measured.requested_bytes / MIB:.2f}, workspaces {measured.fixed_bytes / MIB:.2f} MiB)"
    )
    difference = ledger.allocated_bytes - measured.allocated_bytes
    assert difference <= TOLERANCE * measured.allocated_bytes + slack, f"ratio {ratio:.4f}: too high"
    assert -difference <= MAX_UNDER * measured.allocated_bytes + slack, f"ratio {ratio:.4f}: too low"
    return measured


def test_the_cases_are_all_there() -> None:
    """A new example is measured too."""
    assert [w.name for w in examples()] == NAMES
    assert [w.name for w in examples(large=True)] == [f"{name} (large)" for name in NAMES]


@pytest.mark.parametrize("optimizer", ["AdamW foreach", "AdamW fused", "memadvise slimadam"])
@pytest.mark.parametrize("name", NAMES)
def test_examples_as_they_are(name: str, optimizer: str, workload: Callable[[str], Workload]) -> None:
    compare(workload(name), optimizer, slack=SMALL_SLACK_BYTES)


@pytest.mark.parametrize("optimizer", OPTIMIZERS["cuda"])
@pytest.mark.parametrize("name", [*(f"{name} (large)" for name in NAMES), "hf llama bf16 (large)"])
def test_optimizers(name: str, optimizer: str, workload: Callable[[str], Workload]) -> None:
    measured = compare(workload(name), optimizer)
    assert measured.allocated_bytes > 256 * MIB, "too small to judge by percents"


@pytest.mark.parametrize("switch", ["checkpoint", "2 micro-batches"])
@pytest.mark.parametrize("name", [*(f"{name} (large)" for name in NAMES), "hf llama bf16 (large)"])
def test_switches(name: str, switch: str, workload: Callable[[str], Workload]) -> None:
    compare(workload(name), "AdamW fused", switch)


def test_bytes_without_a_kernel_are_exact() -> None:
    """Weights, gradients and state alone, in a size without spare: every byte is known."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4096, 4096))  # 64 MiB

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight * x).sum()

    target = Target(build_model=Table, build_batches=lambda: [torch.ones(1)])
    measured = measure_cuda(target)
    assert measured.fixed_bytes == 0
    assert estimate(target, device=local_device()).peak_bytes == pytest.approx(measured.allocated_bytes, abs=64 * 1024)


def test_workspaces_of_cublas_are_as_assumed() -> None:
    """One for the calling thread and one for autograd, of the size that the table of architectures says."""
    target = Target(
        build_model=lambda: nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)),
        build_batches=lambda: [torch.randn(8, 256)] * 3,
        compute_loss=lambda model, batch: model(batch).square().mean(),
    )
    ledger = estimate(target, device=local_device())
    assert measure_cuda(target).fixed_bytes == ledger.by_module["(cuBLAS)"]["workspace"]


# ---------------------------------------------------------------- the trace where there is a GPU


def test_a_target_on_the_device_is_traced_without_its_memory(device: str) -> None:
    def batches() -> list[torch.Tensor]:
        return [torch.randn(64, 2048, device=device)] * 2

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048)).to(device)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(batch.shape, device=batch.device)
        return model(batch.to(device, non_blocking=True) + noise).square().mean()

    target = Target(build_model=build, build_batches=batches, compute_loss=loss)
    state = torch.cuda.get_rng_state()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    predicted = estimate(target, device=local_device()).allocated_bytes
    assert torch.cuda.max_memory_allocated() - before <= 4 * MIB  # the batches; the model alone is 32 MiB
    assert torch.equal(torch.cuda.get_rng_state(), state)
    measured = measure_cuda(target)
    print(f"estimate / measured = {predicted / measured.allocated_bytes:.4f}")
    difference = predicted - measured.allocated_bytes
    assert -MAX_UNDER * measured.allocated_bytes <= difference <= TOLERANCE * measured.allocated_bytes


def test_a_model_that_lies_on_the_device_already_is_copied_to_fakes(device: str) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256)).to(device)
    target = Target(
        build_model=lambda: model,
        build_batches=lambda: [torch.randn(8, 256, device=device)],
        compute_loss=lambda m, x: m(x).square().mean(),
    )
    with fake_session(target) as (fake, batches):
        assert {t.device.type for t in (*fake.parameters(), *fake.buffers(), *batches)} == {"cpu"}
    assert estimate(target).peak_bytes > 0
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert type(model[0].weight.data) is torch.Tensor


def test_a_generator_and_autocast_on_the_device(device: str) -> None:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(device=device).manual_seed(0)
        noise = torch.randn(batch.shape, device=device, generator=generator)
        with torch.autocast(device, dtype=torch.bfloat16):
            return model(batch.to(device) + noise).float().square().mean()

    target = Target(
        build_model=lambda: nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).to(device),
        build_batches=lambda: [torch.randn(8192, 1024)] * 2,
        compute_loss=loss,
    )
    predicted, measured = estimate(target, device=local_device()).allocated_bytes, measure_cuda(target).allocated_bytes
    print(f"autocast: estimate / measured = {predicted / measured:.4f}")
    assert -MAX_UNDER * measured <= predicted - measured <= TOLERANCE * measured


def test_the_command_traces_an_example(tmp_path: Path, workload: Callable[[str], Workload]) -> None:
    """The command line on a machine with a GPU gives the same bytes as the library."""
    from memadvise.scan import run_scan

    target = workload("gpt_text").make()
    scan = run_scan(str(target.path), device="cuda")
    assert scan.memory[0].peak_bytes == estimate(target, device="cuda").peak_bytes
    assert scan.memory[0].optimizer == "torch.optim.AdamW (foreach)"
