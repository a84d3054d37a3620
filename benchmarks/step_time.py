"""The time of one optimizer step relative to torch.optim.AdamW(fused=True), and the memory it takes for the time.

    python benchmarks/step_time.py [--quick] [--device cpu|cuda] [--rounds 9] [--dtype float32|bfloat16]

The shapes are those of GPT-2 at one third: 4 blocks of width 768, vocabulary 16752. Both optimizers step equal copies
in one process, in turn, so that whatever else the machine does falls on both. On the CPU the time is what the process
spent on its CPU, on one thread; on CUDA what events on the stream say. Figures are medians.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from bench_support.output import MIB, machine, table
from torch import nn
from torch.optim import Optimizer

from memadvise.memory.allocator_log import allocator_log
from memadvise.memory.tensors import state_bytes
from memadvise.optim.create import create_optimizer
from memadvise.plan.schema import Plan, Rule, Setting

WIDTH, HEADS = 768, 12
COLUMNS = ("optimizer", "ms/step", "ratio", "state B/param", "transient MiB", "/ largest tensor")
MakeOptimizer = Callable[[nn.Module], Optimizer]


class Shapes(nn.Module):
    """The parameters of a GPT-2; it has no forward pass."""

    def __init__(self, *, width: int = WIDTH, blocks: int = 4, vocabulary: int = 16752, positions: int = 1024) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)


def _torch(model: nn.Module, **options: bool) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, **options)


def _ours(model: nn.Module, plan: Plan | Setting, executor: str | None = None) -> Optimizer:
    return create_optimizer(model, plan, lr=1e-3, weight_decay=0.1, executor=executor)


def _adam_mini_heads(width: int) -> Plan:
    """Adam-mini as its paper divides: heads of query and key, rows elsewhere (value too), norms and biases whole."""
    segments = [[0, width, HEADS], [width, 2 * width, HEADS], [2 * width, 3 * width, 0]]
    return Plan(
        (
            Rule("blocks.*.qkv.weight", "adam_mini", {"partition": "head", "segments": segments}),
            Rule("**.bias", "adam_mini", {"partition": "whole"}),
            Rule("**norm*.weight", "adam_mini", {"partition": "whole"}),
            Rule("**", "adam_mini", {"partition": "row"}),
        )
    )


def methods(dtype: torch.dtype, width: int = WIDTH) -> dict[str, MakeOptimizer]:
    """Every bundled method, and torch's own implementations."""
    settings = {
        "slimadam axes [1] (row means)": Setting("slimadam", {"axes": [1]}),
        "slimadam axes [0] (column means)": Setting("slimadam", {"axes": [0]}),
        "slimadam axes [0, 1]": Setting("slimadam", {"axes": [0, 1]}),
        "adam_mini row": Setting("adam_mini", {"partition": "row"}),
        "adam_mini column": Setting("adam_mini", {"partition": "column"}),
        "adam_mini whole": Setting("adam_mini", {"partition": "whole"}),
        "adam_mini heads": _adam_mini_heads(width),
        "lion": Setting("lion"),
        "sgd momentum 0.9": Setting("sgd", {"momentum": 0.9}),
        "sgd momentum 0": Setting("sgd", {"momentum": 0.0}),
        "adafactor": Setting("adafactor"),
        "came": Setting("came"),
        "adapprox rank 4": Setting("adapprox", {"rank": 4, "adapt_every": 0}),
        "micro_adam": Setting("micro_adam"),
        "apollo_mini": Setting("apollo_mini"),
        "apollo gaussian": Setting("apollo", {"rank": width // 4}),
        "apollo sketch": Setting("apollo", {"rank": width // 4, "projection": "sketch"}),
        "galore (no refresh)": Setting("galore", {"rank": width // 4}),
        "rmsprop": Setting("rmsprop"),
        "rmsprop factored": Setting("rmsprop", {"store": "factored"}),
        "adagrad": Setting("adagrad"),
        "adamw cautious": Setting("adamw", {"cautious": True}),
        "adamw dynamic8": Setting("adamw", {"first_moment": "dynamic8", "second_moment": "dynamic8"}),
        "adamw int8": Setting("adamw", {"first_moment": "int8", "second_moment": "int8"}),
        "adamw int4": Setting("adamw", {"first_moment": "int4", "second_moment": "int4"}),
        "adamw bf16": Setting("adamw", {"first_moment": "bf16", "second_moment": "bf16"}),
        "slimadam [1] + int8": Setting("slimadam", {"axes": [1], "first_moment": "int8"}),
        **({name: Setting("adamw", {"weights": name}) for name in ("stochastic", "ecc8")}
           if dtype is torch.bfloat16 else {}),
    }  # fmt: skip
    return {
        "torch AdamW fused (against itself)": partial(_torch, fused=True),
        "torch AdamW for-loop": partial(_torch, foreach=False),
        "torch AdamW foreach": partial(_torch, foreach=True),
        "memadvise adamw": partial(_ours, plan=Setting("adamw")),
        **({"memadvise adamw chunked": partial(_ours, plan=Setting("adamw"), executor="chunked")}
           if dtype is torch.float32 else {}),
        **{f"memadvise {name}": partial(_ours, plan=setting) for name, setting in settings.items()},
    }  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Medians of one method and of the yardstick beside it."""

    seconds: float
    yardstick: float
    state_bytes: int
    transient_bytes: int


def seconds_of(step: Callable[[], object], device: str) -> float:
    """What one step costs: CPU seconds of this process, or the time between two events on the CUDA stream."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def transient_bytes(step: Callable[[], object], device: str) -> int:
    """The most that a step holds beyond what is there before it, as torch's allocator counts."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with allocator_log() as log:
        step()
    level = peak = 0
    for size in log.sizes():
        level += size
        peak = max(peak, level)
    return peak


def compare(make: MakeOptimizer, model: nn.Module, *, rounds: int, device: str) -> Result:
    """Step two equal copies of ``model`` in turn."""
    copies = [_with_gradients(copy.deepcopy(model)) for _ in range(2)]
    mine, yardstick = make(copies[0]), _torch(copies[1], fused=True)
    for optimizer in (mine, yardstick):
        for _ in range(2):  # state is made; caches are warm
            optimizer.step()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for seconds, optimizer in zip(times, (mine, yardstick), strict=True):
            seconds.append(seconds_of(optimizer.step, device))
    result = Result(*map(statistics.median, times), state_bytes(mine), transient_bytes(mine.step, device))
    del mine, yardstick, copies
    gc.collect()
    return result


def _with_gradients(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of an optimizer step relative to torch's fused AdamW.")
    parser.add_argument("--quick", action="store_true", help="one small block and three rounds")
    parser.add_argument("--rounds", type=int, default=9, help="at least 7, unless --quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    if options.rounds < 7 and not options.quick:
        parser.error("--rounds: at least 7")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no CUDA device")
        return
    rounds = 3 if options.quick else options.rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = (Shapes(blocks=1, vocabulary=2048) if options.quick else Shapes()).to(options.device, dtype)
    sizes = [p.numel() for p in model.parameters()]
    count, largest = sum(sizes), max(sizes) * dtype.itemsize
    clock = "CUDA events" if options.device == "cuda" else "CPU seconds of the process, one thread"
    print(machine())
    print(
        f"step:     {count:,} parameters, {options.dtype}, {options.device}; {clock}; medians of {rounds}", end="\n\n"
    )
    rows: list[list[object]] = []
    yardsticks = []
    for name, make in methods(dtype).items():
        result = compare(make, model, rounds=rounds, device=options.device)
        yardsticks.append(result.yardstick)
        rows.append(
            [
                name,
                1000 * result.seconds,
                result.seconds / result.yardstick,
                result.state_bytes / count,
                result.transient_bytes / MIB,
                result.transient_bytes / largest,
            ]
        )
    print(table(COLUMNS, rows))
    print(f"The yardstick took {1000 * min(yardsticks):.2f} to {1000 * max(yardsticks):.2f} ms beside the others.")


if __name__ == "__main__":
    main()
