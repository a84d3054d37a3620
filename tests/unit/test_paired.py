"""Runs that can be compared, and what trains a contest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memadvise.advise.contest import Run
from memadvise.cli.app import run
from memadvise.errors import TargetError
from memadvise.paired import PairedRuns, contest_trainer
from memadvise.plan.load import load_plan
from memadvise.plan.schema import Plan, Rule
from memadvise.target import Target
from memadvise.verify import verify

ADAMW = Plan((Rule("**", "adamw"),))


def target(**more: Any) -> Target:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(16, 64, generator=generator) for _ in range(10)]

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (model(batch) - batch).square().mean()

    values: dict[str, Any] = {
        "build_model": lambda: nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)),
        "build_batches": lambda: batches,
        "compute_loss": loss,
    }
    return Target(**{**values, **more})


def test_a_seed_is_one_start_and_one_order() -> None:
    runs = PairedRuns(target(), 20, 0.0, (0.9, 0.999))
    one, same, other = runs.plan(0, 1e-3, ADAMW), runs.plan(0, 1e-3, ADAMW), runs.plan(1, 1e-3, ADAMW)
    assert one == same
    assert one.losses[0] != other.losses[0]
    assert one.losses == pytest.approx(runs.adamw(0, 1e-3).losses, rel=1e-5)


def test_a_validation_loss_counts_where_there_is_one() -> None:
    seen = []

    def validation(model: nn.Module) -> float:
        seen.append((model.training, torch.is_grad_enabled()))
        return float(model[0].weight.square().sum())  # type: ignore[index,operator]

    mine = target(validation_loss=validation)
    side = PairedRuns(mine, 20, 0.0, (0.9, 0.999)).plan(0, 1e-3, ADAMW)
    assert side.validation is not None
    assert side.end(4) == side.validation > 1
    assert seen == [(False, False)]
    result = verify(mine, ADAMW, num_steps=20)
    assert result.measure == "Validation loss after 20 steps"
    assert result.pairs[0].adamw_end == pytest.approx(side.validation, rel=1e-3)


def test_a_validation_loss_is_a_number() -> None:
    runs = PairedRuns(target(validation_loss=lambda model: "low"), 10, 0.0, (0.9, 0.999))
    with pytest.raises(TargetError, match="where a number is needed"):
        runs.plan(0, 1e-3, ADAMW)
    diverged = PairedRuns(target(validation_loss=lambda model: torch.tensor(math.nan)), 10, 0.0, (0.9, 0.999))
    assert diverged.plan(0, 1e-3, ADAMW).end(2) is None


def test_a_step_without_losses_is_enough_beside_a_validation_loss() -> None:
    def step(model: nn.Module, batch: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        (model(batch) - batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def no_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("there is none")

    silent = target(train_step=step, compute_loss=no_loss, validation_loss=lambda model: 1.5)
    result = verify(silent, ADAMW, num_steps=10)
    assert result.gap == 0
    with pytest.raises(TargetError, match="are not known"):
        verify(target(train_step=step, compute_loss=no_loss), ADAMW, num_steps=10)


def test_a_contest_trains_at_the_rate_of_a_run_and_says_what_diverged() -> None:
    train = contest_trainer(target(), num_steps=20, lr=1e-3)
    direct = PairedRuns(target(), 20, 0.0, (0.9, 0.999)).plan(2, 3e-3, ADAMW).end(4)
    hopeless = Plan((Rule("**", "sgd", {"momentum": 0.0}),))
    assert train([Run(ADAMW, 3.0, 2), Run(hopeless, 1e12, 0)]) == [pytest.approx(direct), math.inf]


# ---------------------------------------------------------------- the command

TARGET = """
import torch
from torch import nn

def build_model():
    return nn.Linear(96, 96)

def build_batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 96, generator=generator) for _ in range(10)]

def compute_loss(model, batch):
    return (model(batch) - batch).square().mean()

def validation_loss(model):
    return (model(torch.eye(96)) - torch.eye(96)).square().mean()
"""


def test_recommend_trials_writes_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(TARGET)
    assert run(["scan", "model.py", "--device", "cpu", "--no-probe", "-q"]) == 0
    assert run(["recommend", "--trials", "20", "--sweep"]) == 2
    assert "--trials trains a plan" in capsys.readouterr().err
    peak = json.loads(Path("memadvise.scan.json").read_text())["memory"][0]["peak_bytes"]
    command = ["recommend", "--budget", f"{peak - 20_000}B", "--trials", "10"]
    assert run([*command, "--format", "json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    found = document["contest"]
    assert "10 steps are few" in err
    assert found["num_runs"] > 3 * len(found["entrants"])
    assert found["winner"] in {trial["name"] for trial in found["entrants"]}
    assert document["after"]["peak_bytes"] <= peak - 20_000
    written = Path("memadvise.yaml").read_text()
    assert "--trials 10" in written
    assert "a contest of" in " ".join(written.replace("#", "").split())


def test_who_stops_a_contest_keeps_the_plan_by_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(TARGET)
    assert run(["scan", "model.py", "--device", "cpu", "--no-probe", "-q"]) == 0
    peak = json.loads(Path("memadvise.scan.json").read_text())["memory"][0]["peak_bytes"]
    command = ["recommend", "--budget", f"{peak - 20_000}B"]
    assert run(command) == 0
    by_scores = load_plan("memadvise.yaml")
    Path("memadvise.yaml").unlink()

    def interrupted(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PairedRuns, "plan", interrupted)
    assert run([*command, "--trials", "100"]) == 130
    assert "the plan by scores, until the contest has ended" in capsys.readouterr().err
    assert load_plan("memadvise.yaml") == by_scores
    assert "--trials" not in Path("memadvise.yaml").read_text()
