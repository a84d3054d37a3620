"""``memadvise optimizers --explain``: what a plan does to each parameter, with nothing allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memadvise.cli.app import run
from memadvise.errors import UsageError
from memadvise.explain import parameters_of
from memadvise.optim import create_optimizer
from memadvise.plan.schema import ModelShape

Capture = pytest.CaptureFixture[str]

TARGET = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(64, 256, bias=False), nn.LayerNorm(64)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 32)
        self.h = nn.ModuleList(Block() for _ in range(3))

def build_model():
    return Model()

def build_batches():
    raise AssertionError("no batch is needed")
"""
RULES = """version: 1
rules:
  - {match: "h.1.up.weight", method: slimadam, axes: [1]}
  - {match: "h.*.up.weight", method: apollo, rank: 4, lr_factor: 10}
  - {match: "head.weight", method: lion, weights: int8}
  - {match: "**", method: adamw}
"""
VALUES = 3 * (64 * 256 + 2 * 64) + 64 * 32 + 32
MODEL = f"""model:
  fingerprint: sha256:1
  num_parameters: {VALUES}
  shapes:
    {{head.weight: [32, 64], head.bias: [32], h.*.up.weight: [256, 64], h.*.norm.weight: [64], h.*.norm.bias: [64]}}
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(TARGET)
    Path("plan.yaml").write_text(RULES + MODEL)


def document(capsys: Capture, *args: str) -> Any:
    assert run(["optimizers", "--explain", "plan.yaml", "--format", "json", *args]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_parameter_with_what_is_executed(capsys: Capture) -> None:
    scope: dict[str, Any] = {}
    exec(TARGET, scope)
    model = scope["build_model"]()
    real = {m.name: m for m in create_optimizer(model, "plan.yaml", lr=1e-3).memory()}
    for args in ((), ("--target", "model.py")):
        found = document(capsys, "--device", "cpu", *args)
        rows = {row["name"]: row for row in found["parameters"]}
        assert rows.keys() == real.keys()
        for name, row in rows.items():
            expected = real[name]
            assert tuple(row["shape"]) == expected.shape
            assert row["setting"] == expected.setting
            assert row["executor"] == expected.executor
            assert row["state_bytes"] == expected.state_bytes
            assert row["scratch_bytes"] == expected.scratch_bytes
        assert found["state_bytes"] == sum(m.state_bytes for m in real.values())
        assert found["largest_scratch_bytes"] == max(m.scratch_bytes for m in real.values())
        assert {n: r["lr_factor"] for n, r in rows.items() if r["lr_factor"] != 1} == {
            "h.0.up.weight": 10.0,
            "h.2.up.weight": 10.0,
        }
    assert [row["name"] for row in found["parameters"]] == [n for n, _ in scope["build_model"]().named_parameters()]


def test_the_table_and_the_device(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run(["optimizers", "--explain", "plan.yaml"]) == 0
    text = capsys.readouterr().out
    assert "h.1.up.weight     [256, 64]" in text
    assert "lion(weights=int8)" in text
    assert "lr factor" in text
    assert "11 parameters on cuda: " in text
    assert "repeated blocks numbered from 0; parameters are taken as float32" in text
    Path("plan.yaml").write_text("device: cpu\n" + (RULES + MODEL).replace(", lr_factor: 10", ""))
    assert run(["optimizers", "--explain", "plan.yaml", "-o", "out.txt"]) == 0
    text = Path("out.txt").read_text()
    assert "11 parameters on cpu: " in text
    assert "lr factor" not in text


def test_bfloat16_is_taken_where_weights_ask_for_it(capsys: Capture) -> None:
    rules = (
        'version: 1\nrules:\n  - {match: "head.*", method: adamw, weights: ecc8}\n  - {match: "**", method: adamw}\n'
    )
    Path("plan.yaml").write_text(rules + MODEL)
    rows = {row["name"]: row for row in document(capsys)["parameters"]}
    assert (rows["head.weight"]["dtype"], rows["h.0.up.weight"]["dtype"]) == ("bfloat16", "float32")
    assert rows["head.weight"]["state_bytes"] == 9 * 64 * 32 + 4


def test_nothing_is_allocated(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    big = RULES + MODEL.replace("256, 64", "262144, 65536").replace(str(VALUES), str(VALUES + 3 * (2**34 - 2**14)))
    Path("plan.yaml").write_text(big.replace("weights: int8", "cautious: true"))
    assert document(capsys)["state_bytes"] > 10**9


@pytest.mark.parametrize(
    ("plan", "args", "message"),
    [
        (RULES, [], "plan.yaml has no 'model' section with shapes to explain it on\n  hint: give the model"),
        (RULES + MODEL.replace(str(VALUES), "99999"), [], "does not say how often each of its repeated blocks repeats"),
        (RULES.replace("apollo", "apolo") + MODEL, [], "plan.yaml:4:38: error: there is no method 'apolo'"),
        (RULES.replace("h.1.up", "h.3.up") + MODEL, [], "'h.3.up.weight' matches no trainable parameter"),
        (RULES + MODEL.replace("32, 64", "64, 64"), ["--target", "model.py"], "the plan was made for another model"),
        (RULES, ["--target", "nothing.py"], "nothing.py"),
        (RULES + MODEL, ["adamw"], "--explain shows a plan, not the method adamw"),
    ],
)
def test_what_cannot_be_explained(plan: str, args: list[str], message: str, capsys: Capture) -> None:
    Path("plan.yaml").write_text(plan)
    assert run(["optimizers", *args, "--explain", "plan.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_a_target_or_device_alone_is_refused(capsys: Capture) -> None:
    for args in (["--target", "model.py"], ["--device", "cpu"]):
        assert run(["optimizers", *args]) == 2
        assert "--target and --device go with --explain" in capsys.readouterr().err


def test_how_often_blocks_repeat() -> None:
    shapes = {"h.*.w": (2, 3), "h.*.b": (2,), "a[*].w": (5,)}
    assert parameters_of(ModelShape("f", 21, shapes)) == {
        "h.0.w": (2, 3), "h.1.w": (2, 3), "h.0.b": (2,), "h.1.b": (2,), "a*.w": (5,),
    }  # fmt: skip
    assert parameters_of(ModelShape("f", 6, {"w": (2, 3)})) == {"w": (2, 3)}
    for count, patterns in (
        (12, {"h.*.w": (2,), "g.*.w": (2,)}),  # two stacks, perhaps of different depths
        (12, {"h.*.e.*.w": (2,)}),
        (7, {"h.*.w": (2,)}),
        (7, {"w": (2, 3)}),
        (6, {"w": (2, 3), "h.*.w": (2,)}),
    ):
        with pytest.raises(UsageError, match="does not say how often"):
            parameters_of(ModelShape("f", count, patterns))
