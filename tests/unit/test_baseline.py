"""The baseline file: what it looks like, what it refuses, and what happens when two write it or the disk is full."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from baseline_entries import HOSTILE, MIB, MODULES, make_entry

from memadvise import baseline
from memadvise.baseline import Baseline, Observation, load_baseline, update_baseline
from memadvise.check import Status, compare
from memadvise.errors import FileFormatError, UsageError
from memadvise.names import expand_ranges


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "memadvise.baseline.json"
    update_baseline(path, [make_entry()])
    return path


def test_an_entry_comes_back_as_it_was(tmp_path: Path) -> None:
    phases = {"forward": {"tokens": {"weights": 4 * MIB}, "h.1.mlp": {"weights": 5 * MIB}}}
    by_phase = {"forward": 9 * MIB, "backward": 42 * MIB}
    entry = make_entry(other_phases=phases, by_phase=by_phase, options={"batch_size": 4}, plan="memadvise.yaml")
    path = tmp_path / "b.json"
    assert update_baseline(path, [entry])
    assert load_baseline(path).find(entry) == entry


def test_the_file_is_sorted_and_one_line_a_module(file: Path, golden: Any) -> None:
    update_baseline(file, [make_entry(target="a.py"), make_entry(plan="memadvise.yaml")])
    text = file.read_text(encoding="utf-8")
    golden("baseline.json", text)
    value = json.loads(text)
    assert [(entry["target"], entry["plan"]) for entry in value["entries"]] == [
        ("a.py", None), ("model.py", None), ("model.py", "memadvise.yaml"),
    ]  # fmt: skip
    assert '    "h.{0..3}.mlp": {"activations": ' in text
    for entry in value["entries"]:
        totals = sum(
            len(expand_ranges(word)) * sum(sum(makers.values()) for makers in categories.values())
            for word, categories in entry["by_module"].items()
        )
        assert totals == entry["peak_bytes"] == sum(entry["by_category"].values())


def test_the_order_of_updates_does_not_matter(tmp_path: Path) -> None:
    entries = [make_entry(target=f"{name}.py") for name in "cab"]
    update_baseline(tmp_path / "one.json", entries)
    for entry in reversed(entries):
        update_baseline(tmp_path / "two.json", [entry])
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_nothing_new_writes_nothing(file: Path) -> None:
    before = file.stat().st_mtime_ns
    assert not update_baseline(file, [make_entry()])
    assert file.stat().st_mtime_ns == before


def test_an_update_replaces_its_own_entry_and_keeps_its_tolerance(file: Path) -> None:
    value = json.loads(file.read_text())
    value["entries"][0]["tolerance"] = "1%"
    file.write_text(json.dumps(value))
    bigger = make_entry({**MODULES, "head": {"weights": {"float32": MIB}}}, batch=("int64[16, 64]",))
    update_baseline(file, [bigger])
    loaded = load_baseline(file)
    assert len(loaded) == 1
    assert loaded.find(bigger) == replace(bigger, tolerance="1%")


def test_other_devices_plans_options_and_lanes_are_other_entries(file: Path) -> None:
    others = [
        make_entry(environment={"device": "cpu", "torch": "2.13.0"}),
        make_entry(plan="p.yaml"),
        make_entry(options={"seq_len": 8}),
        make_entry(source="measure"),
    ]
    update_baseline(file, others)
    assert len(load_baseline(file)) == 5
    elsewhere = make_entry(environment={"device": "cuda sm_80"}, plan="p.yaml")
    found = load_baseline(file).find(elsewhere)
    assert found is not None
    assert found.environment["device"] == "cuda sm_90"
    assert load_baseline(file).find(make_entry(target="other.py")) is None


def test_names_may_be_anything(tmp_path: Path) -> None:
    names = [HOSTILE, "h.{0..3}", "{1}", "\\{1}", "h.0", "h.1", "h.01"]
    entry = make_entry({name: {"weights": {"float32": 512}} for name in names})
    update_baseline(tmp_path / "b.json", [entry])
    assert (tmp_path / "b.json").read_bytes().isascii()
    assert load_baseline(tmp_path / "b.json").find(entry) == entry


# ---------------------------------------------------------------- bad files


def broken(change: Any) -> Any:
    def edit(text: str) -> str:
        value = json.loads(text)
        change(value, value["entries"][0])
        return json.dumps(value)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: "", "is not a whole JSON document"),
        (lambda text: text[: len(text) // 2], "is not a whole JSON document"),
        (lambda text: "[]", "is not a baseline file"),
        (lambda text: "null", "is not a baseline file"),
        (lambda text: '{"schema_version": 2, "memory": []}', "is not a baseline file"),
        (lambda text: '{"schema_version": true, "entries": []}', "is not a baseline file"),
        (lambda text: "[" * 100_000, "is not a baseline file"),
        (lambda text: '{"schema_version": ' + "9" * 5000 + "}", "is not a baseline file"),
        (broken(lambda v, e: v.update(schema_version=99)), "schema version 99; this memadvise reads version 1"),
        (broken(lambda v, e: v.update(schema_version=0)), "schema version 0"),
        (broken(lambda v, e: v["entries"].append(7)), "entry 2 is none of memadvise's"),
        (broken(lambda v, e: v["entries"].append(dict(e))), "two entries for model.py"),
        (broken(lambda v, e: e.pop("target")), "entry 1 is none of memadvise's"),
        (broken(lambda v, e: e.update(environment=None)), "entry 1 is none of memadvise's"),
        (broken(lambda v, e: e.pop("peak_bytes")), "missing 'peak_bytes'"),
        (broken(lambda v, e: e.update(peak_bytes="1 GiB")), "expected int, found str"),
        (broken(lambda v, e: e.update(peak_bytes=True)), "expected int, found bool"),
        (broken(lambda v, e: e.update(peak_bytes=1e9)), "expected int, found float"),
        (broken(lambda v, e: e.update(peak_bytes=1)), "do not add up"),
        (broken(lambda v, e: e["by_category"].update(weights=1)), "do not add up"),
        (broken(lambda v, e: e["by_module"].pop("tokens")), "do not add up"),
        (broken(lambda v, e: e.update(other_phases={"step": {"h": {"weights": 1}}})), "do not add up"),
        (broken(lambda v, e: e["by_module"].update({"{0..999999999}": {}})), "no range"),
        (broken(lambda v, e: e.update(surprise=1)), "unknown key 'surprise'"),
        (lambda text: text.replace('  {\n', "<<<<<<< HEAD\n  {\n", 1), "holds a merge conflict"),
    ],
)  # fmt: skip
def test_a_broken_file_is_a_sentence(file: Path, edit: Any, message: str) -> None:
    file.write_text(edit(file.read_text(encoding="utf-8")), encoding="utf-8")
    before = file.read_bytes()
    with pytest.raises(FileFormatError) as caught:
        load_baseline(file).find(make_entry())
    assert message in str(caught.value)
    assert file.name in str(caught.value)
    assert caught.value.hint
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"\x00" * 100])
def test_bytes_that_are_no_text(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"JSON document"):
        load_baseline(file)


def test_a_foreign_file_is_never_replaced(file: Path) -> None:
    file.write_text('{"name": "package"}')
    with pytest.raises(FileFormatError, match="is not a baseline file"):
        update_baseline(file, [make_entry()])
    assert file.read_text() == '{"name": "package"}'


def test_no_file_a_folder_and_a_pipe(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="there is no baseline file"):
        load_baseline(tmp_path / "none.json")
    for path in (tmp_path / "folder", tmp_path / "pipe"):
        path.mkdir() if path.name == "folder" else os.mkfifo(path)
        with pytest.raises(UsageError, match="not a regular file"):
            load_baseline(path)
        with pytest.raises(UsageError, match="not a regular file"):
            update_baseline(path, [make_entry()])


def test_a_link_is_followed(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(file)
    update_baseline(link, [make_entry(target="b.py")])
    assert link.is_symlink()
    assert len(load_baseline(file)) == 2


# ---------------------------------------------------------------- writing


def _write(path: str, number: int) -> None:
    for i in range(5):
        update_baseline(path, [make_entry(target=f"{number}-{i}.py")])


def test_writers_at_once_lose_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "memadvise.baseline.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(str(path), number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(load_baseline(path)) == 20
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # neither a lock nor a temporary file


def test_the_lock_is_what_saves_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b.json"
    original = Baseline.text
    raced = []

    def race(self: Baseline) -> str:
        """A second writer, between reading and writing of the first, waits for the lock."""
        if not raced:
            raced.append(True)
            command = [sys.executable, "-c", f"import fcntl, os; fd = os.open({str(tmp_path)!r}, os.O_RDONLY); "
                       "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)"]  # fmt: skip
            assert subprocess.run(command, capture_output=True).returncode == 1
        return original(self)

    monkeypatch.setattr(Baseline, "text", race)
    update_baseline(path, [make_entry()])
    assert raced


def test_without_locks_it_is_still_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "fcntl", None)
    assert update_baseline(tmp_path / "b.json", [make_entry()])


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(file: Path) -> None:
    before = file.read_bytes()
    file.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert load_baseline(file).find(make_entry()) is not None
        with pytest.raises(UsageError, match="cannot write") as caught:
            update_baseline(file, [make_entry(target="b.py")])
    finally:
        file.parent.chmod(0o755)
    assert "--baseline" in str(caught.value.hint)
    assert file.read_bytes() == before


def test_a_folder_that_cannot_be_written_whoever_asks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UsageError, match="Read-only file system") as caught:
        update_baseline(file, [make_entry(target="b.py")])
    assert "--baseline" in str(caught.value.hint)
    assert file.read_bytes() == before
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_a_full_disk_leaves_the_old_file_whole(file: Path) -> None:
    before = file.read_bytes()
    code = (
        "import resource, sys; sys.path.insert(0, 'tests'); from baseline_entries import make_entry;"
        "from memadvise.baseline import update_baseline; from memadvise.errors import UsageError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before)}, resource.RLIM_INFINITY))\n"
        "try:\n"
        f"    update_baseline({str(file)!r}, [make_entry(target=f'{{i}}.py') for i in range(50)])\n"
        "except UsageError as error:\n"
        "    print(error)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert "cannot write" in run.stdout
    assert "what was there before is untouched" in run.stdout
    assert file.read_bytes() == before
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_ten_thousand_entries_take_no_time(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    started = time.process_time()
    update_baseline(path, (make_entry(target=f"models/{i}.py") for i in range(10_000)))
    made = time.process_time() - started
    loaded = load_baseline(path)
    assert loaded.find(make_entry(target="models/9999.py")) is not None
    read = time.process_time() - started - made
    assert len(loaded) == 10_000
    # Processor time, so that a busy machine does not fail it; about 1.5 s and 0.3 s where this was written.
    assert made < 15
    assert read < 5


def test_a_lower_bound_is_not_comparable_with_an_estimate(file: Path) -> None:
    bound = make_entry(source="lower bound", environment={**make_entry().environment, "source": "lower bound"})
    assert bound.identity == make_entry().identity
    assert compare(Observation(bound, {}), load_baseline(file).find(bound)).status is Status.not_comparable
