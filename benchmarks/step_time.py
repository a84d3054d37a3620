"""The time of one optimizer step relative to torch.optim.AdamW(fused=True), and the memory it takes for the time.

    python benchmarks/step_time.py [--quick] [--device cpu|cuda] [--dtype float32|bfloat16] [--blocks 12]
                                   [--only PATTERN ...] [--no-peers] [--no-wall] [--rounds 9]

The parameters are those of GPT-2 124M with a tied head. Every optimizer steps a copy of them in turn with the
yardstick, in one process, so that whatever else the machine does falls on both; figures are medians. On the CPU there
are two ratios: process CPU seconds with one thread, which another load on the machine hardly touches, and wall clock
with all threads. The first step of each row finds nothing compiled, on disk or in memory. Transient memory is the
growth of resident memory within a step by the kernel's high-water mark, beside the count of torch's allocator; scratch
is what our optimizers say they need. On CUDA the time is what events on the stream say, and what had to be read and
written (the byte bound is that, relative to the yardstick) over this time is set beside the bandwidth of a copy; beside
it stand what the kernels of one step take together, and how many there are: where that is less, calls are what is paid.

Low-rank methods (APOLLO, GaLore; ours and the peers') step the matrices of the blocks, at rank 192 or 1, and leave
embeddings, norms and biases to their dense Adam, as the papers do. They project once, in the first step: no timed step
has a refresh in it. Adapprox "every 4" is the mean of four steps, one of which renews the factors.

Peers are measured where they are installed, which takes:

    pip install torchao bitsandbytes pytorch-optimizer torch-optimi heavyball adam-mini apollo-torch galore-torch
    pip install came-pytorch transformers numpy

A target is reached if the ratio of CPU seconds, as printed with two decimals, is at most the target.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import importlib
import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# Threads that wait by spinning slow each other down many times over where cores are shared; torch's do by default.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from bench_support import peers
from bench_support.output import MIB, Rows, machine
from bench_support.rows import Gpt2, Row, our_rows, torch_rows
from bench_support.timing import LEAST_ROUNDS, Result, Yardstick, copy_bandwidth

from memadvise.errors import OptimizerError

NAME_WIDTH, EXECUTOR_WIDTH = 49, 14
CPU_COLUMNS = (
    "optimizer", "executor", "CPU ms", "CPU ratio", "wall ratio", "target", "reached", "byte bound", "first s",
    "state B/param", "transient MiB", "allocator", "scratch",
)  # fmt: skip
CUDA_COLUMNS = (
    "optimizer", "executor", "ms", "ratio", "device ms", "launches", "byte bound", "GB/s", "% of copy", "first s",
    "state B/param", "transient MiB", "scratch",
)  # fmt: skip


def chosen(rows: Sequence[Row], patterns: Sequence[str]) -> Iterator[Row]:
    """The rows whose names match one of the patterns, or contain it (all without patterns), and none after a "!"."""
    unwanted = [p[1:].lower() for p in patterns if p.startswith("!")]
    wanted = [p.lower() for p in patterns if not p.startswith("!")]
    for row in rows:
        name = row.name.lower()
        if any(p in name for p in unwanted):
            continue
        if not wanted or any(p in name or fnmatch.fnmatch(name, p) for p in wanted):
            yield row


def reached(result: Result, target: float | None) -> str:
    """Whether the ratio of CPU seconds is at most the target, to its second decimal."""
    return "" if target is None else "yes" if round(result.cpu.ratio, 2) <= target else "no"


def cells(row: Row, result: Result, count: int, bandwidth: float | None) -> list[object]:
    """One line: of CUDA_COLUMNS where the bandwidth of a copy is known, else of CPU_COLUMNS."""
    bound: object = "" if result.moved_bytes is None else result.moved_bytes / result.yardstick_bytes
    scratch: object = "" if result.scratch_bytes is None else result.scratch_bytes / MIB
    state = result.state_bytes / count
    common: list[object] = [row.name, result.executors, 1000 * result.cpu.seconds, result.cpu.ratio]
    if bandwidth is not None:
        speed = None if result.moved_bytes is None else result.moved_bytes / result.cpu.seconds
        rate = ["", ""] if speed is None else [speed / 1e9, 100 * speed / bandwidth]
        device: list[object] = [1000 * result.device_seconds, result.launches]
        return [*common, *device, bound, *rate, result.first_seconds, state, result.allocator_bytes / MIB, scratch]
    return [
        *common,
        "" if result.wall is None else result.wall.ratio,
        "" if row.target is None else row.target,
        reached(result, row.target),
        bound,
        result.first_seconds,
        state,
        "" if result.kernel_bytes is None else result.kernel_bytes / MIB,
        result.allocator_bytes / MIB,
        scratch,
    ]


def peer_rows(patterns: Sequence[str], table: Rows) -> Iterator[Row]:
    """The rows of the packages that are installed; a note for each of the others."""
    for package in peers.PACKAGES:
        rows = list(chosen(list(package.rows()), patterns))
        if rows and not package.installed():
            table.note(package.distribution, "not installed")
        elif rows:
            yield from rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of an optimizer step relative to torch's fused AdamW.")
    parser.add_argument("--quick", action="store_true", help="one small block and one round")
    parser.add_argument("--rounds", type=int, default=9, help=f"at least {LEAST_ROUNDS}, unless --quick")
    parser.add_argument("--blocks", type=int, help="12 unless given; with fewer the vocabulary shrinks alike")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the wall clock's pass")
    parser.add_argument(
        "--no-wall", action="store_true", help="CPU seconds only: rows that compile do it once, not twice"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="rows whose name contains or matches")
    parser.add_argument("--no-peers", action="store_true", help="torch's and our own rows only")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="compiled kernels to use and keep: no cold steps")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no row after so many")
    options = parser.parse_args()
    if options.rounds < LEAST_ROUNDS and not options.quick:
        parser.error(f"--rounds: at least {LEAST_ROUNDS}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no CUDA device")
        return
    rounds = 1 if options.quick else options.rounds
    blocks = options.blocks or (1 if options.quick else 12)
    torch.manual_seed(0)
    dtype, start = getattr(torch, options.dtype), time.perf_counter()
    vocabulary = 2048 if options.quick else 50257 * min(blocks, 12) // 12
    model = Gpt2(blocks=blocks, vocabulary=vocabulary).to(options.device, dtype)
    yardstick = Yardstick(model, options.device, options.cache)
    wall = options.device == "cpu" and not options.no_wall
    bandwidth = copy_bandwidth(options.device) if options.device == "cuda" else None
    print(machine(), f"{'peers:':<10}{'' if options.no_peers else peers.versions()}".rstrip(), sep="\n")
    _describe(yardstick, options, rounds, bandwidth)
    table = Rows(CPU_COLUMNS if bandwidth is None else CUDA_COLUMNS, (NAME_WIDTH, EXECUTOR_WIDTH))
    table.start()
    yardsticks = []
    rows = chosen([*torch_rows(), *our_rows(dtype)], options.only)
    others = iter(()) if options.no_peers else peer_rows(options.only, table)
    for row in itertools.chain(rows, others):
        if time.perf_counter() - start > options.seconds:
            table.note(row.name, "not measured: out of time")
            continue
        try:
            result = yardstick.measure(row, rounds=rounds, threads=options.threads, wall_clock=wall)
        except OptimizerError as error:
            table.note(row.name, f"skipped: {error.message}")
        except Exception as error:  # of a peer, usually: the other rows are not its business
            table.note(row.name, peers.reason(error))
        else:
            yardsticks.append(result.cpu.yardstick)
            table.add(cells(row, result, yardstick.count, bandwidth))
        gc.collect()
    if yardsticks:
        low, high = 1000 * min(yardsticks), 1000 * max(yardsticks)
        print(f"\nThe yardstick took {low:.2f} to {high:.2f} ms beside the others.", end=" ")
    print(f"All rows took {time.perf_counter() - start:.0f} s.")


def _describe(yardstick: Yardstick, options: argparse.Namespace, rounds: int, bandwidth: float | None) -> None:
    """What is stepped, and how it is timed."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torch._inductor.compile_fx")  # not part of any row's first step
    clock = (
        "CUDA events"
        if bandwidth is not None
        else f"CPU seconds of the process with 1 thread, wall clock with {options.threads} "
        f"(OMP_WAIT_POLICY {os.environ['OMP_WAIT_POLICY']})"
    )
    print(
        f"step:     {yardstick.count:,} parameters, {options.dtype}, {options.device}; largest tensor "
        f"{yardstick.largest_bytes / MIB:.0f} MiB; {clock}; medians of {rounds}, "
        f"{min(rounds, LEAST_ROUNDS)} where steps are slow"
    )
    if bandwidth is not None:
        print(f"copy:     {bandwidth / 1e9:,.0f} GB/s, read and written")
    print()


if __name__ == "__main__":
    main()
