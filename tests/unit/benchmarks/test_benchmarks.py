"""The benchmarks' own arithmetic, and that each of them runs; what needs a GPU runs against stand-ins here."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memadvise.memory.session import fake_session
from memadvise.optim.create import create_optimizer
from memadvise.optim.registry import list_methods
from memadvise.plan.schema import Setting, Switches
from memadvise.target import Target

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import convergence  # noqa: E402
import estimate_accuracy  # noqa: E402
import step_time  # noqa: E402
import trace_scale  # noqa: E402
from bench_support import cuda, output, workloads  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny() -> Target:
    return Target(
        build_model=lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)),
        build_batches=lambda: [torch.randn(4, 64)] * 2,
        compute_loss=lambda model, x: model(x).square().mean(),
        spec="tiny",
    )


# ---------------------------------------------------------------- output


def test_a_table_is_aligned() -> None:
    text = output.table(("name", "count", "share"), [["a", 1234567, "+0.50"], ["longer", 2, 0.125], ["b", "", "-1"]])
    assert text.splitlines() == [
        "name        count  share",
        "------  ---------  -----",
        "a       1,234,567  +0.50",
        "longer          2   0.12",
        "b                     -1",
    ]
    assert output.table(("a", "b"), []) == "a  b\n-  -"
    with pytest.raises(ValueError, match="2 cells"):
        output.table(("a", "b"), [["one"]])


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"index": 0, "name": "NVIDIA Test", "total_bytes": 80 * 2**30, "driver": "575.1", "cuda_driver": "12.9"}
    monkeypatch.setattr(output, "device_facts", lambda: [gpu])
    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick", "a b"])
    text = output.machine()
    assert "command:  python bench.py --quick 'a b'" in text
    assert f"torch {torch.__version__}" in text
    assert "gpu 0:    NVIDIA Test, 80.00 GiB, driver 575.1 (CUDA 12.9)" in text


# ---------------------------------------------------------------- workloads


def test_every_example_has_a_large_size_and_keeps_its_own() -> None:
    def sizes(workload: workloads.Workload) -> tuple[int, int]:
        """Values in the model and in a batch."""
        with fake_session(workload.make()) as (model, batches):
            return sum(p.numel() for p in model.parameters()), batches[0][0].numel()

    own, large = list(workloads.examples()), list(workloads.examples(large=True))
    assert {w.name for w in own} == set(workloads.LARGE)
    for small, big in zip(own, large, strict=True):
        before, enlarged, after = (sizes(w) for w in (small, big, small))
        assert enlarged[0] > 5 * before[0], small.name
        assert enlarged[1] >= before[1], small.name
        assert after == before, small.name


def test_a_constant_that_an_example_lacks_is_refused() -> None:
    with pytest.raises(KeyError, match=r"gpt_text.py has no WITH"):
        workloads._example(workloads.EXAMPLES / "gpt_text.py", {"WITH": 1})


def test_optimizers_are_what_they_are_called() -> None:
    target = tiny()
    names = dict.fromkeys(workloads.OPTIMIZERS["cpu"] + workloads.OPTIMIZERS["cuda"])
    made = {name: workloads.make_optimizer(name, target)(target.model()) for name in names}
    flags = {name: (o.defaults.get("foreach"), o.defaults.get("fused")) for name, o in made.items() if "Adam" in name}
    assert flags["AdamW for-loop"] == (False, None)
    assert flags["AdamW foreach"] == (True, None)
    assert flags["AdamW fused"] == (None, True)
    settings = {m.name: m.setting for m in made["memadvise slimadam"].memory()}
    assert settings["0.weight"] == "slimadam(axes=[1])"
    assert settings["0.bias"] == "adamw"
    assert {m.setting for m in made["memadvise adamw"].memory()} == {"adamw"}
    with pytest.raises(KeyError):
        workloads.make_optimizer("AdamW", target)


def test_switches_are_those_that_the_target_can_run() -> None:
    found = {w.name: workloads.switches(w.make()) for w in workloads.examples()}
    assert set(found["gpt_text"]) == {"none", "checkpoint", "2 micro-batches"}
    assert found["gpt_text"]["checkpoint"] == Switches(checkpoint=("blocks.*",))
    assert "2 micro-batches" not in found["cnn_digits"], "batch norm looks across samples"


# ---------------------------------------------------------------- measuring on CUDA, with counters that stand in


def test_the_third_step_is_measured_and_what_stays_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    counters: dict[str, Any] = {
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: seen.append("reset"),
        "max_memory_allocated": lambda: (seen.append("peak"), 1000)[1],
        "memory_allocated": lambda: (seen.append("left"), 300)[1],
        "memory_stats": lambda: {"requested_bytes.all.peak": 900},
    }
    for name, counter in counters.items():
        monkeypatch.setattr(torch.cuda, name, counter)

    def train_step(model: nn.Module, batch: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append("step")

    base = tiny()
    target = Target(build_model=base.build_model, build_batches=base.build_batches, train_step=train_step)
    peak = cuda.measure_cuda(target, device="cpu")
    assert seen == ["reset", "step"] * 3 + ["peak", "left"]
    assert peak == cuda.CudaPeak(allocated_bytes=1000, requested_bytes=900, fixed_bytes=300)
    assert peak.peak_bytes == 700


def test_measuring_keeps_the_random_state_and_takes_optimizer_and_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"requested_bytes.all.peak": 0})
    before = torch.get_rng_state()
    made: list[torch.optim.Optimizer] = []

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        made.append(create_optimizer(model, Setting("slimadam", {"axes": [1]}), lr=1e-3))
        return made[-1]

    cuda.measure_cuda(tiny(), optimizer=optimizer, switches=Switches(micro_batches=2), device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert {float(state["step"]) for state in made[0].state.values()} == {3.0}


# ---------------------------------------------------------------- estimate_accuracy


def test_rows_of_the_accuracy_table() -> None:
    workload = workloads.Workload("tiny", tiny)
    rows = list(estimate_accuracy.compare(workload, "cpu", quick=False))
    assert [(row[2], row[3]) for row, _ in rows] == [
        *((name, "none") for name in workloads.OPTIMIZERS["cpu"]),
        ("AdamW for-loop", "2 micro-batches"),
    ]
    for row, error in rows:
        assert len(row) == len(estimate_accuracy.COLUMNS)
        assert error is not None
        assert abs(error) < 0.1, row


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA: it is measured")
def test_without_cuda_nothing_is_claimed() -> None:
    rows = list(estimate_accuracy.compare(workloads.Workload("tiny", tiny), "cuda", quick=True))
    assert {(row[5], row[6], error) for row, error in rows} == {("not measured", "", None)}
    assert all(isinstance(row[4], float) and row[4] > 0 for row, _ in rows)
    assert estimate_accuracy.summary("cuda", []) == "cuda: not measured (torch sees no CUDA device)."
    assert "worst -3.000 %" in estimate_accuracy.summary("cuda", [1.0, -3.0, 2.0])


# ---------------------------------------------------------------- step_time


def small_shapes() -> nn.Module:
    return step_time.Shapes(width=48, blocks=1, vocabulary=64, positions=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_method_is_timed_beside_the_yardstick(dtype: torch.dtype) -> None:
    count = sum(p.numel() for p in small_shapes().parameters())
    results = {
        name: step_time.compare(make, small_shapes().to(dtype), rounds=1, device="cpu")
        for name, make in step_time.methods(dtype, 48).items()
    }
    assert all(r.seconds > 0 and r.yardstick > 0 for r in results.values())
    assert results["memadvise sgd momentum 0"].state_bytes == 0
    assert results["memadvise lion"].state_bytes == 4 * count
    assert 4 * count < results["memadvise slimadam axes [1] (row means)"].state_bytes < 4.5 * count
    assert results["torch AdamW foreach"].transient_bytes >= count * dtype.itemsize
    if dtype is torch.float32:
        assert results["memadvise adamw"].transient_bytes < 1024 < results["memadvise adamw chunked"].transient_bytes


def test_the_shapes_are_gpt2s() -> None:
    with torch.device("meta"):
        model = step_time.Shapes(blocks=12, vocabulary=50257)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


# ---------------------------------------------------------------- the scripts as they are started


def run(*command: str, **environment: str) -> str:
    """Stdout of a benchmark started as a person would, from another folder."""
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", ["estimate_accuracy", "step_time"])
def test_quick(script: str) -> None:
    text = run(sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", "--device", "cpu")
    assert f"torch {torch.__version__}" in text
    assert "memadvise slimadam" in text


@pytest.mark.slow
def test_a_scan_is_timed_in_its_own_process() -> None:
    sizes = {**workloads.LLAMA_7B, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    cost = trace_scale.scan(sizes)
    assert cost.scan.probe is None
    assert cost.scan.target_options == {"batch_size": 1, "seq_len": 2048, "dtype": "bfloat16"}
    assert 100 * 2**20 < cost.rss_bytes < 3 * 2**30
    assert cost.seconds > 0.5


def test_the_gpu_script_says_so_where_there_is_no_cuda(tmp_path: Path) -> None:
    shell = "#!/bin/sh\nexit 1\n"  # an interpreter without torch
    interpreter = tmp_path / "python"
    interpreter.write_text(shell)
    interpreter.chmod(0o755)
    text = run("bash", str(BENCHMARKS / "gpu_all.sh"), str(tmp_path / "results"), PYTHON=str(interpreter))
    assert text.startswith("not measured: ")
    assert not (tmp_path / "results").exists()


def test_gpu_tests_are_marked() -> None:
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    assert len(files) >= 4
    for file in files:
        body = ast.parse(file.read_text(encoding="utf-8")).body
        assert any(ast.unparse(node) == "pytestmark = pytest.mark.gpu" for node in body), file.name


# ---------------------------------------------------------------- convergence


def test_the_best_learning_rate_of_each_setting_is_compared_with_adamw() -> None:
    adamw, lion, sgd = Setting("adamw"), Setting("lion"), Setting("sgd")
    nan = float("nan")
    outcomes = [
        convergence.Outcome(convergence.Run(adamw, 1e-3, 5), 2.5, 8.0),
        convergence.Outcome(convergence.Run(adamw, 3e-3, 5), nan, nan),
        convergence.Outcome(convergence.Run(lion, 1e-4, 5), 2.9, 4.0),
        convergence.Outcome(convergence.Run(lion, 3e-4, 5), 2.6, 4.0),
        convergence.Outcome(convergence.Run(sgd, 0.1, 5), nan, nan),
    ]
    assert convergence.rows(outcomes) == [
        ["adamw", "1e-03<", "2.500", "+0.000", "8.00", "yes"],
        ["lion", "3e-04>", "2.600", "+0.100", "4.00", "yes"],
        ["sgd", "-", "diverged", "-", "-", "no"],
    ]
    inner = [*outcomes, convergence.Outcome(convergence.Run(adamw, 3e-4, 5), 2.7, 8.0)]
    assert convergence.rows(inner)[0][1] == "1e-03"


@pytest.mark.parametrize(
    ("method", "best", "tried"),
    [
        ("adamw", 1e-3, [3e-4, 1e-3, 3e-3]),
        ("adamw", 3e-3, [3e-4, 1e-3, 3e-3, 1e-2]),
        ("adamw", 1.0, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),  # to the end of what is tried, and no further
        ("adamw", 0.0, [3e-4, 1e-3, 3e-3, 1e-4, 3e-5, 1e-5]),
        ("lion", 1e-4, [3e-5, 1e-4, 3e-4]),
        ("sgd", 1e-2, [3e-2, 1e-1, 3e-1, 1e-2, 3e-3]),
    ],
)
def test_the_grid_goes_on_while_the_best_lies_on_its_edge(method: str, best: float, tried: list[float]) -> None:
    setting = Setting(method)
    outcomes: list[convergence.Outcome] = []
    while rates := convergence.wanted(setting, outcomes):
        for lr in rates:
            loss = abs(math.log(lr / best)) if best else lr
            outcomes.append(convergence.Outcome(convergence.Run(setting, lr, 5), loss, 0.0))
    assert [outcome.run.lr for outcome in outcomes] == tried


def test_finished_runs_are_kept_and_foreign_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache.json"
    calls: list[convergence.Run] = []

    def train(run: convergence.Run) -> convergence.Outcome:
        calls.append(run)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return convergence.Outcome(run, math.nan if run.lr > 2e-3 else 2.0 + run.lr, 8.0)

    monkeypatch.setattr(convergence, "train", train)

    def results() -> list[tuple[float, float]]:
        cache = convergence.Cache(path)
        return [(o.run.lr, o.loss) for o in convergence.results([Setting("adamw")], (1e-3, 3e-3), 5, 1, cache)]

    with pytest.raises(KeyboardInterrupt):
        results()
    assert len(json.loads(path.read_text())["runs"]) == 2
    found = results()
    assert [lr for lr, _ in found] == [1e-3, 3e-3, 3e-4, 1e-4, 3e-5]
    assert math.isnan(found[1][1])
    assert len(calls) == 6
    assert str(results()) == str(found)
    assert len(calls) == 6
    monkeypatch.setattr(convergence, "_made_by", lambda: "another torch")
    assert convergence.Cache(path).runs == {}


def test_only_settings_of_the_table_are_explained() -> None:
    assert set(convergence.WHY) <= {setting.key for setting in convergence.SETTINGS}


def test_the_convergence_table_covers_every_method() -> None:
    assert {setting.method for setting in convergence.SETTINGS} == set(list_methods())
