"""``memadvise recommend``, with the advisor replaced: budgets, pins, files, streams."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import memadvise.advise.recommend
import memadvise.scan
from memadvise.advise.profile import Profile
from memadvise.advise.recommend import Wishes
from memadvise.cli.app import run
from memadvise.errors import Infeasible
from memadvise.ledger import Scan, to_json
from memadvise.plan.emit import emit_plan, is_unedited
from memadvise.plan.load import load_plan
from memadvise.plan.schema import Setting
from memadvise.report.text import render_recommendation

Capture = pytest.CaptureFixture[str]
MIB, GIB = 2**20, 2**30


@pytest.fixture
def calls(
    sample_scan: Scan, sample_recommendation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """Replaces the advisor and writes a scan; what the advisor was called with."""
    made: list[dict[str, Any]] = []

    class FakeAdvisor:
        def __init__(self, scan: Scan, **kwargs: Any) -> None:
            self.given = {"scan": scan, **kwargs}

        def recommend(self, budget_bytes: int) -> Any:
            made.append({"budget_bytes": budget_bytes, **self.given})
            return sample_recommendation

    monkeypatch.setattr(memadvise.advise.recommend, "Advisor", FakeAdvisor)
    monkeypatch.setattr(memadvise.scan, "plan_tracer", lambda scan: ("a tracer", ("the target has changed",)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    Path("memadvise.scan.json").write_text(to_json(sample_scan))
    return made


def test_the_choice_goes_to_stdout_and_the_plan_to_its_file(
    calls: list[dict[str, Any]], sample_scan: Scan, sample_recommendation: Any, capsys: Capture
) -> None:
    assert run(["recommend", "--budget", "1700MiB"]) == 0
    out, err = capsys.readouterr()
    assert out == render_recommendation(sample_recommendation, budget="1700MiB")
    assert "warning: the target has changed" in err
    assert "Wrote memadvise.yaml" in err
    assert load_plan("memadvise.yaml") == sample_recommendation.plan
    assert is_unedited("memadvise.yaml")
    text = Path("memadvise.yaml").read_text()
    assert (
        "# Make it again: memadvise recommend --budget 1700MiB --scan memadvise.scan.json -o memadvise.yaml\n" in text
    )
    assert "# Budget: 1700MiB = 1.66 GiB" in text
    assert calls == [
        {"scan": sample_scan, "budget_bytes": 1700 * MIB, "trace": "a tracer", "wishes": Wishes(), "profile": None}
    ]


def test_json_is_one_document(calls: object, sample_recommendation: Any, capsys: Capture) -> None:
    assert run(["recommend", "--budget", "1700MiB", "--reserve", "0", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["budget"] == "1700MiB"
    assert document["total_budget_bytes"] == 1700 * MIB
    assert document["reserve_bytes"] == 0
    assert document["margin_bytes"] == sample_recommendation.margin_bytes
    assert document["plan"]["rules"][0] == {
        "match": "transformer.h.*.mlp.c_fc.weight",
        "method": "slimadam",
        "options": {"axes": [1]},
        "reason": "SNR 6 along fan_in",
        "lr_factor": 1.0,
    }
    assert document["groups"][1]["expected_harm"] == 0.0125
    assert document["before"]["by_category"]["optimizer_state"] == 800 * MIB


@pytest.mark.parametrize(
    ("args", "budget_bytes", "words"),
    [
        (["12GB"], 12 * 10**9, "12GB"),
        (["12GiB"], 12 * GIB, "12GiB"),
        ([" 1000 "], 1000, "1000"),
        (["10GB", "--reserve", "1GB"], 9 * 10**9, "10GB less a reserve of 1GB"),
        (["10GB", "--reserve", "8%"], 9_200_000_000, "10GB less a reserve of 8%"),
        (["10GB", "--reserve", "0GB"], 10**10, "10GB"),
        (["10GB", "--reserve", "0%"], 10**10, "10GB"),
    ],
)
def test_budgets(calls: list[dict[str, Any]], args: list[str], budget_bytes: int, words: str, capsys: Capture) -> None:
    assert run(["recommend", "--budget", *args]) == 0
    assert calls[0]["budget_bytes"] == budget_bytes
    assert f"budget {words} = " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["12 gigs"], "error: '12 gigs' is not a size in bytes\n  hint: write a number and a unit, for example 12GB"),
        (["-3GB"], "error: a budget cannot be negative: '-3GB'\n  hint: "),
        (["0"], "error: '0' is not a positive size\n  hint: "),
        (["0GB"], "error: '0GB' is not a positive size\n  hint: "),
        ([""], "error: '' is not a size in bytes\n  hint: "),
        (["nan"], "error: 'nan' is not a size in bytes\n  hint: "),
        (["10GB", "--reserve", "lots"], "error: 'lots' is not a size in bytes\n  hint: "),
        (["10GB", "--reserve", "10GB"], "error: the reserve of 9.31 GiB leaves nothing of the budget of 9.31 GiB"),
        (["10GB", "--reserve", "100%"], "error: the reserve of 9.31 GiB leaves nothing"),
    ],
)
def test_budgets_that_are_none(calls: list[Any], args: list[str], message: str, capsys: Capture) -> None:
    assert run(["recommend", "--budget", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert calls == []


def test_the_budget_of_the_device(calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("memadvise.memory.device.device_free_bytes", lambda: 11 * GIB)
    assert run(["recommend", "--budget", "device", "--reserve", "1GiB"]) == 0
    assert calls[0]["budget_bytes"] == 10 * GIB
    assert "budget device (11.00 GiB free) less a reserve of 1GiB = " in capsys.readouterr().out
    assert "--budget device --scan" in Path("memadvise.yaml").read_text()


def test_no_device_to_ask(calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert run(["recommend", "--budget", "device"]) == 3
    assert "error: no NVIDIA GPU to ask" in capsys.readouterr().err
    assert calls == []


def test_pins_and_prohibitions(calls: list[Any], capsys: Capture) -> None:
    args = ["--pin", "lm_head.*=adamw", "--pin", "h.*.w=slimadam(axes=[0, 1])", "--pin", "re:a=b|c=lion"]
    args += ["--pin", "x=adam_mini(partition=head, heads=4)", "--pin", "y=sgd(momentum=1e-3)", "--forbid", "lion"]
    assert run(["recommend", "--budget", "12GB", *args, "--forbid", "sgd"]) == 0
    assert list(calls[0]["wishes"].pins) == [
        ("lm_head.*", Setting("adamw")),
        ("h.*.w", Setting("slimadam", {"axes": [0, 1]})),
        ("re:a=b|c", Setting("lion")),
        ("x", Setting("adam_mini", {"partition": "head", "heads": 4})),
        ("y", Setting("sgd", {"momentum": 0.001})),
    ]
    assert calls[0]["wishes"].forbidden == ("lion", "sgd")
    text = Path("memadvise.yaml").read_text()
    assert "--pin 'h.*.w=slimadam(axes=[0, 1])'" in text
    assert "--forbid lion --forbid sgd\n" in text


def test_rules_set_aside_the_objective_and_a_profile(
    calls: list[dict[str, Any]], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "mine.json").write_text('{"profile_version": 1, "name": "mine", "values": []}')
    args = ["--allow", "projection", "--allow", "tiny", "--objective", "speed", "--profile", "mine.json"]
    assert run(["recommend", "--budget", "12GB", *args]) == 0
    assert calls[0]["wishes"] == Wishes(allowed=("projection", "tiny"), objective="speed")
    assert calls[0]["profile"] == Profile("mine", ())
    text = Path("memadvise.yaml").read_text()
    assert "--allow projection --allow tiny --objective speed --profile mine.json\n" in text
    assert run(["recommend", "--budget", "12GB", "--objective", "fast"]) == 2
    assert run(["recommend", "--budget", "12GB", "--profile", "nobody"]) == 2
    assert "there is no profile 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize("pin", ["", "adamw", "=adamw", "a=", "a=1", "a=slimadam(axes=[1)", "a=slimadam(axes)"])
def test_pins_that_cannot_be_read(calls: list[Any], pin: str, capsys: Capture) -> None:
    assert run(["recommend", "--budget", "12GB", "--pin", pin]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --pin '{pin}'")
    assert "write PATTERN=METHOD" in err


def test_a_pin_has_no_learning_rate_factor(calls: list[Any], capsys: Capture) -> None:
    assert run(["recommend", "--budget", "12GB", "--pin", "a=lion(lr_factor=0.1)"]) == 2
    assert "a pin has no lr_factor\n  hint: write it into the plan" in capsys.readouterr().err
    assert not calls
    assert calls == []


def test_own_plans_are_replaced_edited_and_foreign_ones_are_not(calls: list[Any], capsys: Capture) -> None:
    path = Path("memadvise.yaml")
    assert run(["recommend", "--budget", "12GB"]) == 0
    assert run(["recommend", "--budget", "13GB"]) == 0, "its own unedited file"
    edited = path.read_text().replace("axes: [1]", "axes: [0]")
    for mine in (edited, "version: 1\n", ""):
        path.write_text(mine)
        capsys.readouterr()
        assert run(["recommend", "--budget", "12GB"]) == 2
        err = capsys.readouterr().err
        assert "error: memadvise.yaml exists and is not a plan as memadvise wrote it (you may have edited it)" in err
        assert "--force" in err
        assert path.read_text() == mine
    assert len(calls) == 2
    assert run(["recommend", "--budget", "12GB", "--force"]) == 0
    assert is_unedited(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "error: cannot read the scan file memadvise.scan.json: No such file or directory"),
        ('{"schema_version": 1, "targ', "error: memadvise.scan.json is not a whole JSON document"),
        ("", "error: memadvise.scan.json is not a whole JSON document"),
        ("{}", "error: memadvise.scan.json is not a memadvise scan file"),
        ('{"schema_version": 999}', "error: memadvise.scan.json has schema version 999"),
        ('{"schema_version": 1}', "error: memadvise.scan.json has schema version 1; this memadvise reads version 2"),
        ('{"schema_version": 2}', "error: memadvise.scan.json: missing 'target'"),
    ],
)
def test_scan_files_that_cannot_be_used(calls: list[Any], content: str | None, message: str, capsys: Capture) -> None:
    Path("memadvise.scan.json").unlink()
    if content is not None:
        Path("memadvise.scan.json").write_text(content)
    assert run(["recommend", "--budget", "12GB"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert not Path("memadvise.yaml").exists()


def test_nothing_fits(calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def infeasible(self: Any, budget_bytes: int) -> Any:
        raise Infeasible(
            "no plan fits 1.00 GiB: the smallest reachable peak is about 2.00 GiB", hint="raise the budget"
        )

    monkeypatch.setattr(memadvise.advise.recommend.Advisor, "recommend", infeasible)
    Path("memadvise.yaml").write_text(old := emit_plan_of_before())
    assert run(["recommend", "--budget", "1GiB"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: no plan fits 1.00 GiB" in err
    assert Path("memadvise.yaml").read_text() == old
    assert run(["recommend", "--budget", "1GiB", "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["hint"] == "raise the budget"


def emit_plan_of_before() -> str:
    from memadvise.plan.schema import Plan, Rule

    return emit_plan(Plan(rules=(Rule("**", "adamw"),)))


def test_nothing_needs_compressing(
    calls: list[Any], sample_recommendation: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fits = dataclasses.replace(sample_recommendation, needs_compression=False)
    monkeypatch.setattr(memadvise.advise.recommend.Advisor, "recommend", lambda *args: fits)
    assert run(["recommend", "--budget", "12GB"]) == 0
    assert capsys.readouterr().out.startswith("nothing needs compressing: ")
    assert load_plan("memadvise.yaml") == fits.plan


def test_what_is_asked_for_at_once_has_to_go_together(calls: list[Any], capsys: Capture) -> None:
    for arguments, message in (
        ([], "recommend needs a budget"),
        (["--sweep", "--verify", "20"], "--verify trains a plan"),
        (["--budget", "1GB", "--proxy", "--profile", "gpt"], "exclude each other"),
    ):
        assert run(["recommend", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert calls == []
