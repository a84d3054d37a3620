"""Does every optimizer train? Validation loss on examples/gpt_text.py, each at its best of three lr.

    python benchmarks/convergence.py [--steps 120] [--jobs 2] [--only NAME ...] [--quick]

One seed, the same batches for all, warm-up over the first tenth, then cosine to a tenth; weight decay 0.01. The grid is
AdamW's (3e-4, 1e-3, 3e-3) times the method's customary factor. A row is "within" if it ends at most DISTANCE nats
above AdamW; otherwise the exit code is 1. One short run of a small model: it shows that a method works as an optimizer,
not which is best.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_support.output import machine, table

from memadvise.optim.create import create_optimizer
from memadvise.optim.registry import default_lr_factor
from memadvise.plan.schema import Setting

sys.path.append(str(Path(__file__).parents[1] / "examples"))

DISTANCE = 0.25  # nats above AdamW
GRID = (3e-4, 1e-3, 3e-3)
INT8 = {"first_moment": "int8", "second_moment": "int8"}

SETTINGS: tuple[Setting, ...] = (
    Setting("adamw"),
    Setting("slimadam", {"axes": [1]}),
    Setting("adam_mini", {"partition": "row"}),
    Setting("adapprox", {"rank": 4}),
    Setting("adapprox"),
    Setting("adapprox", {"rank": 4, "momentum": False}),
    Setting("micro_adam"),
    Setting("apollo"),
    Setting("apollo", {"projection": "sketch"}),
    Setting("apollo_mini"),
    Setting("galore"),
    Setting("adafactor"),
    Setting("adafactor", {"momentum": 0.9}),
    Setting("came", {"correct_instability": True}),
    Setting("lion"),
    Setting("sgd"),
    Setting("rmsprop"),
    Setting("rmsprop", {"store": "lowrank", "rank": 4}),
    Setting("adagrad"),
    Setting("adamw", {"cautious": True}),
    Setting("lion", {"cautious": True}),
    Setting("adamw", {"first_moment": "dynamic8", "second_moment": "dynamic8"}),
    Setting("adamw", INT8),
    Setting("adamw", {"first_moment": "int4", "second_moment": "int4"}),
    Setting("slimadam", {"axes": [1], "first_moment": "int8"}),
    Setting("slimadam", {"axes": [1], "first_moment": "int8", "cautious": True, "cautious_decay": True}),
    Setting("adam_mini", {"partition": "row", "first_moment": "int8"}),
    Setting("apollo", {"rank": 32, **INT8}),
    Setting("lion", {"first_moment": "int8"}),
    Setting("apollo_mini", {"weights": "int8"}),
)


@dataclass(frozen=True)
class Run:
    """One training run."""

    setting: Setting
    lr: float
    steps: int


@dataclass(frozen=True)
class Outcome:
    """Where it ended; ``loss`` is NaN if it diverged."""

    run: Run
    loss: float
    state_bytes_per_parameter: float


def train(run: Run) -> Outcome:
    """Train the example from its seed and validate once at the end."""
    import gpt_text

    torch.set_num_threads(1)
    model = gpt_text.build_model().train()
    count = sum(p.numel() for p in model.parameters())
    optimizer = create_optimizer(model, run.setting, lr=run.lr, weight_decay=0.01)
    warm = max(run.steps // 10, 1)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(run.steps - warm, 1))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for batch in itertools.islice(gpt_text.build_batches(), run.steps):
        loss = gpt_text.compute_loss(model, batch)
        if not torch.isfinite(loss):
            return Outcome(run, math.nan, math.nan)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
    state = sum(m.state_bytes for m in optimizer.memory())
    return Outcome(run, gpt_text.validation_loss(model), state / count)


def rows(outcomes: list[Outcome]) -> list[list[object]]:
    """One row a setting: its best learning rate, loss, distance to AdamW, state."""
    best: dict[str, Outcome] = {}
    for outcome in outcomes:
        key = outcome.run.setting.key
        if not math.isnan(outcome.loss) and (key not in best or outcome.loss < best[key].loss):
            best[key] = outcome
    yardstick = best["adamw"].loss
    found: list[list[object]] = []
    for key in dict.fromkeys(outcome.run.setting.key for outcome in outcomes):
        if key not in best:
            found.append([key, "-", "diverged", "-", "-", "no"])
            continue
        outcome = best[key]
        above = outcome.loss - yardstick
        found.append([
            key, f"{outcome.run.lr:.0e}", f"{outcome.loss:.3f}", f"{above:+.3f}",
            f"{outcome.state_bytes_per_parameter:.2f}", "yes" if above <= DISTANCE else "no",
        ])  # fmt: skip
    return found


def main() -> int:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="methods, beside adamw")
    parser.add_argument("--quick", action="store_true", help="20 steps, one learning rate, three methods")
    options = parser.parse_args()
    settings = [s for s in SETTINGS if not options.only or s.method in ("adamw", *options.only)]
    steps, grid = options.steps, GRID
    if options.quick:
        quick = ("adamw", "slimadam(axes=[1])", "lion")
        settings, steps, grid = [s for s in settings if s.key in quick], 20, GRID[1:2]
    runs = [Run(s, lr * default_lr_factor(s.method), steps) for s in settings for lr in grid]
    print(machine())
    print(f"examples/gpt_text.py, {steps} steps, one seed; 'within' means at most {DISTANCE} nats above AdamW\n")
    outcomes: list[Outcome] = []
    if options.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for outcome in pool.imap(train, runs):
                outcomes.append(outcome)
                print(f"{len(outcomes)}/{len(runs)} {outcome.run.setting.key}", file=sys.stderr, flush=True)
    else:
        outcomes = [train(run) for run in runs]
    found = rows(outcomes)
    print(table(("optimizer", "best lr", "validation loss", "above AdamW", "state B/param", "within"), found))
    return 0 if all(row[-1] == "yes" for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
