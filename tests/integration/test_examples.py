"""Every example is a target and a script: it builds alike twice, learns, traces without weights, and takes a plan."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memadvise.batches import batch_size, split_batch
from memadvise.switches import checkpoint_patterns
from memadvise.target import Target, _import_file, load_target

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("gpt_text", "vit_digits", "cnn_digits", "llama_hf")

PLAN = """\
version: 1
switches:
  micro_batches: 2
  checkpoint: ["blocks.*"]
rules:
  - match: "**"
    method: adamw
"""


@pytest.fixture(params=NAMES, scope="module")
def example(request: pytest.FixtureRequest) -> tuple[Target, ModuleType]:
    path = EXAMPLES / f"{request.param}.py"
    return load_target(str(path)), _import_file(path, str(path))


def test_two_builds_and_two_runs_of_batches_are_identical(example: tuple[Target, ModuleType]) -> None:
    target, _ = example
    first, second = target.model().state_dict(), target.model().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for one, other in zip(target.batches(3), target.batches(3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(target.batches(2)[0][0], target.batches(2)[1][0])


def test_ten_steps_lower_the_loss(example: tuple[Target, ModuleType]) -> None:
    target, _ = example
    model, (batch,) = target.model(), target.batches(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = [float(target.step(model, batch, optimizer) or 0.0) for _ in range(10)]
    assert losses[-1] < 0.95 * losses[0], losses


def test_validation_is_repeatable_and_leaves_the_model_as_it_was(example: tuple[Target, ModuleType]) -> None:
    target, module = example
    model = target.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert module.validation_loss(model) == module.validation_loss(model)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_there_is_something_to_advise(example: tuple[Target, ModuleType]) -> None:
    target, _ = example
    model, (batch,) = target.model(), target.batches(1)
    assert len(checkpoint_patterns(model)) == 1  # one list of repeated blocks
    assert batch_size(batch) is not None
    assert len(split_batch(batch, 4)) == 4


def test_it_builds_and_steps_without_weights(example: tuple[Target, ModuleType]) -> None:
    target, _ = example
    batches = target.batches(1)
    with FakeTensorMode() as mode:
        model = target.model()
        batch = tuple(mode.from_tensor(t) for t in batches[0])
        target.loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_training_text_and_validation_text_are_different_files() -> None:
    support: Any = _import_file(EXAMPLES / "example_support.py", "example_support")
    train, validation = support.stdlib_text(max_bytes=400_000)
    assert 0 < len(validation) < len(train) <= 400_000
    assert bytes(train[:2000].tolist()) not in bytes(validation.tolist())
    (images, labels), (held_out, _) = support.digits()
    assert len(images) + len(held_out) == 1797
    assert images.shape[1:] == (1, 8, 8)
    assert sorted(set(labels.tolist())) == list(range(10))


def test_text_targets_are_the_next_byte() -> None:
    support: Any = _import_file(EXAMPLES / "example_support.py", "example_support")
    text = torch.arange(200, dtype=torch.uint8)
    for inputs, targets in islice(support.text_batches(text, batch_size=3, context=7), 5):
        assert inputs.shape == targets.shape == (3, 7)
        assert torch.equal(inputs + 1, targets)


def run_script(name: str, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.parametrize(("name", "arguments"), [("vit_digits", ()), ("llama_hf", ("--hidden", "32", "--layers", "1"))])
def test_the_script_trains_from_any_folder(name: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    printed = run_script(name, tmp_path, "--steps", "2", *arguments)
    assert "step     2   train loss" in printed
    assert "validation loss" in printed


def test_the_script_takes_a_plan(tmp_path: Path) -> None:
    (tmp_path / "memadvise.yaml").write_text(PLAN)
    planned = run_script("vit_digits", tmp_path, "--steps", "2", "--plan", "memadvise.yaml").splitlines()
    plain = run_script("vit_digits", tmp_path, "--steps", "2").splitlines()
    # AdamW on every parameter, with micro-batches and checkpointing, is AdamW: the same losses to the printed digits.
    assert planned[:2] == plain[:2]
