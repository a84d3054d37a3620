"""Micro-batches are offered only where accumulating their gradients is the same training."""

from __future__ import annotations

from pathlib import Path

import pytest

from memadvise.ledger import Scan
from memadvise.scan import ProbeOptions, run_scan

TARGET = """
import torch
from torch import nn

def build_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 8))

def build_batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(16, 16, generator=generator), torch.randint(8, (16,), generator=generator)

def compute_loss(model, batch):
    x, y = batch
    {loss}
"""
LOSSES = {
    "mean": "return nn.functional.cross_entropy(model(x), y)",
    "sum": "return nn.functional.cross_entropy(model(x), y, reduction='sum')",
    "contrastive": "z = model(x); return nn.functional.cross_entropy(z @ z.T, torch.arange(len(z)))",
    "whole batches only": "assert len(x) == 16; return nn.functional.cross_entropy(model(x), y)",
}


def scan(tmp_path: Path, loss: str) -> Scan:
    path = tmp_path / "model.py"
    path.write_text(TARGET.replace("{loss}", LOSSES[loss]))
    return run_scan(str(path), device="cpu", probe=ProbeOptions(num_steps=2, optimizer_steps=1, hessian=False))


def test_a_mean_over_samples_may_be_split(tmp_path: Path) -> None:
    result = scan(tmp_path, "mean")
    assert {ledger.micro_batches for ledger in result.memory} == {1, 2, 4}
    assert not any("micro-batches" in warning for warning in result.memory[0].warnings)


@pytest.mark.parametrize("loss", ["sum", "contrastive", "whole batches only"])
def test_other_losses_may_not(tmp_path: Path, loss: str) -> None:
    result = scan(tmp_path, loss)
    assert {ledger.micro_batches for ledger in result.memory} == {1}
    assert any("micro-batches are not offered" in warning for warning in result.memory[0].warnings)
    assert result.probe is not None
