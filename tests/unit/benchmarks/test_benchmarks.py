"""The benchmarks' own arithmetic, and that each of them runs; what needs a GPU runs against stand-ins here."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
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
import record_allocator  # noqa: E402
import record_cudnn  # noqa: E402
import scaling  # noqa: E402
import shadow_cost  # noqa: E402
import step_time  # noqa: E402
import trace_scale  # noqa: E402
from bench_support import cuda, output, peers, timing, workloads  # noqa: E402
from bench_support.rows import Gpt2, Row, moved_bytes, our_rows, torch_adamw, torch_rows  # noqa: E402


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


def test_rows_are_printed_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    rows = output.Rows(("name", "what", "count"), (6, 5), number=7)
    rows.start()
    rows.add(["a", "", 1234])
    assert capsys.readouterr().out.splitlines() == [
        "name    what     count",
        "------  -----  -------",
        "a                1,234",
    ]
    rows.add(["longer than that", "x", 0.5])
    rows.note("b", "not installed")
    assert capsys.readouterr().out.splitlines() == ["longer than that  x         0.50", "b       not installed"]
    with pytest.raises(ValueError, match="3 cells"):
        rows.add(["a", "b"])


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


def test_the_third_step_is_measured_and_what_stays_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
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
    rows = list(estimate_accuracy.compare(workload, "cpu", few=False))
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
    rows = list(estimate_accuracy.compare(workloads.Workload("tiny", tiny), "cuda", few=True))
    assert {(row[5], row[6], error) for row, error in rows} == {("not measured", "", None)}
    assert all(isinstance(row[4], float) and row[4] > 0 for row, _ in rows)
    assert estimate_accuracy.summary("cuda", []) == "cuda: not measured (torch sees no CUDA device)."
    said = estimate_accuracy.summary("cuda", [1.0, -3.0, 2.0])
    assert "2.000 % in the median, 3.000 % at the 95th percentile; lowest -3.000 %, highest +2.000 %" in said


def test_a_model_is_made_once_and_copied() -> None:
    made: list[nn.Module] = []

    def build_model() -> nn.Module:
        made.append(nn.Linear(2, 2))
        return made[-1]

    target = estimate_accuracy.built_once(Target(build_model=build_model, build_batches=lambda: [torch.ones(1, 2)]))
    first, second = target.model(), target.model()
    assert len(made) == 1
    assert torch.equal(first.weight, second.weight)
    with torch.no_grad():
        first.weight.zero_()
    assert second.weight.any()


# ---------------------------------------------------------------- step_time


def small() -> nn.Module:
    return Gpt2(width=48, blocks=1, vocabulary=64, positions=16)


def measured(row: Row, model: nn.Module | None = None) -> timing.Result:
    return timing.Yardstick(model or small(), "cpu").measure(row, rounds=1, threads=1, wall_clock=False)


def in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds for each row, and is the executor's business."""
    from memadvise.optim.executors import compiled

    monkeypatch.setattr(compiled, "wanted", lambda *_: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_method_is_timed_beside_the_yardstick(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    in_eager(monkeypatch)
    monkeypatch.setattr(timing, "cold_compiler", contextlib.nullcontext)
    yardstick, count = timing.Yardstick(small().to(dtype), "cpu"), sum(p.numel() for p in small().parameters())
    results = {}
    for row in [*torch_rows(), *our_rows(dtype, 48)]:
        if not row.name.endswith(("compiled", "every 4", "every 4, warm")):
            results[row.name] = yardstick.measure(row, rounds=1, threads=1, wall_clock=False)
    assert all(r.cpu.seconds > 0 and r.cpu.yardstick > 0 and r.first_seconds > 0 for r in results.values())
    assert all(r.wall is None for r in results.values())
    assert results["memadvise sgd momentum 0"].state_bytes == 0
    assert results["memadvise lion"].state_bytes == 4 * count
    assert 4 * count < results["memadvise slimadam axes [1] (row means) chunked"].state_bytes < 4.5 * count
    assert results["torch AdamW foreach"].allocator_bytes >= count * dtype.itemsize
    assert results["memadvise adamw chunked"].executors == "chunked"
    if dtype is torch.float32:
        dense, chunked = results["memadvise adamw"], results["memadvise adamw chunked"]
        assert dense.executors == "fused"
        assert dense.scratch_bytes == 0
        assert dense.allocator_bytes < 1024 < chunked.allocator_bytes


def test_the_shapes_are_gpt2s() -> None:
    with torch.device("meta"):
        model = Gpt2()
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("memadvise adamw", 28),
        ("memadvise slimadam axes [1] (row means) chunked", 20),
        ("memadvise slimadam axes [0] (column means) chunked", 24),
        ("memadvise adafactor", 16),
        ("memadvise came", 28),
        ("memadvise adamw cautious", 36),
        ("memadvise adamw int8", 16),
        ("memadvise lion", 20),
        ("memadvise sgd momentum 0", 12),
    ],
)
def test_bytes_that_must_move(name: str, share: int) -> None:
    """The table of research: bytes for each parameter, of matrices."""
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
    optimizer = next(row for row in our_rows(torch.float32) if row.name == name).make(model)
    moved = moved_bytes(optimizer)
    assert moved is not None
    assert moved / (2 * 512 * 512) == pytest.approx(share, rel=0.02)


def test_bytes_that_must_move_of_others() -> None:
    model = timing.with_gradients(nn.Linear(64, 64, bias=False))
    optimizer = torch_adamw(model, fused=True)
    optimizer.step()
    assert moved_bytes(optimizer) == 28 * 64 * 64 + 2 * 4  # and the step
    assert moved_bytes(torch.optim.Adafactor(model.parameters())) is None


def test_low_rank_methods_step_the_matrices_of_blocks() -> None:
    for row in our_rows(torch.float32, 48):
        if row.name.split()[1] in ("apollo", "apollo_mini", "galore"):
            projected = {m.name for m in row.make(small()).memory() if not m.setting.startswith("adamw")}
            names = ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")
            assert projected == {f"blocks.0.{name}.weight" for name in names}, row.name


def test_a_step_that_does_nothing_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="changes nothing"):
        measured(Row("idle", lambda model: torch.optim.SGD(model.parameters(), lr=0.0)))


def test_state_that_hides_in_objects_and_views_counts() -> None:
    class Projector:
        def __init__(self) -> None:
            self.matrix = torch.zeros(8, 8)[:2]  # a view keeps all of it

    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p])
    optimizer.state[p] = {"exp_avg": torch.zeros(4), "projector": Projector(), "inner": {"more": [torch.zeros(2)]}}
    assert timing.held_bytes(optimizer) == 16 + 256 + 8


def test_gradients_that_a_peer_drops_are_there_again() -> None:
    class Dropping(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            assert all(p.grad is not None for group in self.param_groups for p in group["params"])
            super().step()
            self.zero_grad()

    assert measured(Row("dropping", lambda model: Dropping(model.parameters(), lr=1.0))).cpu.seconds > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's high-water mark is Linux's")
def test_the_kernel_sees_memory_that_is_freed_within_the_step() -> None:
    def step() -> None:
        torch.ones(64 * 2**20, dtype=torch.uint8)

    assert timing.kernel_bytes(step) == pytest.approx(64 * 2**20, rel=0.1)
    assert timing.allocator_bytes(step, "cpu") == 64 * 2**20


def test_without_proc_the_step_is_still_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "_CLEAR_REFS", tmp_path / "no" / "clear_refs")
    calls: list[int] = []
    assert timing.kernel_bytes(lambda: calls.append(1)) is None
    assert calls == [1]


def test_targets_are_compared_with_two_decimals() -> None:
    result = measured(Row("sgd", lambda model: torch.optim.SGD(model.parameters(), lr=1.0)))
    close, above = (dataclasses.replace(result, cpu=timing.Pair(ratio, 1.0)) for ratio in (1.304, 1.306))
    assert (step_time.reached(close, 1.3), step_time.reached(above, 1.3)) == ("yes", "no")
    assert step_time.reached(close, None) == ""
    row = Row("sgd", lambda model: torch.optim.SGD(model.parameters()), 1.3)
    assert len(step_time.cells(row, close, 10, None)) == len(step_time.CPU_COLUMNS)
    assert len(step_time.cells(row, close, 10, 1e12)) == len(step_time.CUDA_COLUMNS)


def test_rows_are_chosen_by_part_or_pattern() -> None:
    rows = [*torch_rows(), *our_rows(torch.float32)]
    assert [row.name for row in step_time.chosen(rows, ["*came"])] == ["memadvise came"]
    assert {row.name for row in step_time.chosen(rows, ["CAME"])} == {"memadvise came", "memadvise came chunked"}
    assert list(step_time.chosen(rows, [])) == rows
    assert len({row.name for row in rows}) == len(rows)


def test_peers_that_are_missing_or_broken_are_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "broken_peer.py").write_text("raise ValueError('needs a GPU')")
    monkeypatch.syspath_prepend(str(tmp_path))
    good = peers.Package("torch", "torch.optim", {"SGD": peers._plain("SGD")})
    broken = peers.Package("broken", "broken_peer", {"Adam": peers._plain("Adam")})
    missing = peers.Package("missing-peer", "missing_peer.optim", {"Adam": peers._plain("Adam")})
    monkeypatch.setattr(peers, "PACKAGES", (good, broken, missing))
    monkeypatch.setattr(step_time, "torch_rows", list)
    monkeypatch.setattr(step_time, "our_rows", lambda dtype: [])
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--quick", "--device", "cpu", "--no-wall"])
    monkeypatch.setattr(step_time, "Gpt2", lambda **_: small())
    step_time.main()
    text = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "1.0" not in lines["broken Adam"]
    assert lines["broken Adam"].endswith("ValueError: needs a GPU")
    assert lines["missing-peer"].endswith("not installed")
    assert lines["torch SGD"].split()[2].replace(".", "").isdigit()
    assert peers.reason(ValueError("x" * 200)).endswith("...")


# ---------------------------------------------------------------- scaling and shadow_cost


def test_sizes_of_the_scaling_table() -> None:
    counts = [sum(torch.Size(shape).numel() for shape in scaling.blocks(*size)) for size in scaling.SIZES]
    assert counts == [pytest.approx(size, rel=0.03) for size in (1e7, 1e8, 1e9)]
    assert [count * side * side for count, side in scaling.CUTS] == [pytest.approx(1.04e7, rel=0.02)] * 4
    shapes = scaling.blocks(*scaling.SIZES[0])
    assert scaling.needed_bytes(Setting("adamw"), shapes) == pytest.approx(8 * counts[0], rel=0.01)


def test_what_does_not_fit_or_takes_too_long_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, shapes = output.Rows(scaling.COLUMNS, (24,)), [(1024, 1024)]
    monkeypatch.setattr(scaling, "available_bytes", lambda device: scaling.SPARE_BYTES + 2**23 + 2**20)
    scaling.rows(shapes, "cpu", ["fused"], table, {})
    assert "not measured: 0.0 GiB of memory are missing" in capsys.readouterr().out
    monkeypatch.setattr(scaling, "available_bytes", lambda device: None)
    scaling.rows(shapes, "cpu", ["fused"], table, {scaling.TORCH: 1e9})
    assert "not measured: a step would take" in capsys.readouterr().out
    found: dict[str, float] = {}
    scaling.rows(shapes, "cpu", ["fused"], table, found)
    assert found[scaling.TORCH] > 0


def test_shadows_are_timed_beside_the_tensors_own_step() -> None:
    for case in shadow_cost.CASES:
        short = dataclasses.replace(case, shape=(96, 48))
        row, cost = shadow_cost.measure(short, 32, "cpu", 1)
        assert cost.ratio > 0
        assert len(row) == len(shadow_cost.COLUMNS)
        assert all(isinstance(value, float | int) and value >= 0 for value in row[4:]), row
    query = next(case for case in shadow_cost.CASES if case.heads)
    assert "adam_mini" in {setting.method for setting in shadow_cost.candidates(query)}


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
@pytest.mark.parametrize(
    ("command", "seen"),
    [
        ("estimate_accuracy --device cpu", "memadvise slimadam"),
        ("step_time --device cpu --no-wall --only fused lion", "memadvise lion"),
        ("scaling --device cpu --only fused", "torch AdamW fused"),
        ("shadow_cost --device cpu", "attention_output"),
        ("advice_quality --jobs 1", "the recommended plan held against the best uniform method everywhere"),
    ],
)
def test_quick(command: str, seen: str) -> None:
    script, *options = command.split()
    text = run(sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", *options)
    assert f"torch {torch.__version__}" in text
    assert seen in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA: it is measured")
@pytest.mark.parametrize("script", [step_time, scaling, shadow_cost], ids=lambda module: module.__name__)
def test_on_cuda_only_what_is_there_is_claimed(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--device", "cuda"])
    script.main()
    assert capsys.readouterr().out == "not measured: torch sees no CUDA device\n"


@pytest.mark.slow
def test_a_scan_is_timed_in_its_own_process() -> None:
    sizes = {**workloads.LLAMA_7B, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    cost = trace_scale.scan(sizes)
    assert cost.scan.probe is None
    assert cost.scan.target_options == {"batch_size": 1, "seq_len": 2048, "dtype": "bfloat16"}
    assert 100 * 2**20 < cost.rss_bytes < 3 * 2**30
    assert cost.seconds > 0.5


@pytest.mark.slow
def test_traces_are_timed_whole_and_derived() -> None:
    sizes = {**workloads.LLAMA_70B, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    whole = trace_scale.trace(sizes, checkpoint=True, extrapolate=False)
    derived = trace_scale.trace(sizes, checkpoint=True, extrapolate=True)
    for same in ("events", "parameters", "peak", "reserved"):
        assert whole[same] == derived[same]
    assert whole["cpu"] > whole["imports"] > whole["trace"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can record")
def test_recordings_of_the_allocator_say_so_where_there_is_no_cuda(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["record_allocator.py"])
    record_allocator.main()
    assert "not measured: torch sees no CUDA device" in capsys.readouterr().out


def test_cudnn_is_not_measured_without_a_gpu_and_a_recording_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["record_cudnn.py"])
    record_cudnn.main()
    assert "not measured: torch sees no CUDA device" in capsys.readouterr().out
    stored = ROOT / "tests/data/cudnn/h200.json"
    monkeypatch.setattr(
        sys, "argv", ["record_cudnn.py", "--again", str(stored), "--write", str(tmp_path / "again.json")]
    )
    record_cudnn.main()
    assert "LSTM: reserve" in capsys.readouterr().out
    assert (tmp_path / "again.json").read_text() == stored.read_text()


def test_the_cases_of_cudnn_are_those_of_the_recording() -> None:
    recorded = json.loads((ROOT / "tests/data/cudnn/h200.json").read_text())
    made = [json.loads(json.dumps(case)) for case in record_cudnn.recurrent()]
    assert made == [case[:6] for case in recorded["recurrent"]]
    wanted = {json.dumps(case) for case in record_cudnn.convolutions()}
    assert {json.dumps(case[:3]) for case in recorded["convolutions"]} <= wanted


def test_a_recording_of_the_allocator_is_read_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memadvise.memory.recorded import load_recording

    entries = [
        {"action": action, "addr": 64, "size": size, "stream": 0}
        for action, size in (("segment_alloc", 2**21), ("alloc", 9), ("free_completed", 9), ("alloc", 8))
    ]
    snapshot = {"device_traces": [entries], "segments": [{"total_size": 2**21}]}
    started: list[dict[str, object]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: started.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: snapshot)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 512)
    monkeypatch.setattr(record_allocator, "mix", lambda: None)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    record_allocator.record(record_allocator.MIX, tmp_path / "mix.json")
    recording = load_recording(tmp_path / "mix.json")
    assert (recording.events, recording.reserved, recording.device) == ((0, ~0, 1), ((0, 2**21),), "NVIDIA Test")
    assert len(started) == 1
    assert (tmp_path / "mix.json").read_text().count("\n") < 20


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


def test_a_table_of_a_gpu_is_read_again() -> None:
    table = (BENCHMARKS / "results" / "estimate_accuracy_gpu.txt").read_text()
    device, rows = estimate_accuracy.measured_before(table)
    assert (device.arch, device.torch) == ("sm_90", "2.11.0")
    assert ("family llama (large)", "memadvise slimadam", "none", 158.15) in rows
    assert len(rows) == len(set(rows)) == 58
