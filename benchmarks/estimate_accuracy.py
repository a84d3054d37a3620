"""The estimated peak of a training step beside the measured one.

    python benchmarks/estimate_accuracy.py [--quick] [--few] [--device cpu|cuda] [--only PATTERN ...]
    python benchmarks/estimate_accuracy.py --again benchmarks/results/estimate_accuracy_gpu.txt

On the CPU the measurement is that of torch's allocator events (memadvise.memory.measure). On CUDA it is
torch.cuda.max_memory_allocated() of the third step, and the estimate that of the simulated allocator; the workloads
run enlarged, so that a step takes hundreds of MiB. Rows are printed as they come. A second table lays the
estimates of others beside ours for plain AdamW: torch's MemTracker, torchinfo and accelerate, which are left out where
they are not installed (pip install torchinfo accelerate).

``--again`` needs no GPU: what a table of this command measured on one, beside what is estimated for that GPU and torch
now.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_support.cuda import measure_cuda
from bench_support.estimators import PEERS, peer_estimate
from bench_support.output import MIB, Rows, machine
from bench_support.workloads import OPTIMIZERS, Workload, examples, families, llama_bf16, make_optimizer, switches

from memadvise.memory.architecture import ARCHITECTURES, DeviceModel, device_model, local_device
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
PEER_COLUMNS = ("device", "workload", "measured MiB", "memadvise", *PEERS)
Case = tuple[str, MakeOptimizer, str, Switches]


def cases(target: Target, device: str, *, few: bool) -> Iterator[Case]:
    """Every optimizer without switches, then every switch with the first optimizer; three of them if ``few``."""
    names, changes = OPTIMIZERS[device], switches(target)
    pairs = [(name, "none") for name in names] + [(names[0], change) for change in changes if change != "none"]
    if few:
        pairs = list(dict.fromkeys([(names[0], "none"), (names[-1], "none"), pairs[-1]]))
    for name, change in pairs:
        yield name, make_optimizer(name, target), change, changes[change]


def compare(workload: Workload, device: str, *, few: bool) -> Iterator[tuple[list[object], float | None]]:
    """One row of the table for each case, and its error in per cent if it was measured."""
    target = workload.make()
    built = built_once(target)
    for optimizer, make, name, change in cases(target, device, few=few):
        start = time.perf_counter()
        assumed = local_device() if device == "cuda" and torch.cuda.is_available() else device
        predicted = estimate(target, device=assumed, optimizer=make, switches=change).allocated_bytes
        estimated = time.perf_counter()
        row: list[object] = [device, workload.name, optimizer, name, predicted / MIB]
        if device == "cuda" and not torch.cuda.is_available():
            yield [*row, "not measured", "", estimated - start, ""], None
            continue
        measured = (
            measure_cuda(built, optimizer=make, switches=change).allocated_bytes
            if device == "cuda"
            else measure_cpu(built, optimizer=make, switches=change).peak_bytes
        )
        error = 100 * (predicted / measured - 1)
        took = time.perf_counter() - estimated
        yield [*row, measured / MIB, f"{error:+.2f}", estimated - start, took], error
        gc.collect()


def beside_peers(workload: Workload, device: str, measured: float, assumed: DeviceModel | None = None) -> list[object]:
    """Ours and everybody else's error for plain AdamW, in per cent of what was measured (MiB). ``assumed``: the device
    that it was measured on; default the one at hand.
    """
    row: list[object] = [device, workload.name, measured]
    mine = estimate(workload.make(), device=assumed or (local_device() if device == "cuda" else device))
    for found in (mine.allocated_bytes, *(peer_estimate(name, workload.make()) for name in PEERS)):
        row.append(found if isinstance(found, str) else f"{100 * (found / MIB / measured - 1):+.1f} %")
    return row


def print_peers(cases: Iterable[tuple[Any, ...]]) -> None:
    """The second table; ``cases`` are arguments of :func:`beside_peers`."""
    print("\nerrors of the estimated peak, torch.optim.AdamW without switches")
    table = Rows(PEER_COLUMNS, (6, 22, 12, 9, 12, 12, 12))
    table.start()
    for case in cases:
        table.add(beside_peers(*case))


def measured_before(table: str) -> tuple[DeviceModel, list[tuple[str, str, str, float]]]:
    """Of a printed table: the GPU and torch, and (workload, optimizer, switches, measured MiB) of each row."""
    (version,) = set(re.findall(r"^versions:.* torch (\d+\.\d+\.\d+)", table, re.MULTILINE))
    (name,) = set(re.findall(r"^gpu 0:\s+(.*?),", table, re.MULTILINE))
    (arch,) = [a.name for a in ARCHITECTURES.values() if any(card in name for card in a.cards.split(", "))]
    rows = [re.split(r"\s{2,}", line) for line in table.splitlines() if line.startswith("cuda ")]
    measured = [(row[1], row[2], row[3], float(row[5].replace(",", ""))) for row in rows if len(row) == len(COLUMNS)]
    return device_model("cuda", arch=arch, torch=version), list(dict.fromkeys(measured))


def again(path: Path, folder: Path) -> None:
    """Print the tables of ``path``, as one, with today's estimates."""
    device, before = measured_before(path.read_text())
    print(f"measured: {path}\nestimate: {device.arch}, torch {device.torch}\n")
    table = Rows(COLUMNS, (6, 22, 18, 15))
    table.start()
    workloads = {w.name: w for w in (*families(large=True), *examples(large=True), llama_bf16(folder, large=True))}
    errors = []
    for name, optimizer, change, measured in before:
        target, start = workloads[name].make(), time.perf_counter()
        make, changes = make_optimizer(optimizer, target), switches(target)[change]
        predicted = estimate(target, device=device, optimizer=make, switches=changes).allocated_bytes / MIB
        errors.append(100 * (predicted / measured - 1))
        took = time.perf_counter() - start
        table.add(["cuda", name, optimizer, change, predicted, measured, f"{errors[-1]:+.2f}", took, ""])
    print(summary("cuda", errors))
    plain = [(workloads[name], measured) for name, *case, measured in before if case == ["AdamW foreach", "none"]]
    print_peers((workload, "cuda", measured, device) for workload, measured in plain)


def built_once(target: Target) -> Target:
    """``target`` with a model that is made once and copied: random weights take longer than the steps do."""
    made = target.build_model()  # now: what is made while it is measured is counted
    return dataclasses.replace(target, build_model=lambda: copy.deepcopy(made))


def summary(device: str, errors: list[float]) -> str:
    """One sentence."""
    if not errors:
        return f"{device}: not measured (torch sees no CUDA device)."
    middle = statistics.median(map(abs, errors))
    sizes = sorted(map(abs, errors))
    late = sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))]
    return (
        f"{device}: {len(errors)} steps measured, |error| {middle:.3f} % in the median, {late:.3f} % at the 95th "
        f"percentile; lowest {min(errors):+.3f} %, highest {max(errors):+.3f} %."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimated against measured peaks of training steps.")
    parser.add_argument("--quick", action="store_true", help="three cases of two workloads")
    parser.add_argument("--few", action="store_true", help="three cases of every workload")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PATTERN", help="workloads whose name contains it")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: both")
    parser.add_argument("--again", type=Path, metavar="TABLE", help="estimate anew what that table measured on a GPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), end="\n\n")
    if options.again:
        with tempfile.TemporaryDirectory() as folder:
            again(options.again, Path(folder))
        return
    table = Rows(COLUMNS, (6, 22, 18, 15))
    table.start()
    sentences, plain = [], []
    with tempfile.TemporaryDirectory() as folder:
        for device in [options.device] if options.device else ["cpu", "cuda"]:
            large = device == "cuda" and torch.cuda.is_available()
            every = [*families(large=large), *examples(large=large), llama_bf16(Path(folder), large=large)]
            workloads = [w for w in every if any(pattern in w.name for pattern in options.only)]
            errors = []
            for workload in workloads[-2:] if options.quick else workloads:
                for number, (row, error) in enumerate(compare(workload, device, few=options.quick or options.few)):
                    table.add(row)
                    errors += [error] if error is not None else []
                    if number == 0 and isinstance(row[5], float):  # torch's AdamW as a user gets it, no switch
                        plain.append((workload, device, row[5]))
            sentences.append(summary(device, errors))
        print(*sentences, sep="\n")
        print_peers(plain)


if __name__ == "__main__":
    main()
