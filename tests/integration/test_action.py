"""The composite action: its script as a runner would run it, and a workflow in the README that parses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
MODEL = """
import torch

def build_model():
    return torch.nn.Linear(64, 1)

def build_batches():
    return [torch.zeros(2, 64)]

def compute_loss(model, batch):
    return model(batch).sum()
"""


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the check step with some inputs, in a folder with two targets."""
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "other.py").write_text(MODEL)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tools / "python").chmod(0o755)
    step = next(step for step in ACTION["runs"]["steps"] if step.get("id") == "check")
    defaults = {name: str(given.get("default", "")) for name, given in ACTION["inputs"].items()}

    def run(**inputs: str) -> tuple[int, str, str]:
        values = {**defaults, **inputs}
        environment = {
            name: re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda m: values[m[1]], text)
            for name, text in step["env"].items()
        }
        output = tmp_path / "output"
        output.write_text("")
        found = subprocess.run(
            [shutil.which("bash") or "bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, **environment, "GITHUB_OUTPUT": str(output), "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": str(ROOT), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
        )  # fmt: skip
        return found.returncode, found.stdout + found.stderr, output.read_text()

    return run


def test_the_script_checks_and_tells_its_exit_code(step: Any, tmp_path: Path) -> None:
    code, said, output = step(
        targets="model.py\nother.py", budget="1GiB", device="cpu", junit="memory.xml", strict="true"
    )
    assert (code, output) == (0, "exit-code=0\n"), said
    assert "2 targets: 2 new" in said
    assert (tmp_path / "memory.xml").read_text().count("<testcase ") == 2
    code, said, output = step(targets="model.py", budget="100", device="cpu")
    assert (code, output) == (1, "exit-code=1\n"), said
    assert "::error file=model.py,line=4,title=Memory over budget::" in said


def test_inputs_are_never_code(step: Any, tmp_path: Path) -> None:
    for targets in ("$(touch pwned) `touch pwned`;touch pwned", "--update-baseline *"):
        code, _, _ = step(targets=targets, budget="1GiB", device="cpu", plan="$(touch pwned)", tolerance="0")
        assert code in (2, 3)
        assert not (tmp_path / "pwned").exists()
        assert not (tmp_path / "memadvise.baseline.json").exists()
    for given in ACTION["runs"]["steps"]:
        assert "${{" not in given["run"]


def test_every_input_is_used_and_every_option_is_known() -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    for name in ACTION["inputs"]:
        assert f"inputs.{name} " in text
    shown = subprocess.run(
        [sys.executable, "-m", "memadvise", "check", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for option in re.findall(r"--[a-z][a-z-]+", ACTION["runs"]["steps"][1]["run"]):
        assert option in shown


def test_the_readmes_workflow_is_one() -> None:
    block = next(b for b in re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "jobs:" in b)
    steps = yaml.safe_load(block)["jobs"]["memory"]["steps"]
    assert any("memadvise check" in step.get("run", "") for step in steps)
