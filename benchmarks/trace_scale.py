"""How long the trace of a step takes, and how much memory, as a Llama grows to 7 and to 70 billion parameters.

    python benchmarks/trace_scale.py [--quick]

Each row is one fresh process that traces two steps and makes the ledger (AdamW; batch 1 x 2048, bfloat16; the
70-billion shape with checkpointing), start of Python and imports included; its peak resident memory is what the
operating system counted. Linear growth shows as one figure down the column of microseconds per event. "derived" rows
trace 2, 3 and 4 of the blocks (``--extrapolate-depth``). Seconds are CPU seconds of the process, so that what else
runs hardly matters. A last table times whole scans, ``memadvise scan hf:CONFIG --no-probe``, with all their what-ifs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_support.output import MIB, Rows, machine, table
from bench_support.workloads import LLAMA_7B, LLAMA_70B, write_llama_config

from memadvise.ledger import Scan, load_scan

BATCH_SIZE, SEQ_LEN, DTYPE = 1, 2048, "bfloat16"
OPTIONS = {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "dtype": DTYPE}
TRACE_COLUMNS = (
    "model", "layers", "parameters", "events", "CPU s", "imports", "trace", "ledger", "us/event", "peak RSS MiB",
    "peak MiB", "reserved MiB",
)  # fmt: skip
COLUMNS = (
    "layers",
    "parameters",
    "weights MiB",
    "traces",
    "events",
    "CPU seconds",
    "peak RSS MiB",
    "AdamW peak MiB",
    "least MiB",
)


@dataclass(frozen=True)
class Cost:
    """What one scan took."""

    scan: Scan
    seconds: float
    rss_bytes: int


def trace(sizes: dict[str, int], *, checkpoint: bool, extrapolate: bool) -> dict[str, float]:
    """Trace two steps of a Llama of these sizes in its own process; what it printed, CPU seconds, memory."""
    with tempfile.TemporaryDirectory() as folder:
        config = write_llama_config(Path(folder), sizes)
        options = [*(["--checkpoint"] if checkpoint else []), *(["--extrapolate"] if extrapolate else [])]
        command = [sys.executable, __file__, "--child", str(config), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
        assert process.stdout is not None
        printed = process.stdout.read()
        process.stdout.close()
        usage = _usage(process, command)
        return {**json.loads(printed), "cpu": usage.ru_utime + usage.ru_stime, "rss": _rss_bytes(usage)}


def trace_here(config: str, *, checkpoint: bool, extrapolate: bool) -> dict[str, float]:
    """Trace two steps in this process; CPU seconds since it began, of trace and ledger, and what was found."""
    import transformers.models.llama.modeling_llama  # noqa: F401  # not part of the trace's time

    from memadvise.memory.depth import trace_by_depth
    from memadvise.memory.replay import build_ledger
    from memadvise.memory.trace import trace_step
    from memadvise.plan.schema import Switches
    from memadvise.target import load_target

    target = load_target(f"hf:{config}", options=OPTIONS)
    switches = Switches(checkpoint=("model.layers.*",) if checkpoint else ())
    started = time.process_time()
    traced = partial(trace_step, switches=switches)
    found = trace_by_depth(target, traced) if extrapolate else traced(target)
    ended = time.process_time()
    ledger = build_ledger(found, source="estimate", optimizer=found.optimizer, switches=switches)
    return {
        "imports": started,
        "trace": ended - started,
        "ledger": time.process_time() - ended,
        "events": len(found.events),
        "parameters": sum(s.num_bytes for s in found.storages if s.kind == "weights") // 2,
        "peak": ledger.peak_bytes,
        "reserved": ledger.reserved[0].peak_reserved_bytes,
    }


def trace_row(name: str, sizes: dict[str, int], *, checkpoint: bool = False, extrapolate: bool = False) -> list[object]:
    """One row of the table of traces."""
    cost = trace(sizes, checkpoint=checkpoint, extrapolate=extrapolate)
    return [
        f"{name}, derived" if extrapolate else name, sizes["num_hidden_layers"], int(cost["parameters"]),
        int(cost["events"]), cost["cpu"], cost["imports"], cost["trace"], cost["ledger"],
        1e6 * cost["trace"] / cost["events"], int(cost["rss"]) // MIB, int(cost["peak"]) // MIB,
        int(cost["reserved"]) // MIB,
    ]  # fmt: skip


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def _usage(process: subprocess.Popen[Any], command: list[str]) -> Any:
    """Wait for a process; what it used.

    Raises:
        SystemExit: it failed; its messages are on stderr.
    """
    _, status, usage = os.wait4(process.pid, 0)  # the usage of this very process
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    return usage


def _rss_bytes(usage: Any) -> int:
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def scan(sizes: dict[str, int]) -> Cost:
    """Scan a Llama of these sizes in a process of its own.

    Raises:
        SystemExit: the scan failed; its messages are on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        config, result = write_llama_config(Path(folder), sizes), Path(folder) / "scan.json"
        options = ["--batch-size", str(BATCH_SIZE), "--seq-len", str(SEQ_LEN), "--dtype", DTYPE, "-o", str(result)]
        command = [sys.executable, "-m", "memadvise", "scan", f"hf:{config}", "--no-probe", "--quiet", *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=_environment())
        usage = _usage(process, command)
        return Cost(load_scan(result), usage.ru_utime + usage.ru_stime, _rss_bytes(usage))


def row(sizes: dict[str, int]) -> list[object]:
    """One row of the table."""
    cost = scan(sizes)
    parameters = cost.scan.parameters
    peaks = [ledger.peak_bytes for ledger in cost.scan.memory]
    return [
        sizes["num_hidden_layers"],
        sum(p.numel for p in parameters),
        sum(p.num_bytes for p in parameters) // MIB,
        len(peaks),
        sum(ledger.num_events for ledger in cost.scan.memory),
        round(cost.seconds, 1),
        cost.rss_bytes // MIB,
        peaks[0] // MIB,
        min(peaks) // MIB,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of traces, and of a scan without probe.")
    parser.add_argument("--quick", action="store_true", help="few layers only")
    parser.add_argument("--child", metavar="CONFIG", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--extrapolate", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        found = trace_here(options.child, checkpoint=options.checkpoint, extrapolate=options.extrapolate)
        print(json.dumps(found))
        return
    print(machine())
    print(f"trace:    two steps, batch {BATCH_SIZE} x {SEQ_LEN}, {DTYPE}, torch.optim.AdamW; CPU seconds", end="\n\n")
    table_of_traces = Rows(TRACE_COLUMNS, (12,), number=9)
    table_of_traces.start()
    for depth in (2,) if options.quick else (8, 16, 32):
        table_of_traces.add(trace_row("7B", {**LLAMA_7B, "num_hidden_layers": depth}))
    for depth in (6,) if options.quick else (20, 40, 80):
        table_of_traces.add(trace_row("70B", {**LLAMA_70B, "num_hidden_layers": depth}, checkpoint=True))
    for depth in (6,) if options.quick else (80,):
        sizes = {**LLAMA_70B, "num_hidden_layers": depth}
        table_of_traces.add(trace_row("70B", sizes, checkpoint=True, extrapolate=True))
    print(
        f"\nscan:     Llama, hidden 4096, batch {BATCH_SIZE} x {SEQ_LEN}, {DTYPE}, --no-probe; CPU seconds", end="\n\n"
    )
    depths = (2,) if options.quick else (8, 32)
    print(table(COLUMNS, [row({**LLAMA_7B, "num_hidden_layers": depth}) for depth in depths]))


if __name__ == "__main__":
    main()
