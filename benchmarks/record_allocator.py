"""Record what torch's CUDA caching allocator does in real training steps, and compare the simulation with it.

    python benchmarks/record_allocator.py [--write FOLDER] [--only PATTERN ...]

Each row is one fresh process on the GPU: three steps of an example, or a made-up mix of allocations, under one
setting of ``PYTORCH_CUDA_ALLOC_CONF``, recorded from the first allocation on. Reserved bytes are compared after every
allocation and every free. ``--write`` keeps the recordings as JSON: the tests check those in tests/data/allocator.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_support.output import Rows, machine
from bench_support.workloads import examples

from memadvise.ledger import to_json
from memadvise.memory.recorded import compare, load_recording, read_snapshot
from memadvise.memory.session import map_tensors
from memadvise.memory.tensors import default_optimizer
from memadvise.switches import train_step

SETTINGS = ("", "expandable_segments:True", "max_split_size_mb:32", "roundup_power2_divisions:8")
MIX = "mix of sizes"
STEPS = 3
COLUMNS = (
    "workload", "settings", "events", "reserved MiB", "simulated", "allocated MiB", "simulated ", "largest gap MiB",
)  # fmt: skip


def mix() -> None:
    """Two thousand allocations and frees of every size class, the same every time."""
    numbers = random.Random(0)
    held: list[torch.Tensor] = []
    for _ in range(2000):
        if held and numbers.random() < 0.48:
            held.pop(numbers.randrange(len(held)))
        else:
            size = int(2 ** numbers.uniform(4, 26))
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))


def steps(name: str) -> None:
    """Training steps of an example, everything moved to the GPU as a training script would."""
    target = next(workload for workload in examples() if workload.name == name).make()
    model = target.model().cuda()
    optimizer = default_optimizer(model)
    for batch in target.batches(STEPS):
        train_step(target, model, map_tensors(batch, lambda tensor: tensor.cuda()), optimizer)


def record(workload: str, path: Path) -> None:
    """Run ``workload`` in this process, which has not touched the GPU yet, and write its recording."""
    memory: Any = torch.cuda.memory
    memory._record_memory_history(max_entries=1_000_000, context=None)
    mix() if workload == MIX else steps(workload)
    torch.cuda.synchronize()
    recording = read_snapshot(
        memory._snapshot(),
        workload=workload,
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        settings=os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        peak_allocated_bytes=torch.cuda.max_memory_allocated(),
    )
    path.write_text(to_json(recording).replace("\n  ", " "), encoding="utf-8")  # numbers in rows, not in a column


def main() -> None:
    parser = argparse.ArgumentParser(description="The simulated caching allocator against the real one.")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="keep the recordings there")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="workloads whose name contains it")
    parser.add_argument("--child", nargs=2, metavar=("WORKLOAD", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        record(options.child[0], Path(options.child[1]))
        return
    print(machine(), end="\n\n")
    if not torch.cuda.is_available():
        print("not measured: torch sees no CUDA device")
        return
    names = [MIX, *(workload.name for workload in examples())]
    table = Rows(COLUMNS, (18, 27), number=12)
    table.start()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.write or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if options.only and not any(pattern in name for pattern in options.only):
                continue
            for number, settings in enumerate(SETTINGS):
                path = folder / f"{name.replace(' ', '_')}.{number}.json"
                environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_ALLOC_CONF"}
                environment["PYTORCH_CUDA_ALLOC_CONF"] = settings
                command = [sys.executable, __file__, "--child", name, str(path)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                label = settings or "default"
                if done.returncode:
                    table.note(name, f"{label}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
                    continue
                found = compare(load_recording(path))
                sizes = (
                    found.recorded_peak_bytes, found.simulated_peak_bytes, found.recorded_peak_allocated_bytes,
                    found.simulated_peak_allocated_bytes, found.largest_difference_bytes,
                )  # fmt: skip
                table.add([name, label, found.num_events, *(size / 2**20 for size in sizes)])


if __name__ == "__main__":
    main()
