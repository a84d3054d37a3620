"""``memadvise check`` on a small target: options, files, streams and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from memadvise.baseline import load_baseline
from memadvise.cli.app import run

Capture = pytest.CaptureFixture[str]
MODEL = """
import torch
from torch import nn
print("the target talks")
WIDTH = 512

def build_model():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, 8, bias=False))

def build_batches():
    return [torch.zeros(32, WIDTH)]

def compute_loss(model, batch):
    return model(batch).square().mean()
"""
PLAN = 'version: 1\nrules:\n  - {match: "0.*", method: METHOD}\n  - {match: "**", method: adamw}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE"):
        monkeypatch.delenv(name, raising=False)
    Path("model.py").write_text(MODEL)
    return tmp_path


def check(*args: str, code: int = 0) -> None:
    assert run(["check", *args, "--device", "cpu"]) == code


def grow() -> None:
    """One layer more, before the last, which is renumbered by it."""
    Path("model.py").write_text(MODEL.replace("nn.ReLU()", "nn.ReLU(), nn.Linear(WIDTH, WIDTH, bias=False)"))


def test_the_life_of_a_baseline(capsys: Capture) -> None:
    check("model.py", code=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: there is no baseline file memadvise.baseline.json" in err
    assert "--update-baseline" in err

    check("model.py", "--update-baseline")
    out, err = capsys.readouterr()
    assert out.startswith("updated: model.py (torch.optim.AdamW (for-loop); float32[32, 512]): ")
    assert "Wrote memadvise.baseline.json" in err
    assert "the target talks" in err
    check("model.py")
    assert capsys.readouterr().out.startswith("same: model.py")
    before = Path("memadvise.baseline.json").read_bytes()

    grow()
    check("model.py", code=1)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("+")
    assert ": weights of `2` (fp32: 0 B -> 1.00 MiB)" in first
    check("model.py", "--exit-zero")
    check("model.py", "--tolerance", "1GiB")
    assert Path("memadvise.baseline.json").read_bytes() == before

    check("model.py", "--update-baseline")
    assert "(+" in capsys.readouterr().out.splitlines()[-1]
    Path("model.py").write_text(MODEL)
    check("model.py")
    assert "the baseline is stale, run memadvise check" in capsys.readouterr().out
    check("model.py", "--strict", code=1)
    check("model.py", "--strict", "--exit-zero")


def test_a_budget_needs_no_baseline(capsys: Capture) -> None:
    check("model.py", "--budget", "1GiB")
    assert "nothing to compare with" in capsys.readouterr().out
    check("model.py", "--budget", "1MiB", code=1)
    assert "over the budget of 1.00 MiB: " in capsys.readouterr().out.splitlines()[0]
    check("model.py", "--update-baseline", "--budget", "1MiB", code=1)
    assert len(load_baseline("memadvise.baseline.json")) == 1
    check("model.py", "--budget", "1GiB")
    Path("other.py").write_text(MODEL)
    check("other.py", "--budget", "1GiB", code=2)  # there is a baseline, and this target is not in it


def test_a_plan_is_an_entry_of_its_own_and_its_edits_are_found(capsys: Capture) -> None:
    Path("plan.yaml").write_text(PLAN.replace("METHOD", "slimadam, axes: [1]"))
    check("model.py", "--update-baseline")
    check("model.py", "--plan", "plan.yaml", "--update-baseline")
    assert len(load_baseline("memadvise.baseline.json")) == 2
    Path("plan.yaml").write_text(PLAN.replace("METHOD", "adamw"))
    capsys.readouterr()
    check("model.py", "--plan", "plan.yaml", code=1)
    out = capsys.readouterr().out
    assert ": optimizer state of `0` (fp32: " in out.splitlines()[0]
    assert "changed: the file of the plan" in out
    check("model.py")


def test_targets_are_named_alike_from_everywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check("model.py", "--update-baseline")
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder / "sub")
    check("../model.py", "--baseline", "../memadvise.baseline.json")
    check(str(folder / "model.py"), "--baseline", str(folder / "memadvise.baseline.json"))
    assert load_baseline(folder / "memadvise.baseline.json").text().count('"target": "model.py"') == 1


def test_another_environment_is_exit_2(capsys: Capture) -> None:
    check("model.py", "--update-baseline")
    file = Path("memadvise.baseline.json")
    value = json.loads(file.read_text())
    value["entries"][0]["environment"]["torch"] = "2.0.0"
    file.write_text(json.dumps(value))
    capsys.readouterr()
    check("model.py", code=2)
    assert capsys.readouterr().out.startswith("not comparable: torch is 2.")
    check("model.py", "--exit-zero")
    assert run(["check", "model.py", "--arch", "sm_80"]) == 2
    assert "device is cuda sm_80, in the baseline cpu" in capsys.readouterr().out


def test_one_broken_target_does_not_hide_the_others(capsys: Capture) -> None:
    Path("broken.py").write_text(
        "def build_model():\n    raise ValueError('no')\n\ndef build_batches():\n    return [1]\n"
    )
    check("model.py", "broken.py", "--update-baseline", code=3)
    assert len(load_baseline("memadvise.baseline.json")) == 1
    capsys.readouterr()
    check("broken.py", "none.py", "model.py", code=3)
    out, err = capsys.readouterr()
    assert "3 targets: 2 error, 1 same" in out
    assert "ValueError: no" in err
    assert "error: there is no file none.py" in err
    grow()
    check("broken.py", "model.py", code=1)


def test_all_formats_of_one_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    check("model.py", "--update-baseline")
    grow()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(folder))
    (folder / "summary.md").write_text("before\n")
    capsys.readouterr()
    formats = ("--format", "github", "--format", "junit=memory.xml", "--format", "markdown=comment.md",
               "--format", "json=check.json", "--format=text=check.txt")  # fmt: skip
    for _ in range(2):  # the second run replaces what the first wrote
        check("model.py", *formats, code=1)
    out = capsys.readouterr().out
    assert "::error file=model.py,line=7,title=Memory regression::+" in out
    assert Path("summary.md").read_text().startswith("before\n<!-- memadvise check -->\n")
    assert Path("summary.md").read_text().count("<!-- memadvise check -->") == 2
    assert Path("comment.md").read_text().count("<!-- memadvise check -->") == 1
    assert len(ElementTree.parse("memory.xml").findall(".//failure")) == 1
    assert json.loads(Path("check.json").read_text())["results"][0]["status"] == "regression"
    assert Path("check.txt").read_text().startswith("+")


def test_the_json_on_stdout_is_one_document(capsys: Capture) -> None:
    check("model.py", "--update-baseline")
    capsys.readouterr()
    check("model.py", "--format", "json")
    document = json.loads(capsys.readouterr().out)
    assert document["results"][0]["peak_bytes"] == sum(document["results"][0]["by_category"].values())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--format", "sarif"), "--format 'sarif' is none of text, json, markdown, github, junit"),
        (("--format", "junit="), "--format 'junit=' is none of"),
        (("--format", "text", "--format", "json"), "text and json cannot both go to stdout"),
        (("--format", "json=a.json", "-o", "b.json"), "every --format has its file already"),
        (("--tolerance", "x"), "'x' is no tolerance"),
        (("--budget", "-1"), "'-1' is not a size"),
        (("--against", "main"), "--against 'main' cannot be read"),
        (("--against", "git:HEAD", "--update-baseline"), "--against compares with a commit"),
        (("--baseline", "none/b.json", "--update-baseline"), "there is no folder none"),
        (("-o", "model.py"), "model.py exists and is not a report of memadvise check"),
        (("--plan", "none.yaml"), "none.yaml"),
        (("--attention", "flash"), "nothing is assumed of --device cpu"),
    ],
)
def test_mistakes_are_sentences(args: tuple[str, ...], message: str, capsys: Capture) -> None:
    subprocess.run(["git", "init", "-q"], check=True)
    check("model.py", "--update-baseline")
    capsys.readouterr()
    check("model.py", *args, code=2)
    assert message in capsys.readouterr().err


def test_a_broken_baseline_is_told_before_the_work(capsys: Capture) -> None:
    Path("memadvise.baseline.json").write_text('{"schema_version": 1, "entr')
    for more in ((), ("--update-baseline",), ("--budget", "1GiB")):
        check("model.py", *more, code=2)
        err = capsys.readouterr().err
        assert "is not a whole JSON document" in err
        assert "at memadvise.baseline.json:1:" in err
        assert "the target talks" not in err
    assert Path("memadvise.baseline.json").read_text() == '{"schema_version": 1, "entr'


def test_a_measured_entry_is_beside_the_traced_one(capsys: Capture) -> None:
    check("model.py", "--update-baseline")
    check("model.py", "--measure", "--update-baseline")
    assert len(load_baseline("memadvise.baseline.json")) == 2
    grow()
    capsys.readouterr()
    check("model.py", "--measure")  # 4 MiB are within 16 MiB
    assert "within the tolerance" in capsys.readouterr().out
    check("model.py", "--measure", "--tolerance", "1%", code=1)
    check("model.py", code=1)


def test_measuring_without_a_gpu_is_exit_3(capsys: Capture) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert run(["check", "model.py", "--measure", "--budget", "1GiB"]) == 3
    assert "there is no GPU to measure on" in capsys.readouterr().err


def test_help_is_quick_and_without_torch() -> None:
    code = "import sys; from memadvise.cli.app import run; run(['check', '--help']); assert 'torch' not in sys.modules"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **path})
    assert shown.returncode == 0, shown.stderr
    for option in (
        "--baseline",
        "--update-baseline",
        "--tolerance",
        "--budget",
        "--against",
        "--strict",
        "--exit-zero",
    ):
        assert option in shown.stdout
