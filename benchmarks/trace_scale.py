"""How long a scan without probe takes, and how much memory, as the model grows to 7 billion parameters.

    python benchmarks/trace_scale.py [--quick]

Each row is one fresh process: ``memadvise scan hf:CONFIG --no-probe --batch-size 1 --seq-len 2048 --dtype bfloat16``,
start of Python included; its peak resident memory is what the operating system counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench_support.output import MIB, machine, table
from bench_support.workloads import LLAMA_7B, write_llama_config

from memadvise.ledger import Scan, load_scan

BATCH_SIZE, SEQ_LEN, DTYPE = 1, 2048, "bfloat16"
COLUMNS = (
    "layers",
    "parameters",
    "weights MiB",
    "traces",
    "events",
    "seconds",
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


def scan(sizes: dict[str, int]) -> Cost:
    """Scan a Llama of these sizes in a process of its own.

    Raises:
        SystemExit: the scan failed; its messages are on stderr.
    """
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        config, result = write_llama_config(Path(folder), sizes), Path(folder) / "scan.json"
        options = ["--batch-size", str(BATCH_SIZE), "--seq-len", str(SEQ_LEN), "--dtype", DTYPE, "-o", str(result)]
        command = [sys.executable, "-m", "memadvise", "scan", f"hf:{config}", "--no-probe", "--quiet", *options]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})
        _, status, usage = os.wait4(process.pid, 0)  # the usage of this very process
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"the scan failed with exit code {process.returncode}: {' '.join(command)}")
        unit = 1 if sys.platform == "darwin" else 1024
        return Cost(load_scan(result), seconds, usage.ru_maxrss * unit)


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
    parser = argparse.ArgumentParser(description="Time and memory of a scan without probe.")
    parser.add_argument("--quick", action="store_true", help="two layers only")
    depths = (2,) if parser.parse_args().quick else (8, 32)
    print(machine())
    print(
        f"scan:     Llama, hidden 4096, vocabulary 32000, batch {BATCH_SIZE} x {SEQ_LEN}, {DTYPE}, --no-probe",
        end="\n\n",
    )
    print(table(COLUMNS, [row({**LLAMA_7B, "num_hidden_layers": depth}) for depth in depths]))


if __name__ == "__main__":
    main()
