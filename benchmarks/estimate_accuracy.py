"""The estimated peak of a training step beside the measured one.

    python benchmarks/estimate_accuracy.py [--quick]

On the CPU the measurement is that of torch's allocator events (memadvise.memory.measure). On CUDA it is
torch.cuda.max_memory_allocated() of the third step, without what stays allocated when the model is gone (workspaces of
cuBLAS): there the examples run enlarged too, so that a step takes hundreds of MiB.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_support.cuda import measure_cuda
from bench_support.output import MIB, machine, table
from bench_support.workloads import Workload, examples, llama_bf16, optimizers, switches

from memadvise.memory.estimate import estimate
from memadvise.memory.measure import measure_cpu
from memadvise.memory.trace import MakeOptimizer
from memadvise.plan.schema import Switches
from memadvise.target import Target

COLUMNS = (
    "device",
    "workload",
    "optimizer",
    "switches",
    "estimate MiB",
    "measured MiB",
    "error %",
    "est. s",
    "meas. s",
)
Case = tuple[str, MakeOptimizer, str, Switches]


def cases(target: Target, device: str, *, quick: bool) -> Iterator[Case]:
    """Every optimizer without switches, then every switch with the first optimizer."""
    makers = optimizers(target, device=device)
    first = next(iter(makers))
    changes = switches(target)
    pairs = [(name, "none") for name in makers] + [(first, name) for name in changes if name != "none"]
    if quick:
        pairs = [(first, "none"), ("memadvise slimadam", "none"), *pairs[-1:]]
    for name, change in pairs:
        yield name, makers[name], change, changes[change]


def compare(workload: Workload, device: str, *, quick: bool) -> Iterator[tuple[list[object], float | None]]:
    """One row of the table for each case, and its error in per cent if it was measured."""
    target = workload.make()
    for optimizer, make, name, change in cases(target, device, quick=quick):
        start = time.perf_counter()
        predicted = estimate(target, device=device, optimizer=make, switches=change).peak_bytes
        estimated = time.perf_counter()
        row: list[object] = [device, workload.name, optimizer, name, predicted / MIB]
        if device == "cuda" and not torch.cuda.is_available():
            yield [*row, "not measured", "", estimated - start, ""], None
            continue
        measured = (
            measure_cuda(target, optimizer=make, switches=change).peak_bytes
            if device == "cuda"
            else measure_cpu(target, optimizer=make, switches=change).peak_bytes
        )
        error = 100 * (predicted / measured - 1)
        took = time.perf_counter() - estimated
        yield [*row, measured / MIB, f"{error:+.2f}", estimated - start, took], error
        gc.collect()


def summary(device: str, errors: list[float]) -> str:
    """One sentence."""
    if not errors:
        return f"{device}: not measured (torch sees no CUDA device)."
    worst = max(errors, key=abs)
    middle = statistics.median(map(abs, errors))
    return f"{device}: {len(errors)} steps measured, median |error| {middle:.3f} %, worst {worst:+.3f} %."


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimated against measured peaks of training steps.")
    parser.add_argument("--quick", action="store_true", help="three cases of two workloads")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(machine(), end="\n\n")
    rows: list[list[object]] = []
    sentences = []
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        own = [*examples(), llama_bf16(Path(small))]
        enlarged = [*examples(large=True), llama_bf16(Path(large), large=True)] if torch.cuda.is_available() else []
        for device in ("cpu", "cuda"):
            workloads = own + (enlarged if device == "cuda" else [])
            found = itertools.chain.from_iterable(
                compare(w, device, quick=quick) for w in (workloads[-2:] if quick else workloads)
            )
            errors = []
            for row, error in found:
                rows.append(row)
                errors += [error] if error is not None else []
            sentences.append(summary(device, errors))
    print(table(COLUMNS, rows), *sentences, sep="\n")


if __name__ == "__main__":
    main()
