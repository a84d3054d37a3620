"""The frame of the command line: help, exit codes, streams. Commands have their own files."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import memadvise
from memadvise.cli import app as app_module
from memadvise.cli import common
from memadvise.cli.app import main, run
from memadvise.errors import Infeasible, Mark, PlanError, TargetRaised, UsageError

Capture = pytest.CaptureFixture[str]
COMMANDS = ("scan", "report", "recommend", "fit", "verify", "check", "compare-ledgers", "optimizers", "env", "init")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def start(*args: str, code: str = "", **kwargs: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "memadvise", *args]
    env = {**os.environ, "PYTHONPATH": str(Path(memadvise.__file__).parents[1])}
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a shell ignores Ctrl-C, and so would its children: here they must not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **kwargs,
    )


def test_help_and_version(capsys: Capture) -> None:
    assert run(["--help"]) == 0
    out, err = capsys.readouterr()
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert err == ""
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"memadvise {memadvise.__version__}\n"


def test_without_arguments_the_help_is_shown(capsys: Capture) -> None:
    run([])
    out, err = capsys.readouterr()
    assert "recommend" in out + err


@pytest.mark.parametrize("command", COMMANDS)
def test_shared_options_are_spelled_the_same_on_every_command(command: str, capsys: Capture) -> None:
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    shared = ("-f, --force", "--format", "-q, --quiet", "-v, --verbose", "--no-progress", "-h, --help")
    assert all(option in text for option in shared)
    if command != "init":  # its file is its argument
        assert "-o, --output" in text


def cpu_seconds(code: str) -> float:
    """Of a fresh interpreter, the least of three: processor time, as the machine may be busy with other tests."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = start(code=code)
        _, err = process.communicate(timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process.returncode == 0, err
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def test_help_is_fast_and_does_not_import_torch() -> None:
    help_text = "import sys\nfrom memadvise.cli.app import run\nrun(['--help'])\nassert 'torch' not in sys.modules"
    # Beside what any command of typer and rich costs on this machine: hosts differ by a factor of two.
    assert cpu_seconds(help_text) < 2 * cpu_seconds("import typer, rich.table, rich.panel, rich.markdown")


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["nope"], "error: no such command 'nope'", "memadvise --help"),
        (["scan"], "error: missing argument 'TARGET'", "memadvise scan --help"),
        (
            ["recommend"],
            "error: recommend needs a budget",
            "for example --budget 12GB, or --sweep for a table of budgets",
        ),
        (["scan", "m.py", "--nope"], "error: no such option: --nope", "memadvise scan --help"),
        (["scan", "m.py", "--probe-steps", "x"], "error: invalid value for '--probe-steps'", "memadvise scan --help"),
        (["scan", "m.py", "--probe-steps", "0"], "error: invalid value for '--probe-steps'", "memadvise scan --help"),
        (["scan", "m.py", "--device", "tpu"], "error: invalid value for '--device'", "memadvise scan --help"),
        (["env", "--format", "xml"], "error: invalid value for '--format'", "memadvise env --help"),
    ],
)
def test_usage_errors_exit_2(args: list[str], message: str, hint: str, capsys: Capture) -> None:
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.endswith(f"  hint: {hint}\n")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("bad size", hint="try 12GB"), 2, "error: bad size\n  hint: try 12GB\n"),
        (
            TargetRaised("compute_loss raised", where=Mark("model.py", 7, 5, "    return x + 1")),
            3,
            "error: compute_loss raised\n  at model.py:7:5\n        return x + 1\n        ^\n",
        ),
        (Infeasible("no plan fits", hint="raise it"), 1, "error: no plan fits\n  hint: raise it\n"),
        (
            PlanError([UsageError("a", where=Mark("p.yaml", 1, 1, "x")), UsageError("b", hint="c")]),
            2,
            "p.yaml:1:1: error: a\n    x\n    ^\nb\n  hint: c\nerror: 2 mistakes in the plan\n",
        ),
        (
            ValueError("of\nour own"),
            3,
            "error: internal error: ValueError: of our own\n  hint: run with -vv for the traceba",
        ),
        (KeyError("x"), 3, "error: internal error: KeyError: 'x'\n"),
        (MemoryError(), 3, "error: out of memory\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted; no file was left half written\n"),
    ],
)
def test_exceptions_become_exit_codes(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("memadvise.cli.env.gather", fail)
    assert run(["env"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert "Traceback" not in err
    if code != 130:
        assert run(["env", "-vv"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_main_exits_with_the_code() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["nope"])
    assert caught.value.code == 2


def test_one_run_does_not_change_the_next(capsys: Capture) -> None:
    run(["init", "a.py", "--format", "json", "-q", "-vv"])
    run(["nope"])
    assert (common.state.format, common.state.quiet, common.state.verbosity) == ("text", False, 0)
    capsys.readouterr()


def test_a_finding_is_json_where_json_was_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail() -> None:
        raise Infeasible("no plan fits", hint="raise it")

    monkeypatch.setattr("memadvise.cli.env.gather", fail)
    assert run(["env", "--format", "json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"finding": "no plan fits", "hint": "raise it"}
    assert "error: no plan fits" in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(Path(memadvise.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-m", "memadvise", "init", "model.py", "--format", "json", "-q"],
        env=env, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")
    assert Path("model.py").is_file()


def test_ctrl_c_in_a_scan_leaves_no_half_file_and_exits_130() -> None:
    code = """
import sys, time, types
fake = types.ModuleType("memadvise.scan")
fake.ProbeOptions = lambda **kwargs: None
def run_scan(*args, progress, **kwargs):
    progress("working", 0, 1)
    time.sleep(60)
fake.run_scan = fake.resume_scan = run_scan
sys.modules["memadvise.scan"] = fake
from memadvise.cli.app import main
main(["scan", "model.py"])
"""
    process = start(code=code)
    assert process.stderr is not None
    assert process.stderr.readline() == "working ...\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "interrupted" in err
    assert "Traceback" not in err
    assert list(Path().iterdir()) == []


def test_every_command_is_registered_once() -> None:
    names = [c.callback.__name__ for c in app_module.app.registered_commands if c.callback]
    assert names == [command.replace("-", "_") for command in COMMANDS]


def test_a_terminal_gets_a_bar_that_goes_away_and_prints_stay_out_of_the_result() -> None:
    code = """
import sys, time
from memadvise.cli import common
with common.show_progress() as progress:
    for done in range(8):
        progress("probing [h.0]", done, 8)
        print("from the target", file=sys.stderr)
        time.sleep(0.2)
common.print_result("the result\\n")
"""
    parent, child = os.openpty()
    env = {**os.environ, "PYTHONPATH": str(Path(memadvise.__file__).parents[1]), "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=child, text=True)
    os.close(child)
    shown = b""
    try:
        while chunk := os.read(parent, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(parent)
    out, _ = process.communicate(timeout=30)
    text = shown.decode()
    assert (process.returncode, out) == (0, "the result\n")
    assert "probing [h.0]" in text
    assert "7/8" in text
    assert "\x1b[2K" in text, "the bar is erased at the end"
    assert text.count("from the target") == 8
