"""What is assumed of a device: defaults by architecture and torch version, overrides, and the way through a ledger."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memadvise.errors import UsageError
from memadvise.memory.architecture import (
    ARCHITECTURES,
    MIB,
    device_model,
    find_architecture,
    from_assumed,
    parse_assumption,
)
from memadvise.memory.estimate import estimate
from memadvise.memory.trace import trace_step
from memadvise.target import Target

SMALL = 8_519_680  # :4096:2:16:8


def _target(**functions):
    return Target(
        **{
            "build_model": lambda: nn.Linear(64, 64),
            "build_batches": lambda: [torch.randn(4, 64)],
            "compute_loss": lambda model, batch: model(batch).square().mean(),
            **functions,
        }
    )


def _workspaces(device, target=None):
    """(operation, bytes, phase) of every library workspace of a trace."""
    trace = trace_step(target or _target(), device=device)
    return [(s.op, s.num_bytes, s.phase) for s in trace.storages if s.op.endswith("workspace")]


@pytest.mark.parametrize(
    ("arch", "torch_version", "size"),
    [
        ("sm_80", "2.13", SMALL),
        ("sm_90", "2.6", 32 * MIB),
        ("sm_100", "2.10", SMALL),
        ("sm_100", "2.13", 32 * MIB),
        ("sm_120", "2.13", 32 * MIB),
        ("sm_89", "2.13", SMALL),
    ],
)
def test_cublas_workspace_by_architecture_and_torch(arch, torch_version, size):
    assert device_model("cuda", arch=arch, torch=torch_version).cublas_workspace == size


def test_cublas_workspace_config_counts(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8:16:2")
    assert device_model("cuda", arch="sm_80").cublas_workspace == 1024 * (4096 * 8 + 16 * 2)
    assert device_model("cuda", cublas_workspace=5).cublas_workspace == 5


def test_one_workspace_for_each_thread_that_multiplies():
    both = [("cuBLAS workspace", 32 * MIB, "forward"), ("cuBLAS workspace", 32 * MIB, "backward")]
    assert _workspaces("cuda") == both
    assert _workspaces("cpu") == []
    assert _workspaces(device_model("cuda", cublas_workspace=0)) == []

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 64))

        def forward(self, x):
            return x * self.weight

    assert _workspaces("cuda", _target(build_model=Table)) == []
    with torch.autograd.set_multithreading_enabled(False):
        assert _workspaces("cuda") == both[:1]


def test_a_product_of_the_optimizer_is_the_calling_threads():
    class Projected(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad @ p.grad.T if p.ndim == 2 else None

    trace = trace_step(_target(), make_optimizer=lambda model: Projected(model.parameters(), lr=0.1))
    assert [s.phase for s in trace.storages if s.op == "cuBLAS workspace"] == ["forward", "backward"]


def test_workspaces_of_other_versions_of_torch():
    """Before 2.11 cuBLASLt had one of its own; from 2.15 on none outlives its call."""
    kept = [("cuBLASLt workspace", MIB, "forward"), ("cuBLAS workspace", SMALL, "forward")]
    found = _workspaces(device_model("cuda", arch="sm_80", torch="2.9"))
    assert sorted(found[:2]) == sorted(kept)
    scoped = trace_step(_target(), device=device_model("cuda", torch="2.15"))
    assert not [s for s in scoped.storages if s.op.endswith("workspace")]
    taken = [s.num_bytes for s in scoped.storages if s.kind == "workspace"]
    assert set(taken) == {32 * MIB, MIB}  # mm, and addmm of cuBLASLt
    assert estimate(_target(), device=device_model("cuda", torch="2.15")).peak_bytes < 33 * MIB


def test_the_peak_counts_them_and_says_so():
    ledger = estimate(_target())
    assert ledger.by_category["workspace"] == 64 * MIB
    assert ledger.by_module["(cuBLAS)"] == {"workspace": 64 * MIB}
    said = " ".join(ledger.assumptions)
    for words in ("CUDA sm_90", "32.00 MiB for each thread", "64.00 MiB of the peak", "400.0 MiB to 900.0 MiB"):
        assert words in said


def test_a_ledger_gives_the_model_back():
    model = device_model("cuda", arch="sm_86", torch="2.9.1", attention="math", cublas_workspace=3, context=400 * MIB)
    assert from_assumed("cuda", estimate(_target(), device=model).assumed) == model
    assert estimate(_target(), device="cpu").assumed == {}
    assert from_assumed("cpu", {}) == device_model("cpu")
    assert from_assumed("cuda", {}) == device_model("cuda")


def test_the_context_is_a_line_of_its_own():
    (line,) = estimate(_target(), device=device_model("cuda", context=450 * MIB)).overhead
    assert (line.low_bytes, line.high_bytes) == (450 * MIB, 450 * MIB)
    low, high = device_model("cuda", arch="sm_80").context_bytes
    assert (low, high) == (300 * MIB, 700 * MIB)
    assert all(a.context_mib[0] < a.context_mib[1] for a in ARCHITECTURES.values())


def test_names_are_read_and_mistakes_told():
    assert find_architecture("sm90") is find_architecture("9.0") is ARCHITECTURES["sm_90"]
    assert parse_assumption("cublas_workspace=32MiB") == ("cublas_workspace", 32 * MIB)
    assert parse_assumption(" cudnn_workspace = 0 ") == ("cudnn_workspace", 0)
    assert parse_assumption("torch=2.11.0") == ("torch", "2.11.0")
    with pytest.raises(UsageError, match="'sm_1' is no architecture"):
        device_model("cuda", arch="sm_1")
    with pytest.raises(UsageError, match="no attention kernel"):
        device_model("cuda", attention="ring")
    with pytest.raises(UsageError, match="no version of torch"):
        device_model("cuda", torch="new")
    for text in ("cublas", "device=cpu", "nccl=1GiB"):
        with pytest.raises(UsageError, match="is no assumption"):
            parse_assumption(text)
    with pytest.raises(UsageError, match="not a size"):
        parse_assumption("context=large")


@pytest.mark.parametrize(
    ("name", "threads"),
    [("sm_70", 2048), ("sm_75", 1024), ("sm_80", 2048), ("sm_86", 1536), ("sm_89", 1536), ("sm_90", 2048)]
    + [("sm_100", 2048), ("sm_103", 2048), ("sm_120", 1536)],
)
def test_threads_of_a_multiprocessor(name, threads):
    """CUDA programming guide, technical specifications per compute capability."""
    assert ARCHITECTURES[name].threads_per_sm == threads
