"""``memadvise check`` in processes of its own: the same bytes everywhere, bases from git, writers at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import EXAMPLES, memadvise, succeed

from memadvise.baseline import load_baseline
from memadvise.cli.app import run

HELPER = "WIDTH = 64\n"
MODEL = """
import random
import torch
from torch import nn
from {helper} import WIDTH

def build_model():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 8))

def build_batches():
    length = random.choice([16, 32, 48]) + int(torch.randint(8, ()))  # nobody seeds this but the check
    return [torch.zeros(length, WIDTH)]

def compute_loss(model, batch):
    return model(batch).square().mean()
"""
HOOK = """
import importlib.util, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "mine":
            return importlib.util.spec_from_file_location(name, {file!r})

sys.meta_path.append(Finder)
"""
SOURCE = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose target imports a module beside it."""
    folder = tmp_path / "repository"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "widths.py").write_text(HELPER)
    (folder / "models" / "model.py").write_text(MODEL.format(helper="widths"))
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


@pytest.fixture(autouse=True)
def _no_worktree_is_left(repository: Path) -> Iterator[None]:
    yield
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1


@pytest.mark.slow
def test_fresh_processes_give_the_same_bytes(repository: Path) -> None:
    """Threads, locales, hash seeds, folders and what was traced before make no difference."""
    shutil.copytree(EXAMPLES, repository / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    many = {"OMP_NUM_THREADS": "5", "MKL_NUM_THREADS": "3"}
    worlds = [
        {"OMP_NUM_THREADS": "1", "LC_ALL": "C", "PYTHONHASHSEED": "0"},
        {**many, "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "4242", "TZ": "Asia/Tokyo"},
    ]
    targets = ["examples/cnn_digits.py", "models/model.py"]
    written = []
    for number, (world, order) in enumerate(zip(worlds, (targets, targets[::-1]), strict=True)):
        for device in ("cuda", "cpu"):
            succeed(repository, "check", *order, "--device", device, "--update-baseline",
                    "--baseline", f"{number}.json", **world)  # fmt: skip
        written.append((repository / f"{number}.json").read_bytes())
    assert written[0] == written[1]
    assert len(load_baseline(repository / "0.json")) == 4


@pytest.mark.slow
def test_against_a_commit(repository: Path) -> None:
    (repository / "models" / "widths.py").write_text("WIDTH = 128\n")
    made = memadvise(repository, "check", "models/model.py", "--against", "git:HEAD", "--device", "cpu")
    assert made.returncode == 1, made.stderr
    assert made.stdout.startswith("+")
    assert "weights of " in made.stdout.splitlines()[0]
    # From a folder inside, by an absolute name, and against what is committed now.
    git(repository, "commit", "-qam", "second")
    target = str(repository / "models" / "model.py")
    inside = memadvise(repository / "models", "check", target, "--against", "git:HEAD", "--device", "cpu")
    assert (inside.returncode, inside.stdout[:22]) == (0, "same: models/model.py "), inside.stderr
    assert [path.name for path in (repository / "models").iterdir() if path.suffix == ".json"] == []


def test_against_a_commit_without_the_target(repository: Path) -> None:
    (repository / "new.py").write_text(MODEL.format(helper="models.widths"))
    made = memadvise(repository, "check", "new.py", "--against", "git:HEAD", "--device", "cpu", "--format", "json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["results"][0]["status"] == "new"


@pytest.mark.slow
def test_the_base_never_uses_code_of_the_working_tree(repository: Path) -> None:
    """A package that is found through an import hook, as editable installs are, would be the same in both."""
    package = repository / "src" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(HELPER)
    (repository / "model.py").write_text(MODEL.format(helper="mine"))
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "package")
    (package / "__init__.py").write_text("WIDTH = 256\n")
    arguments = ("check", "model.py", "--against", "git:HEAD", "--device", "cpu")
    # On the path, the folder of the commit takes its place.
    paths = os.pathsep.join([str(SOURCE), str(repository / "src")])
    assert memadvise(repository, *arguments, PYTHONPATH=paths).returncode == 1
    hook = repository.parent / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK.format(file=str(package / "__init__.py")))
    made = memadvise(repository, *arguments, PYTHONPATH=os.pathsep.join([str(SOURCE), str(hook)]))
    assert made.returncode == 3, made.stdout
    assert "the base at HEAD would use mine of the working tree" in made.stderr


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("git:nowhere", "there is no commit 'nowhere'"),
        ("git:--help", "there is no commit '--help'"),
        ("git:", "cannot be read"),
        ("svn:3", "cannot be read"),
    ],
)
def test_references_that_are_none(
    repository: Path, reference: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository)
    assert run(["check", "models/model.py", "--against", reference, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_against_a_commit_where_the_target_does_not_run(repository: Path) -> None:
    (repository / "models" / "model.py").write_text("def build_model(:\n")
    git(repository, "commit", "-qam", "broken")
    (repository / "models" / "model.py").write_text(MODEL.format(helper="widths"))
    made = memadvise(repository, "check", "models/model.py", "--against", "git:HEAD", "--device", "cpu")
    assert made.returncode == 3
    assert "at HEAD the check does not run:" in made.stderr


def test_no_repository_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.py").write_text(MODEL.format(helper="os"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run(["check", "model.py", "--against", "git:HEAD"]) == 2
    assert "--against git:REF needs a git repository" in capsys.readouterr().err


@pytest.mark.slow
def test_two_checks_update_one_file_at_once(repository: Path) -> None:
    shutil.copy(repository / "models" / "model.py", repository / "models" / "second.py")
    command = [sys.executable, "-m", "memadvise", "check", "--device", "cpu", "--update-baseline"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)}
    writers = [
        subprocess.Popen([*command, f"models/{name}.py"], cwd=repository, env=environment, stdout=subprocess.DEVNULL)
        for name in ("model", "second")
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(load_baseline(repository / "memadvise.baseline.json")) == 2
