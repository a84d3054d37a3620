"""memadvise fit: the printed batch is traced to fit, the next one not to; nothing that fits is a finding."""

from __future__ import annotations

from pathlib import Path

from command_line import document, memadvise, succeed

TARGET = """
import torch
from torch import nn


def build_model():
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))


def build_batches():
    while True:
        yield torch.randn(4, 64)


def compute_loss(model, batch):
    return model(batch).square().mean()
"""


def test_the_largest_batch_is_the_largest(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(TARGET)
    run = succeed(tmp_path, "fit", "model.py", "--budget", "2MB", "--device", "cpu", "--format", "json")
    found = document(run.stdout)
    assert found["fits"]
    row = next(row for row in found["rows"] if row["name"] == "as it stands")
    size, peak = row["size"], row["ledger"]["peak_bytes"]
    assert size > 4
    assert peak <= 2_000_000
    for batch, fits in ((size, True), (size + 1, False)):
        options = ("--device", "cpu", "--no-probe", "--batch-size", str(batch), "--format", "json")
        scan = document(succeed(tmp_path, "scan", "model.py", *options, "-f").stdout)
        assert (scan["memory"][0]["peak_bytes"] <= 2_000_000) == fits
        if fits:
            assert scan["memory"][0]["peak_bytes"] == peak


def test_nothing_fits(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(TARGET)
    run = memadvise(tmp_path, "fit", "model.py", "--budget", "10kB", "--device", "cpu")
    assert run.returncode == 1
    assert "nothing fits" in run.stderr
