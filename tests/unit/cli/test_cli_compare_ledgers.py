"""``compare-ledgers``: which two ledgers, in which form, and when it is a finding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from memadvise.cli.app import run
from memadvise.ledger import Scan, to_json

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_scan: Scan) -> None:
    monkeypatch.chdir(tmp_path)
    first = sample_scan.memory[0]
    measured = replace(first, source="measure", peak_bytes=first.peak_bytes * 1001 // 1000)
    Path("a.json").write_text(to_json(replace(sample_scan, measured=measured)))
    Path("b.json").write_text(to_json(replace(sample_scan, memory=sample_scan.memory[2:])))


def test_two_files(capsys: Capture) -> None:
    assert run(["compare-ledgers", "a.json", "b.json"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("peak: a.json 1.98 GiB, b.json 1.49 GiB (-500.0 MiB, -24.64 %)")
    assert err == ""


def test_estimate_beside_measurement_of_one_file(capsys: Capture) -> None:
    assert run(["compare-ledgers", "a.json", "--fail-above", "1%"]) == 0
    assert capsys.readouterr().out.startswith("peak: estimate 1.98 GiB, measured 1.98 GiB (+2.03 MiB, +0.10 %)")
    assert run(["compare-ledgers", "a.json", "--fail-above", "0.05"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("peak: ")
    assert "the peaks differ by more than 0.05" in err


def test_a_ledger_in_a_file_is_named(capsys: Capture) -> None:
    assert run(["compare-ledgers", "a.json:1", "a.json:3", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["before"], document["after"]) == ("a.json:1", "a.json:3")
    assert document["peak"]["after_bytes"] - document["peak"]["before_bytes"] == -500 * 2**20
    assert document["cells"][0]["category"] == "activations"
    assert document["settings"]["recomputed modules"] == ["none", "transformer.h.*"]
    assert run(["compare-ledgers", "a.json:measured", "a.json:measured", "--format", "markdown", "-o", "out.md"]) == 0
    assert Path("out.md").read_text().startswith("**peak: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["b.json"], "b.json holds no measured ledger"),
        (["b.json"], "memadvise scan examples/gpt_text.py --measure"),
        (["b.json:compiled", "a.json"], "memadvise scan examples/gpt_text.py --compile"),
        (["a.json:4", "a.json"], "a.json:4: there are 3 traced ledgers, counted from 1"),
        (["a.json:0", "a.json"], "counted from 1"),
        (["a.json:measured"], "another one is needed beside it"),
        (["missing.json", "a.json"], "cannot read the scan file missing.json"),
        (["a.json", "b.json", "--fail-above", "much"], "--fail-above much: not a percentage"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: Capture) -> None:
    assert run(["compare-ledgers", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "hint:" in err
