"""``memadvise scan``, with the scan itself replaced: files, streams, options."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import memadvise.scan
from memadvise.cli.app import run
from memadvise.cli.common import Interrupt
from memadvise.errors import TargetError
from memadvise.ledger import Scan, load_scan, to_json
from memadvise.memory.architecture import DeviceModel, device_model
from memadvise.report.text import render_scan

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def calls(sample_scan: Scan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the scan; what it was called with."""
    made: list[dict[str, Any]] = []

    def run_scan(spec: str, *, progress: Callable[[str, int, int], None], stop: object, **kwargs: Any) -> Scan:
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
    probe = memadvise.scan.ProbeOptions(num_steps=60, lr=None, weight_decay=0.0, shadow_bytes=4 * 2**30)
    assert calls == [
        {
            "spec": "model.py",
            "target_options": {},
            "device": device_model("cuda"),
            "probe": probe,
            "measured": False,
            "compiled": False,
            "asked": None,
            "extrapolate_depth": False,
            "tensors": "auto",
        }
    ]


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
        "--extrapolate-depth",
        "--tensors",
        "real",
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
        "device": DeviceModel("cpu"),
        "probe": None,
        "measured": False,
        "compiled": False,
        "asked": None,
        "extrapolate_depth": True,
        "tensors": "real",
    }
    assert calls[1]["probe"] == memadvise.scan.ProbeOptions(
        num_steps=9, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), seed=4, shadow_bytes=4 * 2**30
    )
    capsys.readouterr()
    more = ["--checkpoint", "run.pt", "--probe-memory", "1GiB", "--snr-rule", "official"]
    assert run(["scan", "m.py", *more]) == 0
    assert calls[2]["probe"] == memadvise.scan.ProbeOptions(
        checkpoint="run.pt", shadow_bytes=2**30, snr_rule="official"
    )
    assert run(["scan", "m.py", "--probe-memory", "much"]) == 2


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


def test_what_is_assumed_of_the_device_reaches_the_scan(calls: list[dict[str, Any]]) -> None:
    options = ("--arch", "sm_80", "--attention", "math", "--assume", "torch=2.11", "--assume", "cublas_workspace=0")
    assert run(["scan", "model.py", *options]) == 0
    asked = device_model("cuda", arch="sm_80", attention="math", torch="2.11", cublas_workspace=0)
    assert calls[0]["device"] == asked


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "cpu", "--arch", "sm_80"], "nothing is assumed of --device cpu"),
        (["--arch", "sm_1"], "one of sm_70"),
        (["--assume", "colour=red"], "NAME=VALUE"),
        (["--attention", "ring"], "one of auto, flash"),
    ],
)
def test_a_mistake_in_what_is_assumed(
    options: list[str], words: str, calls: list[dict[str, Any]], capsys: Capture
) -> None:
    assert run(["scan", "model.py", *options]) == 2
    assert words in capsys.readouterr().err
    assert calls == []


# ---------------------------------------------------------------- Ctrl-C


def test_ctrl_c_is_a_request_while_the_probe_runs_and_the_end_otherwise() -> None:
    interrupt, seen = Interrupt(), []
    progress = interrupt.polite_while("probing", lambda *call: seen.append(call))
    assert not interrupt.ask()  # nothing begun: nothing to be kept
    progress("tracing one step", 1, 2)
    assert not interrupt.ask()
    progress("probing: AdamW", 1, 60)
    assert not interrupt.asked()
    assert interrupt.ask()
    assert interrupt.asked()
    assert not interrupt.ask()  # the second time
    assert seen == [("tracing one step", 1, 2), ("probing: AdamW", 1, 60)]


def test_an_interrupted_scan_is_written_and_resumed(
    calls: list[Any], sample_scan: Scan, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert sample_scan.probe is not None
    begun = replace(sample_scan, probe=replace(sample_scan.probe, complete=False))
    monkeypatch.setattr(memadvise.scan, "run_scan", lambda spec, **kwargs: begun)
    assert run(["scan", sample_scan.target, "-o", "a.json"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "interrupted; what was measured is in a.json" in err
    assert f"to go on: memadvise scan {sample_scan.target} --resume -o a.json" in err
    assert load_scan("a.json") == begun

    resumed = []
    monkeypatch.setattr(memadvise.scan, "resume_scan", lambda scan, **kwargs: resumed.append(scan) or sample_scan)
    assert run(["scan", sample_scan.target, "--resume", "-o", "a.json"]) == 0
    assert resumed == [begun]
    assert load_scan("a.json") == sample_scan
    assert run(["scan", "other.py", "--resume", "-o", "a.json"]) == 2
    assert "a.json is a scan of examples/gpt_text.py, not of other.py" in capsys.readouterr().err
    assert run(["scan", "other.py", "--resume", "-o", "none.json"]) == 2
