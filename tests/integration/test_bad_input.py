"""Bad input through the command line and the training script: a clear sentence, the right exit code, nothing lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ENVIRONMENT, document, memadvise, succeed

from memadvise import create_optimizer, load_target
from memadvise.errors import MemadviseError, PlanError
from memadvise.ledger import Scan, load_scan
from memadvise.plan.load import load_plan

pytestmark = pytest.mark.slow

TARGET = """\
import torch
from torch import nn


def build_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def build_batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 64, generator=generator) for _ in range(8)]


def compute_loss(model, batch):
    return (model(batch) - batch).square().mean()


def real(tensor):
    "Whether it holds numbers: False under a trace."
    return type(tensor) in (torch.Tensor, nn.Parameter)
"""
FAST = ("--device", "cpu", "--probe-steps", "10", "--no-hessian")


def write(folder: Path, *more: str, base: str = TARGET) -> Path:
    """A target in ``folder``; later definitions replace earlier ones."""
    path = folder / "model.py"
    path.write_text("\n\n".join((base, *more)), encoding="utf-8")
    return path


def scan(folder: Path, *arguments: str) -> Scan:
    succeed(folder, "scan", "model.py", *FAST, *arguments)
    return load_scan(folder / "memadvise.scan.json")


# ---------------------------------------------------------------- targets that cannot be scanned

BROKEN: dict[str, tuple[str, int, tuple[str, ...], str | None]] = {
    # name: (code, exit code, what the message says, text of the line it points at)
    "does not import": ("import not_there_at_all", 3, ("importing model.py", "not_there_at_all"), "import not_there"),
    "is not Python": ("def build_model(:", 3, ("importing model.py", "SyntaxError"), "def build_model(:"),
    "lacks a function": ("del build_batches", 2, ("has no function build_batches()", "memadvise init"), None),
    "raises in build_model": (
        "def build_model():\n    raise ValueError('no weights today')",
        3, ("build_model() of model.py raised ValueError: no weights today",), "no weights today",
    ),
    "raises in build_batches": (
        "def build_batches():\n    yield torch.randn(8, 64)\n    raise OSError('the disk is gone')",
        3, ("build_batches() of model.py raised OSError: the disk is gone",), "the disk is gone",
    ),
    "raises in the loss": (
        "def compute_loss(model, batch):\n    return {'x': batch}['labels']",
        3, ("compute_loss(model, batch) of model.py raised KeyError: 'labels'",), "['labels']",
    ),
    "raises in train_step": (
        "def train_step(model, batch, optimizer):\n    raise RuntimeError('boom')",
        3, ("train_step(model, batch, optimizer) of model.py raised RuntimeError: boom",), "'boom'",
    ),
    "train_step of two arguments": (
        "def train_step(model, batch):\n    pass", 3, ("raised TypeError", "positional argument"), "def train_step",
    ),
    "model of the wrong type": (
        "def build_model():\n    return 'gpt2'", 2, ("returned str, not a torch.nn.Module",), None,
    ),
    "batches that are one batch": (
        "def build_batches():\n    return {'x': torch.randn(8, 64)}", 2, ("returned dict, not an iterable",), None,
    ),
    "no batch": ("def build_batches():\n    return []", 2, ("gave no batch",), None),
    "loss of the wrong shape": (
        "def compute_loss(model, batch):\n    return model(batch)",
        2, ("gave a tensor of shape [8, 64], where a scalar loss is needed",), "def compute_loss(model, batch):",
    ),
    "no loss": (
        "def compute_loss(model, batch):\n    model(batch)", 2, ("gave NoneType, where a scalar loss",), None,
    ),
    "loss without a gradient": (
        "def compute_loss(model, batch):\n    return model(batch).mean().detach()",
        2, ("does not depend on any trainable parameter",), None,
    ),
    "no trainable parameter": (
        "unfrozen = build_model\ndef build_model():\n    return unfrozen().requires_grad_(False)",
        2, ("has no trainable parameter", "requires_grad=True"), None,
    ),
    "a batch that does not fit": (
        "def build_batches():\n    return [torch.randn(8, 65)]",
        3, ("compute_loss(model, batch) of model.py raised RuntimeError", "65"), "(model(batch) - batch)",
    ),
    "a later batch that does not fit": (
        "def build_batches():\n    return [torch.randn(8, 64)] * 4 + [torch.randn(8, 65)]",
        3, ("raised RuntimeError", "65", "--no-probe"), "(model(batch) - batch)",
    ),
    "sparse gradients": (
        "def build_model():\n    return nn.Embedding(64, 64, sparse=True)\n\n\n"
        "def compute_loss(model, batch):\n    return model(batch.argmax(1)).square().mean()",
        2, ("the gradient of weight in model.py is sparse", "sparse=True"), None,
    ),
    "sys.exit": ("raise SystemExit(0)", 3, ("called sys.exit(0)",), None),
}  # fmt: skip


Run = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def broken_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[tuple[Path, Run]]]:
    """A scan of every broken target, two at a time: the processes start while the first are looked at."""

    def run(name: str) -> tuple[Path, Run]:
        path = write(tmp_path_factory.mktemp("broken"), BROKEN[name][0])
        return path, memadvise(path.parent, "scan", path.name, *FAST, "--quiet")

    pool = ThreadPoolExecutor(2)
    return {name: pool.submit(run, name) for name in BROKEN}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_target_is_named_with_its_place(name: str, broken_runs: dict[str, Future[tuple[Path, Run]]]) -> None:
    _, exit_code, says, pointed_at = BROKEN[name]
    path, run = broken_runs[name].result()
    assert (run.returncode, run.stdout) == (exit_code, ""), run.stderr
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("error: ") == 1
    assert "internal error" not in run.stderr
    for words in says:
        assert words in run.stderr
    if pointed_at is not None:
        lines = path.read_text(encoding="utf-8").splitlines()
        last = max(number for number, line in enumerate(lines, start=1) if pointed_at in line)
        assert f"{path}:{last}" in run.stderr
    assert [entry.name for entry in path.parent.iterdir()] == ["model.py"]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere.py", "there is no file nowhere.py"),
        ("model", "'model' is not a target"),
        ("not_a_package:target", "there is no module not_a_package"),
        ("model.py:missing", "model.py has no 'missing'"),
        ("model.py:build_model", "not a memadvise.Target"),
        ("hf:nowhere", "there is no file nowhere"),
    ],
)
def test_a_target_that_is_not_there(target: str, says: str, tmp_path: Path) -> None:
    write(tmp_path)
    run = memadvise(tmp_path, "scan", target, "--no-probe")
    assert run.returncode == 2
    assert says in run.stderr
    assert "hint: " in run.stderr


# ---------------------------------------------------------------- what the probe survives

WHEN_REAL = """
loss_as_before = compute_loss


def compute_loss(model, batch):
    loss = loss_as_before(model, batch)
    if real(batch):
        {what}
    return loss
"""
OUT_OF_MEMORY = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."
PROBLEMS: dict[str, tuple[str, str, int]] = {
    "NaN from the start": ("loss = loss * float('nan')", "the loss became nan at step 0", 0),
    "NaN at step 5": (
        "if torch.equal(batch, build_batches()[5]): loss = loss * float('nan')",
        "the loss became nan at step 5", 5,
    ),
    "MemoryError": ("raise MemoryError", "out of memory at step 0", 0),
    "torch's allocator": (f"raise RuntimeError({OUT_OF_MEMORY!r})", "out of memory at step 0", 0),
    "the real thing": ("torch.empty(2**50)", "out of memory at step 0", 0),
}  # fmt: skip
ADVISED = ("NaN from the start", "MemoryError")  # the others leave the same scan file


@dataclass
class Degraded:
    """A scan whose probe failed, and a recommendation from it."""

    folder: Path
    printed: str
    scan: Scan
    budget: int
    advised: str | None


@pytest.fixture(scope="module")
def degraded_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Degraded]]:
    """All of them, two at a time."""

    def run(name: str) -> Degraded:
        folder = tmp_path_factory.mktemp("degraded")
        write(folder, WHEN_REAL.format(what=PROBLEMS[name][0]))
        printed = succeed(folder, "scan", "model.py", *FAST).stdout
        result = load_scan(folder / "memadvise.scan.json")
        budget = result.memory[-1].peak_bytes * 88 // 100
        advised = succeed(folder, "recommend", "--budget", str(budget)).stdout if name in ADVISED else None
        return Degraded(folder, printed, result, budget, advised)

    pool = ThreadPoolExecutor(2)
    return {name: pool.submit(run, name) for name in PROBLEMS}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_probe_that_fails_leaves_exact_bytes_and_unknown_statistics(
    name: str, degraded_runs: dict[str, Future[Degraded]]
) -> None:
    _, problem, num_steps = PROBLEMS[name]
    run = degraded_runs[name].result()
    assert "bytes are exact" in run.printed
    assert f"the AdamW probe ended early: {problem}" in " ".join(run.printed.split())
    assert run.scan.memory[0].state_bytes == sum(8 * p.numel + 4 for p in run.scan.parameters)
    probe = run.scan.probe
    assert probe is not None
    assert probe.num_steps == num_steps
    for parameter in probe.parameters:
        assert problem in parameter.unknown
        assert (parameter.snr, parameter.fidelity) == ((), ())
    assert {tried.problem for tried in probe.runs} <= {problem, "out of memory"}
    assert {tried.num_steps for tried in probe.runs} == {num_steps}

    if run.advised is None:
        return
    assert "not measured" in run.advised
    plan = load_plan(run.folder / "memadvise.yaml")
    assert {rule.method for rule in plan.rules} > {"adamw"}
    assert plan.predicted_peak_bytes <= run.budget
    assert "the mean that the papers recommend" in (run.folder / "memadvise.yaml").read_text()


def test_prints_of_the_target_stay_out_of_the_document(tmp_path: Path) -> None:
    write(
        tmp_path,
        "import os, sys\nprint('on import')\nos.system('echo from a child')\nos.write(1, b'raw descriptor\\n')",
        WHEN_REAL.format(what="print('in the loss')"),
    )
    run = succeed(tmp_path, "scan", "model.py", *FAST, "--format", "json")
    assert document(run.stdout)["target"] == "model.py"
    for words in ("on import", "from a child", "raw descriptor", "in the loss"):
        assert words in run.stderr
        assert words not in run.stdout
    peak = load_scan(tmp_path / "memadvise.scan.json").memory[0].peak_bytes
    advised = succeed(tmp_path, "recommend", "--budget", str(peak), "--format", "json")
    assert document(advised.stdout)["total_budget_bytes"] == peak
    assert "on import" in advised.stderr


# ---------------------------------------------------------------- unusual targets that work

LANGUAGE_MODEL = """\
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(128, 64)
        self.unused = nn.Linear(96, 96)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 128, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(torch.relu(self.body(self.frozen(self.tokens(ids)))))


def build_model():
    torch.manual_seed(0)
    return Model(){dtype}


def build_batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(128, (8, 16), generator=generator) for _ in range(8)]


def compute_loss(model, ids):
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
"""
OWN_STEP = """
def train_step(model, batch, optimizer):
    loss = compute_loss(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss
"""


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(tensor.numel() * tensor.itemsize for state in optimizer.state.values() for tensor in state.values())


def check_plan(folder: Path, result: Scan, share: float) -> Any:
    """Recommend at ``share`` of the smallest engine peak; the plan's bytes are those of real training."""
    budget = int(min(ledger.peak_bytes for ledger in result.memory[1:]) * share)
    succeed(folder, "recommend", "--budget", str(budget))
    plan = load_plan(folder / "memadvise.yaml")
    target = load_target(str(folder / "model.py"))
    model, batches = target.model(), target.batches(2)
    optimizer = create_optimizer(model, plan, lr=1e-3)
    for batch in batches:
        target.step(model, batch, optimizer)
    assert plan.predicted_peak_bytes <= budget
    assert plan.predicted_state_bytes == state_bytes(optimizer)
    assert {rule.method for rule in plan.rules} > {"adamw"}
    return plan


@pytest.mark.parametrize("dtype", ["", ".bfloat16()", ".double()"])
def test_frozen_tied_and_unused_parameters_in_any_precision(dtype: str, tmp_path: Path) -> None:
    write(tmp_path, base=LANGUAGE_MODEL.format(dtype=dtype))
    result = scan(tmp_path)
    parameters = {p.name: p for p in result.parameters}
    assert parameters["tokens.weight"].role == "tied_embedding"
    assert parameters["tokens.weight"].aliases == ("head.weight",)
    assert not parameters["frozen.weight"].trainable
    assert result.probe is not None
    unknown = {p.name: p.unknown for p in result.probe.parameters}
    assert unknown.pop("unused.weight") == unknown.pop("unused.bias") == "never received a gradient"
    assert set(unknown.values()) == {None}
    assert "frozen.weight" not in unknown
    for run in result.probe.runs:
        assert run.problem is None
        assert run.last_loss is not None
    used = {"tokens.weight", "body.weight", "body.bias"}
    width = 8 if dtype == ".double()" else 4
    dense = sum(2 * width * p.numel + 4 for p in result.parameters if p.name in used)
    assert result.memory[1].state_bytes == dense  # memadvise's AdamW: float32 state for bfloat16 parameters
    assert result.memory[0].state_bytes == (dense if dtype != ".bfloat16()" else (dense + 4 * len(used)) // 2)
    plan = check_plan(tmp_path, result, 0.93)
    assert plan.predicted_state_bytes < dense


def test_a_train_step_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path, OWN_STEP)
    result = scan(tmp_path)
    assert {ledger.micro_batches for ledger in result.memory} == {1}, "how to split a batch is the step's own business"
    assert result.probe is not None
    assert len(result.probe.losses) == 10
    assert all(run.problem is None for run in result.probe.runs)
    check_plan(tmp_path, result, 0.9)


# ---------------------------------------------------------------- files and interruptions


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target and its scan."""
    folder = tmp_path_factory.mktemp("scanned")
    write(folder)
    scan(folder, "--no-probe")
    return folder


@pytest.mark.parametrize(
    ("budget", "exit_code", "says"),
    [
        ("12 gigs", 2, "'12 gigs' is not a size in bytes"),
        ("12GBB", 2, "'12GBB' is not a size in bytes"),
        ("-3GB", 2, "cannot be negative"),
        ("0", 2, "not a positive size"),
        ("", 2, "is not a size"),
        ("1kB", 1, "the smallest reachable peak is"),
    ],
)
def test_budgets(budget: str, exit_code: int, says: str, scanned: Path) -> None:
    run = memadvise(scanned, "recommend", "--budget", budget, "-o", "never.yaml")
    assert (run.returncode, run.stdout) == (exit_code, "")
    assert says in run.stderr
    assert "hint: " in run.stderr
    assert not (scanned / "never.yaml").exists()


def test_an_edited_plan_is_not_overwritten(scanned: Path) -> None:
    plan = scanned / "edited.yaml"
    arguments = ("recommend", "--budget", "1GB", "-o", plan.name)
    succeed(scanned, *arguments)
    succeed(scanned, *arguments)  # as memadvise wrote it: replaced without a question
    edited = plan.read_text().replace("method: adamw", "method: lion")
    plan.write_text(edited)
    refused = memadvise(scanned, *arguments)
    assert refused.returncode == 2
    assert "you may have edited it" in refused.stderr
    assert "--force" in refused.stderr
    assert plan.read_text() == edited
    succeed(scanned, *arguments, "--force")
    assert "method: adamw" in plan.read_text()


def test_other_peoples_files_are_not_overwritten(scanned: Path, tmp_path: Path) -> None:
    shutil.copy(scanned / "model.py", tmp_path)
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    for arguments in (("scan", "model.py", "--no-probe", "-o", "notes.json"), ("init", "model.py")):
        run = memadvise(tmp_path, *arguments)
        assert run.returncode == 2
        assert "--force" in run.stderr
    assert memadvise(tmp_path, "scan", "model.py", "-o", "model.py", "--force").returncode == 2
    device = memadvise(tmp_path, "scan", "model.py", "-o", "/dev/zero", "--force")
    assert device.returncode == 2
    assert "/dev/zero is not a regular file" in device.stderr
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'
    assert (tmp_path / "model.py").read_text() == (scanned / "model.py").read_text()


def test_a_scan_that_is_missing_cut_or_foreign(scanned: Path, tmp_path: Path) -> None:
    whole = (scanned / "memadvise.scan.json").read_text()
    for text, says in (
        (None, "cannot read the scan file"),
        (whole[: len(whole) // 2], "is not a whole JSON document"),
        ("[1, 2]", "is not a memadvise scan file"),
        (whole.replace('"schema_version": 2', '"schema_version": 99'), "schema version 99"),
    ):
        if text is not None:
            (tmp_path / "memadvise.scan.json").write_text(text)
        run = memadvise(tmp_path, "recommend", "--budget", "1GB")
        assert run.returncode == 2
        assert says in run.stderr
    assert not (tmp_path / "memadvise.yaml").exists()


def test_a_target_that_went_away_or_changed_since_the_scan(scanned: Path, tmp_path: Path) -> None:
    shutil.copy(scanned / "memadvise.scan.json", tmp_path)
    gone = memadvise(tmp_path, "recommend", "--budget", "1GB")
    assert gone.returncode == 2
    assert "there is no file model.py" in gone.stderr
    write(tmp_path, "# a remark")
    changed = succeed(tmp_path, "recommend", "--budget", "1GB")
    assert "model.py has changed since it was scanned" in changed.stderr
    write(tmp_path, "def build_model():\n    return nn.Linear(64, 64)")
    other = memadvise(tmp_path, "recommend", "--budget", "1GB", "--force")
    assert other.returncode == 2
    assert "made for another model" in other.stderr
    assert "scan" in other.stderr


def read_only_folder(tmp_path: Path) -> Path:
    """A folder nobody may write in; root may write anywhere but where the kernel says no."""
    if os.geteuid() != 0:
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o555)
        return folder
    if not Path("/proc/self").is_dir():
        pytest.skip("root may write everywhere on this system")
    return Path("/proc/self")


def test_a_read_only_folder_is_noticed_before_the_work(scanned: Path, tmp_path: Path) -> None:
    folder = read_only_folder(tmp_path)
    for arguments in (
        ("scan", "model.py", "-o", folder / "scan.json"),
        ("recommend", "--budget", "1GB", "-o", folder / "plan.yaml"),
        ("init", folder / "new.py"),
    ):
        run = memadvise(scanned, *arguments)
        assert run.returncode == 2
        assert f"cannot write in the folder {folder}" in run.stderr
        assert "tracing" not in run.stderr, "the work was not begun"
    missing = memadvise(scanned, "scan", "model.py", "-o", "no/such/scan.json")
    assert missing.returncode == 2
    assert "mkdir -p no/such" in missing.stderr


@pytest.mark.parametrize("phase", ["tracing one step: AdamW as it stands", "probing: AdamW"])
def test_ctrl_c_leaves_no_file(phase: str, tmp_path: Path) -> None:
    slow = "loss_as_before = compute_loss\ndef compute_loss(*args):\n    import time; time.sleep(0.2)\n"
    write(tmp_path, slow + "    return loss_as_before(*args)")
    (tmp_path / "memadvise.scan.json").write_text(before := '{"schema_version": 1, "fingerprint": "", "memory": []}')
    process = subprocess.Popen(
        [sys.executable, "-m", "memadvise", "scan", "model.py", "--device", "cpu"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that runs the tests in the background has told its children to ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line == f"{phase} ...\n":
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "interrupted; no file was left half written" in err
    assert "Traceback" not in err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["memadvise.scan.json", "model.py"]
    assert (tmp_path / "memadvise.scan.json").read_text() == before


# ---------------------------------------------------------------- mistakes in a plan, as a training script meets them

RULES = """\
version: 1
rules:
  - match: "0.weight"
    method: slimadam
    axes: [1]
  - match: "**"
    method: adamw
"""
MISTAKES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # name: (plan, place, what is said)
    "tab": (RULES.replace("    method: slimadam", "\tmethod: slimadam"), "4:1", ("a tab is used for indentation",)),
    "duplicate key": (
        RULES.replace("    axes: [1]", "    axes: [1]\n    axes: [0]"), "6:5", ("duplicate key 'axes'", "line 5"),
    ),
    "unknown method": (
        RULES.replace("slimadam", "slimadm"), "4:13", ("there is no method 'slimadm'", "did you mean 'slimadam'?"),
    ),
    "unknown option": (
        RULES.replace("axes:", "axis:"), "5:11", ("slimadam has no option 'axis'", "did you mean 'axes'?"),
    ),
    "option out of range": (RULES.replace("[1]", "[2]"), "5:11", ("0.weight", "axes")),
    "momentum out of range": (
        RULES.replace("method: adamw", "method: sgd\n    momentum: 1.5"), "8:15", ("momentum should be a number",),
    ),
    "word for a number": (
        RULES.replace("method: adamw", "method: sgd\n    momentum: high"), "8:15", ("momentum", "'high'"),
    ),
    "rule for nothing": (RULES.replace("0.weight", "0.wieght"), "3:12", ("matches no trainable", "0.weight")),
    "no rule": (
        RULES[: RULES.index('  - match: "**"')],
        "2:1", ("no rule matches 0.bias (and 1 more like *.bias)", "no rule matches 2.weight"),
    ),
    "unclosed bracket": (RULES.replace("[1]", "[1"), "6", ("not valid YAML",)),
    "unknown key": (RULES.replace("rules:", "rule:"), "2:1", ("unknown key 'rule'", "did you mean 'rules'?")),
    "another version": (RULES.replace("version: 1", "version: 2"), "1:10", ("this memadvise reads version 1",)),
    "another model": (
        RULES + 'model:\n  fingerprint: "sha256:0"\n  num_parameters: 5\n  shapes:\n    "0.weight": [16, 4]\n',
        "8:1", ("made for another model", "0.weight has shape [256, 64], the plan's model [16, 4]", "scan this model"),
    ),
    "empty": ("", "1:1", ("the plan is empty",)),
}  # fmt: skip


@pytest.fixture
def model(scanned: Path) -> torch.nn.Module:
    return load_target(str(scanned / "model.py")).model()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_plan_is_told_with_its_place(name: str, tmp_path: Path, model: torch.nn.Module) -> None:
    text, place, says = MISTAKES[name]
    path = tmp_path / "memadvise.yaml"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        create_optimizer(model, path, lr=1e-3)
    message = str(caught.value)
    assert re.search(rf"^{re.escape(str(path))}:{place}(:\d+)?: error: ", message, re.MULTILINE), message
    for words in says:
        assert words in message
    for problem in caught.value.problems:
        assert isinstance(problem, MemadviseError)
        assert problem.where is not None
        assert problem.where.column is not None, message
    if name != "empty":
        source, caret = message.splitlines()[1:3]
        assert source.strip() in text
        assert caret.strip() == "^"


def test_all_mistakes_are_told_at_once(tmp_path: Path, model: torch.nn.Module) -> None:
    path = tmp_path / "memadvise.yaml"
    path.write_text('version: 1\nrules:\n  - {match: "0.*", method: slimadm}\n  - {match: "2.wight", method: adamw}\n')
    with pytest.raises(PlanError) as caught:
        create_optimizer(model, path, lr=1e-3)
    assert [problem.message for problem in caught.value.problems] == [
        "no rule matches 2.weight",
        "no rule matches 2.bias",
        "there is no method 'slimadm'",
        "'2.wight' matches no trainable parameter",
    ]


@pytest.mark.parametrize("number", ["1e-1", "1E-1", "0.1", ".1", "1.0e-1"])
def test_numbers_as_people_write_them(number: str, tmp_path: Path, model: torch.nn.Module) -> None:
    path = tmp_path / "memadvise.yaml"
    path.write_text(f'version: 1\nrules:\n  - {{match: "**", method: sgd, momentum: {number}}}\n')
    optimizer = create_optimizer(model, path, lr=1e-3)
    assert {setting.options["momentum"] for setting in optimizer.settings().values()} == {0.1}


def test_a_training_script_shows_the_sentence_last(scanned: Path, tmp_path: Path) -> None:
    shutil.copy(scanned / "model.py", tmp_path)
    (tmp_path / "memadvise.yaml").write_text(MISTAKES["unknown method"][0])
    (tmp_path / "train.py").write_text(
        "from model import build_model\nfrom memadvise import create_optimizer\n"
        'optimizer = create_optimizer(build_model(), "memadvise.yaml", lr=1e-3)\n'
    )
    run = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 1
    last = run.stderr[run.stderr.index("PlanError: ") :].splitlines()
    assert last == [
        "PlanError: memadvise.yaml:4:13: error: there is no method 'slimadm'",
        "        method: slimadm",
        "                ^",
        "  hint: did you mean 'slimadam'?",
    ]
