"""``memadvise scan``, with the scan itself replaced: files, streams, options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memadvise.scan
from memadvise.cli.app import run
from memadvise.errors import TargetError
from memadvise.ledger import Scan, load_scan, to_json
from memadvise.report.text import render_scan

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def calls(sample_scan: Scan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the scan; what it was called with."""
    made: list[dict[str, Any]] = []

    def run_scan(spec: str, *, progress: Callable[[str, int, int], None], **kwargs: Any) -> Scan:
        for step in range(3):
            progress("tracing", step, 3)
        progress("probing", 1, 2)
        made.append({"spec": spec, **kwargs})
        return sample_scan

    monkeypatch.setattr(memadvise.scan, "run_scan", run_scan)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return made


def test_the_report_goes_to_stdout_and_the_scan_to_its_file(
    calls: list[dict[str, Any]], sample_scan: Scan, capsys: Capture
) -> None:
    assert run(["scan", "model.py"]) == 0
    out, err = capsys.readouterr()
    assert out == render_scan(sample_scan)
    assert err.splitlines() == [
        "tracing ...", "probing ...", "", "Wrote memadvise.scan.json", "next: memadvise recommend --budget 12GB",
    ]  # fmt: skip
    assert load_scan("memadvise.scan.json") == sample_scan
    assert [path.name for path in Path().iterdir()] == ["memadvise.scan.json"]
    probe = memadvise.scan.ProbeOptions(num_steps=60, lr=1e-3, weight_decay=0.0, seed=0, hessian=True)
    assert calls == [{"spec": "model.py", "target_options": {}, "device": "cuda", "probe": probe}]


def test_json_is_one_document_and_quiet_is_quiet(calls: object, sample_scan: Scan, capsys: Capture) -> None:
    assert run(["scan", "model.py", "--format", "json", "-q"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(to_json(sample_scan))
    assert err == ""
    assert run(["scan", "model.py", "--no-progress"]) == 0
    assert "..." not in capsys.readouterr().err


def test_options_reach_the_scan(calls: list[dict[str, Any]], capsys: Capture) -> None:
    args = [
        "scan",
        "hf:config",
        "--no-probe",
        "--device",
        "cpu",
        "-o",
        "a.json",
        "--batch-size",
        "2",
        "--seq-len",
        "64",
    ]
    assert run([*args, "--dtype", "bfloat16"]) == 0
    assert (
        run(
            [
                "scan",
                "m.py",
                "--probe-steps",
                "9",
                "--lr",
                "1e-2",
                "--weight-decay",
                "0.1",
                "--betas",
                "0.9",
                "0.95",
                "--seed",
                "4",
                "-o",
                "b.json",
            ]
        )
        == 0
    )
    assert "--scan a.json" in capsys.readouterr().err
    assert calls[0] == {
        "spec": "hf:config",
        "target_options": {"batch_size": 2, "seq_len": 64, "dtype": "bfloat16"},
        "device": "cpu",
        "probe": None,
    }
    assert calls[1]["probe"] == memadvise.scan.ProbeOptions(
        num_steps=9, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), seed=4
    )


@pytest.mark.parametrize(
    "flags",
    [["--lr", "0"], ["--lr", "nan"], ["--weight-decay", "-1"], ["--betas", "0.9", "1"], ["--betas", "-1", "0.9"]],
)
def test_hyper_parameters_out_of_range(calls: list[Any], capsys: Capture, flags: list[str]) -> None:
    assert run(["scan", "model.py", *flags]) == 2
    err = capsys.readouterr().err
    assert flags[0] in err
    assert "for example" in err
    assert calls == []


def test_an_older_scan_is_replaced_another_file_is_not(calls: list[Any], capsys: Capture) -> None:
    path = Path("memadvise.scan.json")
    path.write_text('{"schema_version": 0, "fingerprint": "", "memory": []}')
    assert run(["scan", "model.py"]) == 0
    for foreign in ('{"name": "package"}', "[1]", "not json", ""):
        path.write_text(foreign)
        assert run(["scan", "model.py"]) == 2
        assert "exists and is not a scan file of memadvise" in capsys.readouterr().err
        assert path.read_text() == foreign
    assert len(calls) == 1, "refused before the work, not after"
    assert run(["scan", "model.py", "--force"]) == 0
    load_scan(path)


def test_the_target_is_never_overwritten(calls: list[Any], capsys: Capture) -> None:
    Path("model.py").write_text("mine")
    assert run(["scan", "model.py:build", "-o", "model.py", "--force"]) == 2
    assert "model.py is the target itself" in capsys.readouterr().err
    assert Path("model.py").read_text() == "mine"
    assert calls == []


def test_folders_that_cannot_be_written(calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert run(["scan", "model.py", "-o", "none/here.json"]) == 2
    assert "error: there is no folder none to write here.json in\n  hint: mkdir -p none\n" in capsys.readouterr().err
    Path("folder").mkdir()
    assert run(["scan", "model.py", "-o", "folder"]) == 2
    assert "error: folder is a folder" in capsys.readouterr().err

    def denied(**kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", denied)
    assert run(["scan", "model.py"]) == 2
    assert "error: cannot write in the folder .: Permission denied" in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize("args", [["--lr", "0"], ["--lr", "nan"], ["--lr", "-1"], ["--weight-decay", "-0.1"]])
def test_numbers_out_of_range(calls: list[Any], args: list[str], capsys: Capture) -> None:
    assert run(["scan", "model.py", *args]) == 2
    assert f"error: {args[0]} " in capsys.readouterr().err
    assert calls == []


def test_a_scan_that_fails_leaves_the_old_file(
    calls: list[Any], sample_scan: Scan, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert run(["scan", "model.py"]) == 0
    before = Path("memadvise.scan.json").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> Scan:
        raise TargetError("build_batches() gave no batch", hint="yield at least one")

    monkeypatch.setattr(memadvise.scan, "run_scan", fail)
    capsys.readouterr()
    assert run(["scan", "model.py"]) == 2
    assert capsys.readouterr() == ("", "error: build_batches() gave no batch\n  hint: yield at least one\n")
    assert Path("memadvise.scan.json").read_bytes() == before
    assert [path.name for path in Path().iterdir()] == ["memadvise.scan.json"]


@pytest.mark.parametrize(
    ("text", "names"),
    [("quick", None), ("none", ()), ("lion, adapprox", ("lion", "adapprox")), ("all", "every one")],
)
def test_which_optimizers_are_tried(calls: list[Any], text: str, names: Any) -> None:
    from memadvise.optim.registry import list_methods

    assert run(["scan", "model.py", "--optimizers", text]) == 0
    assert calls[0]["probe"].optimizers == (list_methods() if names == "every one" else names)


def test_an_optimizer_that_is_none(calls: list[Any], capsys: Capture) -> None:
    assert run(["scan", "model.py", "--optimizers", "adamw,loin"]) == 2
    err = capsys.readouterr().err
    assert "--optimizers: there is no method 'loin'" in err
    assert "did you mean 'lion'?" in err
    assert calls == []
