"""How the time of a step grows with the number of parameters, and with the number of tensors they are cut into.

    python benchmarks/scaling.py [--quick] [--device cpu|cuda] [--only PATTERN ...]

First blocks of a transformer with 10, 100 and 1,000 million parameters; then 10 million of them in 10 to 10,000
tensors. Linear growth shows as one figure down a column: nanoseconds per parameter in the first part, microseconds per
tensor at the end of the second. The first step includes compilation and making the state; what was compiled for the
row before counts as in any process. Times are the median of three steps: CPU seconds of the process with one thread,
or CUDA events; the first step is wall clock. What does not fit in memory is left out, and said.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from bench_support.output import Rows, machine
from bench_support.timing import available_bytes, cold_compiler, release_free_memory, seconds_of
from torch import Tensor
from torch.optim import Optimizer

from memadvise.errors import OptimizerError
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import fitted, state_bytes
from memadvise.plan.schema import Setting

SETTINGS = {
    "memadvise adamw": Setting("adamw"),
    "memadvise slimadam [1]": Setting("slimadam", {"axes": [1]}),
    "memadvise adafactor": Setting("adafactor"),
    "memadvise adamw int8": Setting("adamw", {"first_moment": "int8", "second_moment": "int8"}),
}
TORCH = "torch AdamW fused"
SIZES = ((256, 13), (768, 14), (2048, 20))  # width and blocks: 10, 99 and 1,007 million parameters
CUTS = ((10, 1024), (100, 324), (1000, 102), (10000, 32))  # so many square tensors of that side: 10 million parameters
QUICK_SIZES, QUICK_CUTS = ((16, 1), (32, 2)), ((4, 32), (16, 16))
LONGEST_SECONDS = 12.0  # of a step; by the size before, larger ones are left out
SPARE_BYTES = 2**30  # for the interpreter, scratch, and whatever else runs
COLUMNS = ("optimizer", "parameters", "tensors", "first s", "step ms", "ns/param", "us/tensor")
Shape = tuple[int, ...]


def blocks(width: int, count: int) -> list[Shape]:
    """The matrices of a transformer's blocks, and two norms each."""
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (width,), (width,)]
    return block * count


def needed_bytes(setting: Setting, shapes: Sequence[Shape]) -> int:
    """State of an optimizer, exactly as its methods say."""
    return sum(state_bytes(fitted(setting, shape), shape) for shape in shapes)


def makers() -> Iterator[tuple[str, Setting, Callable[[list[Tensor]], Optimizer]]]:
    """Each optimizer by name, the setting whose state it holds, and how it is made."""
    yield TORCH, Setting("adamw"), partial(torch.optim.AdamW, lr=1e-3, fused=True)
    for name, setting in SETTINGS.items():
        yield name, setting, partial(MemadviseOptimizer, settings=setting, lr=1e-3)


def rows(
    shapes: Sequence[Shape], device: str, patterns: Sequence[str], table: Rows, per_parameter: dict[str, float]
) -> None:
    """Print a row for each optimizer on parameters of these shapes, which are made once.

    ``per_parameter``: nanoseconds by optimizer, of the last size; filled here.
    """
    chosen = [one for one in makers() if not patterns or any(p.lower() in one[0].lower() for p in patterns)]
    count = sum(torch.Size(shape).numel() for shape in shapes)
    room = available_bytes(device)
    room = None if room is None else room - SPARE_BYTES - 8 * count
    fits = [room is None or needed_bytes(setting, shapes) <= room for _, setting, _ in chosen]
    params = _parameters(shapes, device) if any(fits) else []
    for (name, setting, make), enough in zip(chosen, fits, strict=True):
        if not enough:
            lacking = (needed_bytes(setting, shapes) - (room or 0)) / 2**30
            table.note(name, f"{count:>13,}  {len(shapes):>13,}  not measured: {lacking:.1f} GiB of memory are missing")
            continue
        expected = per_parameter.get(name, 0.0) * count / 1e9
        if expected > LONGEST_SECONDS:
            table.note(name, f"{count:>13,}  {len(shapes):>13,}  not measured: a step would take {expected:.0f} s")
            continue
        try:
            figures = _time(make, params, device)
            per_parameter[name] = figures[2]
            table.add([name, count, len(shapes), *figures])
        except OptimizerError as error:
            table.note(name, f"skipped: {error.message}")
        gc.collect()
        release_free_memory()


def _parameters(shapes: Sequence[Shape], device: str) -> list[Tensor]:
    params = [torch.full(shape, 0.02, device=device).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.empty_like(p).uniform_(-1e-3, 1e-3)
    return params


def _time(make: Callable[[list[Tensor]], Optimizer], params: list[Tensor], device: str) -> tuple[float, ...]:
    """Seconds of the first step, milliseconds of another, and that per parameter and per tensor."""
    with cold_compiler():
        optimizer = make(params)
        first = seconds_of(optimizer.step, device, time.perf_counter)
        optimizer.step()
        seconds = statistics.median(seconds_of(optimizer.step, device, time.process_time) for _ in range(3))
    count = sum(p.numel() for p in params)
    return first, 1e3 * seconds, 1e9 * seconds / count, 1e6 * seconds / len(params)


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time against the number of parameters and of tensors.")
    parser.add_argument("--quick", action="store_true", help="thousands of parameters in a few tensors")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="optimizers whose name contains it")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no row after so many")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no CUDA device")
        return
    torch.set_num_threads(1)
    print(machine())
    clock = "CUDA events" if options.device == "cuda" else "CPU seconds of the process, one thread"
    print(f"step:     float32, {options.device}; {clock}; medians of 3", end="\n\n")
    table = Rows(COLUMNS, (24,), number=13)
    table.start()
    sizes, cuts = (QUICK_SIZES, QUICK_CUTS) if options.quick else (SIZES, CUTS)
    parts = [blocks(*size) for size in sizes] + [[(side, side)] * count for count, side in cuts]
    per_parameter: dict[str, float] = {}
    start = time.perf_counter()
    for shapes in parts:
        if time.perf_counter() - start > options.seconds:
            print("The rest was not measured: out of time.")
            break
        rows(shapes, options.device, options.only, table, per_parameter)
        gc.collect()


if __name__ == "__main__":
    main()
