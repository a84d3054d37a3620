"""A plan and AdamW side by side: paired runs, noise that was measured, a verdict in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memadvise.cli.app import run
from memadvise.errors import UsageError
from memadvise.paired import Side
from memadvise.plan.schema import Plan, Rule, Switches
from memadvise.target import Target
from memadvise.verify import Pair, Verification, verify

STEPS = 40


def target(**more: Any) -> Target:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(16, 64, generator=generator) for _ in range(20)]
    teacher = torch.randn(64, 8, generator=generator) / 8
    batches = [(x, (x @ teacher).tanh()) for x in inputs]

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))

    values: dict[str, Any] = {"build_model": model, "build_batches": lambda: batches, "compute_loss": loss}
    return Target(**{**values, **more})


def check(plan: Plan, **more: Any) -> Verification:
    return verify(target(), plan, **{"num_steps": STEPS, "lr": 3e-3, **more})


def test_adamw_is_not_worse_than_itself() -> None:
    result = check(Plan((Rule("**", "adamw"),)))
    assert result.gap == pytest.approx(0, abs=1e-6)
    assert result.noise > 1e-4  # of the seeds
    assert result.verdict == "no difference seen"
    assert not result.clearly_worse
    for pair in result.pairs:
        assert pair.plan.losses[0] == pair.adamw.losses[0]  # the same start, the same batch
        assert len(pair.plan.losses) == STEPS
    first, second = result.pairs
    assert first.adamw.losses[0] != second.adamw.losses[0]


def test_a_plan_that_hardly_moves_is_clearly_worse() -> None:
    result = check(Plan((Rule("**", "sgd", {"momentum": 0.0}, lr_factor=1e-3),)))
    assert result.clearly_worse
    assert result.gap is not None
    assert result.gap > 2 * result.noise
    assert "on every seed" in result.words


def test_the_factor_of_a_rule_counts() -> None:
    twice = Plan((Rule("**", "adamw", lr_factor=2.0),))
    slow = check(Plan((Rule("**", "adamw", lr_factor=0.01),)))
    assert slow.clearly_worse
    faster = check(twice, lr=1.5e-3)
    whole = check(Plan((Rule("**", "adamw"),)))
    assert faster.pairs[0].plan.losses == pytest.approx(whole.pairs[0].plan.losses, rel=1e-4)


def test_a_plan_that_diverges_is_clearly_worse_and_says_where() -> None:
    result = check(Plan((Rule("**", "sgd", {"momentum": 0.0}, lr_factor=1e9),)))
    assert result.clearly_worse
    assert result.gap is None
    assert "does not train, the loss became" in result.words


def test_switches_are_executed_and_change_nothing() -> None:
    whole = check(Plan((Rule("**", "adamw"),)))
    split = check(Plan((Rule("**", "adamw"),), switches=Switches(micro_batches=2, checkpoint=("0",))))
    for one, other in zip(whole.pairs, split.pairs, strict=True):
        assert other.plan.losses == pytest.approx(one.plan.losses, rel=1e-4)


def test_an_untuned_reference_is_told() -> None:
    slow = check(Plan((Rule("**", "adamw"),)), lr=1e-5)
    assert any("badly tuned: AdamW at learning rate 2e-05 ends" in w or "did not lower" in w for w in slow.warnings)
    assert any("40 steps are few" in w for w in slow.warnings)


def test_an_own_step_without_a_loss_is_evaluated() -> None:
    plain = target()

    def step(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer) -> None:
        plain.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    result = verify(target(train_step=step), Plan((Rule("**", "adamw"),)), num_steps=10)
    assert len(result.pairs[0].plan.losses) == 10


def test_a_reference_that_diverges_is_an_error() -> None:
    with pytest.raises(UsageError, match="AdamW itself does not train"):
        check(Plan((Rule("**", "adamw"),)), lr=1e38)
    with pytest.raises(UsageError, match="show no noise"):
        check(Plan((Rule("**", "adamw"),)), num_seeds=1)


# ---------------------------------------------------------------- the command

TARGET = """
import torch
from torch import nn

def build_model():
    return nn.Linear(64, 64)

def build_batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 64, generator=generator) for _ in range(10)]

def compute_loss(model, batch):
    return (model(batch) - batch).square().mean()
"""


@pytest.mark.parametrize(("rule", "code"), [("method: adamw", 0), ("method: sgd, lr_factor: 1.0e-6", 1)])
def test_the_command_exits_1_when_clearly_worse(
    rule: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(TARGET)
    Path("plan.yaml").write_text(f'version: 1\nrules:\n  - {{match: "**", {rule}}}\n')
    arguments = ["verify", "plan.yaml", "model.py", "--steps", "30", "--lr", "1e-2"]
    assert run(arguments) == code
    out, _ = capsys.readouterr()
    assert ("clearly worse" if code else "no difference seen") in out.splitlines()[0]
    assert "Mean loss of the last 6 of 30 steps" in out
    assert run([*arguments, "--format", "json", "-q"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == ("clearly worse" if code else "no difference seen")
    assert len(document["pairs"]) == 2


def test_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text('version: 1\nrules: [{match: "**", method: adamw}]\n')
    assert run(["verify", str(plan), "model.py", "--lr", "0"]) == 2
    assert run(["verify", str(plan), "model.py", "--seeds", "1"]) == 2
    assert run(["verify", str(tmp_path / "none.yaml"), "model.py"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_pair_without_an_end_has_no_gap() -> None:
    assert Side((1.0, 2.0), "the loss became nan at step 2").end(2) is None
    assert Side((1.0, 2.0, 4.0)).end(2) == 3.0
    assert Pair(0, Side((1.0,)), Side((), "x"), 1.0, None, None).gap is None
