"""The trace on fake CPU tensors with CUDA semantics against fake tensors that really are on "cuda": 0.1 MiB at most.

Both trace the same models; scratch inside kernels, which no dispatcher sees, is left out of both.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import fake_cuda  # noqa: E402
from models import CASES, loss_of  # noqa: E402

from memadvise.memory.architecture import device_model  # noqa: E402
from memadvise.memory.events import Trace  # noqa: E402
from memadvise.memory.trace import trace_step  # noqa: E402
from memadvise.plan.schema import Switches  # noqa: E402
from memadvise.target import Target  # noqa: E402

pytestmark = pytest.mark.skipif(fake_cuda.unsupported() is not None, reason=str(fake_cuda.unsupported()))

MIB = 2**20
IMPLEMENTATIONS = {"foreach": {}, "fused": {"fused": True}, "loop": {"foreach": False}}
RUNS = [
    *(f"{name}:{how}:{recompute}" for name, (how, recompute) in itertools.product(
        CASES, [("foreach", "plain"), ("fused", "checkpoint")])),
    "gpt2 short:loop:plain",
    "gpt2 short:fused:plain",
    "llama:fused:plain",
]  # fmt: skip


@pytest.fixture(scope="module")
def oracle() -> dict[str, int]:
    """Case -> bytes, from a process of its own: what it does to torch cannot be undone."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "reference.py"), *RUNS]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return found


def peak_without_workspaces(trace: Trace) -> int:
    """The most bytes alive in the steady step, of tensors only."""
    level = peak = 0
    for at, event in enumerate(trace.events[: trace.stop]):
        number = event if event >= 0 else ~event
        if trace.storages[number].kind != "workspace":
            level += trace.size(number) if event >= 0 else -trace.size(number)
            peak = max(peak, level) if at >= trace.start else peak
    return peak


@pytest.mark.parametrize("run", RUNS)
def test_the_peak_is_that_of_tensors_on_cuda(run: str, oracle: dict[str, int]) -> None:
    name, how, recompute = run.split(":")
    case = CASES[name]
    target = Target(
        build_model=case.model, build_batches=lambda: [case.tensors() for _ in range(2)], compute_loss=loss_of
    )
    switches = Switches(checkpoint=(case.blocks,) if recompute == "checkpoint" else ())
    trace = trace_step(
        target,
        device=device_model("cuda", arch="sm_80"),
        make_optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, **IMPLEMENTATIONS[how]),
        switches=switches,
    )
    assert abs(peak_without_workspaces(trace) - oracle[run]) <= 0.1 * MIB
    assert oracle[run] > 5 * MIB


def test_the_oracle_tells_implementations_and_switches_apart(oracle: dict[str, int]) -> None:
    """The same numbers everywhere would be no oracle."""
    foreach, loop, fused = (oracle[f"gpt2 short:{how}:plain"] for how in ("foreach", "loop", "fused"))
    assert foreach > max(loop, fused) + MIB
    assert oracle["gpt2:fused:checkpoint"] < 0.6 * oracle["gpt2:foreach:plain"]
    assert oracle["gpt2 bf16:foreach:plain"] < 0.7 * oracle["gpt2:foreach:plain"]
