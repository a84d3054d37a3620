"""Scans of targets that bring their own training step, and nothing else to learn the loss from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from memadvise.errors import TargetError
from memadvise.scan import ProbeOptions, run_scan

OWN_STEP = """
import torch
import torch.nn.functional as F
from torch import nn

scaler = torch.amp.GradScaler("cpu", init_scale=8.0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.tokens(ids))


def build_model():
    torch.manual_seed(0)
    return Net()


def build_batches():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (4, 8), generator=generator)
    return [(ids, ids.roll(1, 0))]


def train_step(model, batch, optimizer):
    ids, labels = batch
    loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss
"""


def test_roles_bytes_and_statistics_come_from_the_step(tmp_path: Path) -> None:
    target = tmp_path / "own_step.py"
    target.write_text(OWN_STEP, encoding="utf-8")
    scan = run_scan(str(target), device="cpu", probe=ProbeOptions(num_steps=12, lr=1e-2, hessian=False))
    assert not any(ledger.gradient_release for ledger in scan.memory)
    assert any("gradient release is not offered: GradScaler" in warning for warning in scan.memory[0].warnings)
    (table,) = scan.parameters
    assert table.role == "tied_embedding"  # model(*batch) cannot run: what is known comes from the step's own loss
    assert scan.memory[0].state_bytes == 2 * table.num_bytes + 4
    assert scan.probe is not None
    # The trace left a fake tensor in the file's global; training with it would change nothing and measure nothing.
    assert scan.probe.losses[-1] < 0.9 * scan.probe.losses[0]
    assert any(value.snr for value in scan.probe.parameters[0].snr)


def test_leftovers_of_the_trace_are_refused_where_they_cannot_be_avoided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = OWN_STEP + "\nimport memadvise\ntarget = memadvise.Target(build_model, build_batches, None, train_step)\n"
    (tmp_path / "own_step_package.py").write_text(step, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_step_package", raising=False)
    with pytest.raises(TargetError, match="keeps tensors in a global"):
        run_scan("own_step_package:target", device="cpu", probe=ProbeOptions(num_steps=12, hessian=False))


def test_a_step_without_a_backward_pass(tmp_path: Path) -> None:
    target = tmp_path / "forward_only.py"
    step = OWN_STEP.partition("def train_step")[0] + "def train_step(model, batch, optimizer):\n    model(batch[0])\n"
    target.write_text(step, encoding="utf-8")
    with pytest.raises(TargetError, match="runs no backward pass"):
        run_scan(str(target), device="cpu")
