"""``env``, ``optimizers`` and ``init``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memadvise import optim
from memadvise.cli.app import run
from memadvise.ledger import Scan, to_json
from memadvise.optim.registry import METHODS, validate
from memadvise.plan.schema import Setting
from memadvise.report.text import render_scan
from memadvise.target import load_target

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_env_names_versions_and_devices(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import torch

    gpu = {"index": 0, "name": "NVIDIA Test", "uuid": "GPU-1", "mig": True, "total_bytes": 2**34, "free_bytes": 2**33}
    gpu |= {"used_bytes": 2**33, "driver": "575.1", "cuda_driver": "12.9"}
    monkeypatch.setattr("memadvise.memory.device.device_facts", lambda: [gpu])
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert run(["env"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "NVIDIA Test (MIG instance): 8.00 GiB free of 16.00 GiB, driver 575.1 (CUDA 12.9)" in text
    assert "expandable_segments:True" in text
    assert run(["env", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["devices"] == [gpu]
    assert document["torch"]["version"] == torch.__version__


def test_env_without_a_working_torch(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("memadvise.memory.device.device_facts", list)
    assert run(["env"]) == 0
    text = capsys.readouterr().out
    assert "ModuleNotFoundError" in text
    assert "none that NVML can see" in text


def test_env_to_a_file(capsys: Capture) -> None:
    assert run(["env", "-o", "env.txt"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", "Wrote env.txt\n")
    assert Path("env.txt").read_text().startswith("memadvise:")
    assert run(["env", "-o", "env.txt"]) == 2
    assert "env.txt exists already" in capsys.readouterr().err
    assert run(["env", "-o", "env.txt", "-f"]) == 0


def test_optimizers_lists_every_method_and_option(capsys: Capture) -> None:
    assert run(["optimizers"]) == 0
    text = capsys.readouterr().out
    assert run(["optimizers", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert [row["name"] for row in rows] == [info.name for info in METHODS]
    for row, info in zip(rows, METHODS, strict=True):
        assert row["name"] in text
        assert row["source"]
        assert row["bytes_per_parameter"]
        assert [option["name"] for option in row["options"]] == list(info.options)
        assert all(option["help"] and option["type"] and option["name"] in text for option in row["options"])
        assert "tuple" not in "".join(option["type"] for option in row["options"])
        # What is shown as the default is what a plan may write.
        defaults = {option["name"]: option["default"] for option in row["options"] if option["default"] is not None}
        validate(Setting(row["name"], defaults), (64, 64), name="w")


def test_one_method_and_an_unknown_one(capsys: Capture) -> None:
    assert run(["optimizers", "sgd"]) == 0
    out = capsys.readouterr().out
    assert "momentum" in out
    assert "slimadam" not in out
    assert run(["optimizers", "slimadm"]) == 2
    assert capsys.readouterr().err == "error: there is no method 'slimadm'\n  hint: did you mean 'slimadam'?\n"
    assert run(["optimizers", "-o", "methods.txt"]) == 0
    assert "adam_mini" in Path("methods.txt").read_text()


def test_a_method_shows_its_class_and_what_it_takes_by_default(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # pytest's own workers set another
    assert run(["optimizers", "apollo_mini"]) == 0
    line = (
        "memadvise.optim.APOLLOMini(params, lr=0.01, betas=(0.9, 0.999), eps=1e-06, weight_decay=0.0); in a plan with"
    )
    assert line in capsys.readouterr().out
    assert run(["optimizers", "--format", "json"]) == 0
    for row in json.loads(capsys.readouterr().out)["methods"]:
        plain = getattr(optim, row["class"])
        assert plain.method == row["name"]
        made = plain([torch.nn.Parameter(torch.zeros(4, 4))])
        assert {key: made.defaults[key] for key in row["defaults"]} == {
            key: tuple(value) if isinstance(value, list) else value for key, value in row["defaults"].items()
        }


def test_init_writes_a_target_that_loads_and_trains(capsys: Capture) -> None:
    assert run(["init", "model.py"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", "Wrote model.py\nnext: memadvise scan model.py\n")
    target = load_target("model.py")
    model = target.model()
    batches = target.batches(2)
    first = target.loss(model, batches[0])
    first.backward()
    assert all(p.grad is not None for p in model.parameters())
    same = load_target("model.py").model()
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    result = subprocess.run([sys.executable, "model.py"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    losses = [float(line.rpartition(" ")[2]) for line in result.stdout.splitlines()]
    assert losses[-1] < losses[0] / 2


def test_init_never_replaces_somebodys_file(capsys: Capture) -> None:
    Path("model.py").write_text("mine")
    assert run(["init", "model.py"]) == 2
    assert "error: model.py exists already\n  hint: give another name, or --force" in capsys.readouterr().err
    assert Path("model.py").read_text() == "mine"
    assert run(["init", "model.py", "--force", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": "model.py"}
    assert "build_model" in Path("model.py").read_text()


@pytest.mark.parametrize(
    ("path", "message"),
    [("model.txt", "does not end in .py"), ("none/model.py", "there is no folder none"), ("d.py", "d.py is a folder")],
)
def test_init_refuses_paths_that_cannot_be_targets(path: str, message: str, capsys: Capture) -> None:
    Path("d.py").mkdir()
    assert run(["init", path]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- report


def test_a_report_is_that_of_the_scan(sample_scan: Scan, capsys: Capture) -> None:
    Path("memadvise.scan.json").write_text(to_json(sample_scan))
    assert run(["report"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("examples/gpt_text.py: 1.98 GiB at the peak, in the backward phase\n")
    assert err == ""
    assert run(["report", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(to_json(sample_scan))
    assert run(["report", "memadvise.scan.json", "-o", "report.txt"]) == 0
    assert Path("report.txt").read_text() == render_scan(sample_scan)


def test_a_report_of_no_scan(capsys: Capture) -> None:
    assert run(["report"]) == 2
    assert "memadvise.scan.json" in capsys.readouterr().err
