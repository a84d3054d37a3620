"""Advice on a model that is really probed: levels, sweep, proxy, verification; predicted bytes are real bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import memadvise.advise.sweep
from memadvise import create_optimizer, load_plan, load_target
from memadvise.cli.app import run

pytestmark = pytest.mark.slow

TARGET = """
import torch
from torch import nn
import torch.nn.functional as F

class LM(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(256, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(3)
        )
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, x):
        h = self.tokens(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(self.norm(h))

def build_model(scale="full"):
    return LM(96 if scale == "full" else 64)

def build_batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        yield (torch.randint(0, 256, (4, 1), generator=generator) + torch.arange(17) * 7) % 256

def compute_loss(model, batch):
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advice")
    (folder / "model.py").write_text(TARGET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        probe = ["--probe-steps", "36", "--no-hessian", "--optimizers", "none"]
        assert run(["scan", "model.py", "--device", "cpu", "-q", *probe]) == 0
        assert run(["scan", "model.py", "--device", "cpu", "-q", "--no-probe", "-o", "bare.json"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def advise(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert run(["recommend", "--format", "json", "-q", "--force", *arguments]) == code
    return json.loads(capsys.readouterr().out)


def test_every_row_of_a_sweep_is_a_plan_of_that_peak_and_state(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memadvise.advise.sweep, "NUM_BUDGETS", 3)  # every budget takes some traces
    rows = [row for row in advise(capsys, "--sweep")["sweep"] if row["peak_bytes"] is not None]
    assert not Path("memadvise.yaml").exists()
    levels = ["high", "fairly high", "medium", "low"]
    assert [levels.index(row["confidence"]) for row in rows] == sorted(levels.index(r["confidence"]) for r in rows)
    assert {rows[0]["confidence"], rows[-1]["confidence"]} == {"high", "low"}
    target = load_target("model.py")
    for row in (rows[len(rows) // 2], rows[-1]):
        found = advise(capsys, "--budget", str(row["budget_bytes"]))
        assert found["after"]["peak_bytes"] == row["peak_bytes"] <= row["budget_bytes"]
        model = target.model()
        plan = load_plan("memadvise.yaml")
        optimizer = create_optimizer(model, plan, lr=1e-3, executor="chunked")
        target.step(model, target.batches(1)[0], optimizer)
        held = sum(t.numel() * t.itemsize for state in optimizer.state.values() for t in state.values())
        assert held == row["state_bytes"] == plan.predicted_state_bytes


def test_a_proxy_lowers_the_confidence_and_beats_a_prior(capsys: pytest.CaptureFixture[str]) -> None:
    peak = advise(capsys, "--budget", "1GB", "--scan", "bare.json")["after"]["peak_bytes"]
    arguments = ("--budget", str(peak * 60 // 100), "--scan", "bare.json", "--forbid", "int8", "--forbid", "dynamic8")
    bare, borrowed = advise(capsys, *arguments), advise(capsys, *arguments, "--proxy")
    reasons = {g["reason"] for g in borrowed["groups"] if g["setting_key"] != "adamw"}
    assert all("profile proxy by role and depth" in reason for reason in reasons)
    assert all("no probe" in g["reason"] for g in bare["groups"] if g["setting_key"] != "adamw")
    assert borrowed["confidence"] != "high"


def test_a_verification_follows_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    found = advise(capsys, "--budget", "1GB", "--verify", "20")
    assert found["verification"]["verdict"] == "no difference seen"
    worse = advise(capsys, "--budget", "1GB", "--verify", "20", "--pin", "**.weight=sgd(momentum=0.0)", code=1)
    assert worse["verification"]["verdict"] == "clearly worse"
    assert worse["confidence"] == "low"
