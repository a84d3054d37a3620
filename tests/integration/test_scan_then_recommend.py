"""What may happen to a target between its scan and a recommendation."""

from __future__ import annotations

from pathlib import Path

import pytest

from memadvise.cli.app import run

TARGET = """
import torch
from torch import nn


def build_model():
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 64))


def build_batches():
    return [torch.randn(8, 64)]


def compute_loss(model, batch):
    return model(batch).square().mean()
"""


@pytest.fixture
def scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.py"
    path.write_text(TARGET.replace("WIDTH", "128"), encoding="utf-8")
    assert run(["scan", "model.py", "--no-probe", "--device", "cpu", "-q"]) == 0
    capsys.readouterr()
    return path


def test_another_folder(scanned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = scanned.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert run(["recommend", "--budget", "1GB", "--scan", "../memadvise.scan.json", "-q"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "there is no file model.py" in err
    assert "run this in the folder where the scan was made" in err
    assert list(elsewhere.iterdir()) == []


def test_another_model(scanned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scanned.write_text(TARGET.replace("WIDTH", "256"), encoding="utf-8")
    assert run(["recommend", "--budget", "1GB", "-q"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "model.py is not the model that was scanned" in err
    assert "0.weight has shape [256, 64], the plan's model [128, 64]" in err
    assert "memadvise scan model.py" in err
    assert "mistake" not in err  # nobody wrote a plan yet
