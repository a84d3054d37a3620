from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memadvise import ledger as ledger_module
from memadvise.errors import FileFormatError, UsageError
from memadvise.ledger import (
    FidelityValue,
    HessianValue,
    LiveTensor,
    MemoryLedger,
    OptimizerRun,
    Parameter,
    ParameterProbe,
    PhasePeak,
    ProbeLedger,
    Scan,
    Segment,
    SnrValue,
    from_dict,
    load_scan,
    to_json,
    write_whole,
)

MEMORY = MemoryLedger(
    source="estimate",
    device="cuda",
    optimizer="torch.optim.AdamW (foreach)",
    micro_batches=1,
    checkpoint=("h.*",),
    peak_bytes=100,
    peak_phase="step",
    state_bytes=40,
    by_category={"weights": 60, "optimizer_state": 40},
    by_module={"h.0": {"weights": 60, "optimizer_state": 40}},
    phases=(PhasePeak("step", 100, {"weights": 60, "optimizer_state": 40}),),
    live_at_peak=(LiveTensor(60, "weights", "h.0", "aten.empty", "forward", "model.py:3"),),
    timeline=((0, 60), (1, 100)),
    num_events=2,
)
SCAN = Scan(
    target="model.py",
    target_sha256=None,
    environment={"torch": "2.13"},
    fingerprint="sha256:0",
    parameters=(
        Parameter(
            "h.0.qkv.weight", (12, 4), "float32", 192, True, "attention_qkv", "h.0.qkv", "Linear", (1,), (0,),
            segments=(Segment("attention_query", 0, 4, 2),),
        ),
    ),
    memory=(MEMORY,),
    probe=ProbeLedger(
        num_steps=2,
        recorded_steps=(1, 2),
        lr=1e-3,
        losses=(1.0, 0.5),
        parameters=(
            ParameterProbe(
                "h.0.qkv.weight",
                (SnrValue((0, 1), 2.0, None, 0.3),),
                (FidelityValue("adamw", 0.0, 0.0),),
                (HessianValue("row", 0.5, 0.1, 0.2, "gradient-covariance", 8),),
            ),
        ),
        runs=(OptimizerRun("sgd", {"momentum": 0.9}, 0.1, 2, 1.0, None, 192, None, "diverged"),),
    ),
)  # fmt: skip


def test_a_scan_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "scan.json"
    write_whole(path, to_json(SCAN))
    assert load_scan(path) == SCAN


def test_numel_of_a_parameter() -> None:
    assert SCAN.parameters[0].numel == 48


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(schema_version=99), "schema version 99"),
        (lambda d: d.pop("schema_version"), "not a memadvise scan file"),
        (lambda d: d.pop("fingerprint"), "missing 'fingerprint'"),
        (lambda d: d.update(extra=1), "unknown key 'extra'"),
        (lambda d: d["memory"][0].update(peak_bytes="100"), "memory[0].peak_bytes: expected int, found str"),
        (lambda d: d["memory"][0].update(peak_bytes=True), "expected int, found bool"),
        (lambda d: d["parameters"][0].update(shape=4), "parameters[0].shape: expected a list"),
        (lambda d: d["memory"][0]["timeline"].append([1]), "timeline[2]: expected 2 items"),
        (lambda d: d.update(probe=[]), "probe: expected an object"),
        (lambda d: d.update(environment=[]), "environment: expected an object"),
    ],
)
def test_a_damaged_scan_is_refused_with_the_place(tmp_path: Path, change: Callable[[Any], object], says: str) -> None:
    path = tmp_path / "scan.json"
    value = json.loads(to_json(SCAN))
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(FileFormatError) as caught:
        load_scan(path)
    assert says in str(caught.value)


@pytest.mark.parametrize("content", [b"", b'{"schema_version": 1, "tar', b"\xff\xfe", b"[]"])
def test_truncated_and_foreign_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "scan.json"
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        load_scan(path)
    assert "scan" in str(caught.value.hint)


def test_a_missing_scan_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError) as caught:
        load_scan(tmp_path / "none.json")
    assert "memadvise scan" in str(caught.value.hint)


def test_nan_never_reaches_a_file() -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_json(replace(MEMORY, by_category={"weights": float("nan")}))  # type: ignore[dict-item]


def test_phase_lookup() -> None:
    assert MEMORY.phase("step").peak_bytes == 100
    with pytest.raises(KeyError):
        MEMORY.phase("forward")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger_module.os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_write_whole_asks_before_replacing(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("mine")
    with pytest.raises(UsageError) as caught:
        write_whole(path, "new", force=False)
    assert "--force" in str(caught.value.hint)
    assert path.read_text() == "mine"
    write_whole(path, "new", force=True)
    assert path.read_text() == "new"


def test_write_whole_keeps_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("a file as any program makes it")
    fresh, old = tmp_path / "fresh.yaml", tmp_path / "old.yaml"
    write_whole(fresh, "new")
    assert fresh.stat().st_mode == (tmp_path / "plain").stat().st_mode
    old.write_text("old")
    old.chmod(0o640)
    write_whole(old, "new")
    assert (old.read_text(), old.stat().st_mode & 0o777) == ("new", 0o640)


def test_write_whole_leaves_devices_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="not a regular file"):
        write_whole(pipe, "new", force=True)
    assert pipe.is_fifo()


def test_write_whole_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        write_whole(tmp_path / "none" / "x.json", "new")


def test_integers_are_accepted_where_floats_are_expected() -> None:
    assert from_dict(FidelityValue, {"candidate": "adamw", "abs_d1": 0, "one_minus_cos": 1}).abs_d1 == 0.0
