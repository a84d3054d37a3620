"""Ctrl-C in the middle of a real probe, and the scan that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memadvise.ledger import load_scan

TARGET = """
import os, signal
import torch
from torch import nn

steps = 0

def build_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))

def build_batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 64, generator=generator) for _ in range(60)]

def compute_loss(model, batch):
    global steps
    steps += model.training and not isinstance(batch, torch._subclasses.FakeTensor)
    if steps == int(os.environ.get("INTERRUPT_AT", -1)):
        os.kill(os.getpid(), signal.SIGINT)
    return (model(batch) - batch.cumsum(1)).square().mean()
"""


def scan(folder: Path, *args: str, interrupt_at: int = -1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memadvise", "scan", "model.py", "--no-hessian", "--optimizers", "none", *args],
        cwd=folder,
        env={**os.environ, "INTERRUPT_AT": str(interrupt_at), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # A job in the background of a script starts with Ctrl-C ignored; its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured_and_resume_completes_it(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(TARGET)
    whole = scan(tmp_path, "-o", "whole.json")
    assert whole.returncode == 0, whole.stderr
    cut = scan(tmp_path, interrupt_at=45)
    assert cut.returncode == 130, cut.stderr
    assert "stopping after this step, keeping what was measured" in cut.stderr
    assert "to go on: memadvise scan model.py --resume" in cut.stderr
    part = load_scan(tmp_path / "memadvise.scan.json")
    assert part.probe is not None
    assert not part.probe.complete
    assert part.probe.num_steps == 45
    assert {p.num_recorded for p in part.probe.parameters} == {3}  # of steps 30, 36 and 42
    rest = scan(tmp_path, "--resume")
    assert rest.returncode == 0, rest.stderr
    done, uninterrupted = (load_scan(tmp_path / name).probe for name in ("memadvise.scan.json", "whole.json"))
    assert done is not None
    assert uninterrupted is not None
    assert done.complete
    assert done.parameters == uninterrupted.parameters
    assert done.losses == uninterrupted.losses
