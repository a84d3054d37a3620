"""Does every optimizer train? Validation loss on examples/gpt_text.py, each at its best learning rate.

    python benchmarks/convergence.py [--steps 120] [--jobs 2] [--only NAME ...] [--cache FILE] [--table] [--quick]

One seed, the same batches for all, warm-up over the first tenth, then cosine to a tenth; weight decay 0.01. The grid is
AdamW's (3e-4, 1e-3, 3e-3) times the method's customary factor; while the best learning rate of a setting lies on an
edge of what was tried, the grid goes on by half a decade there, up to EXTENSIONS times on each side, for all alike. A
best that is still on the edge is marked "<" or ">".

``--cache`` keeps every finished run in a JSON file, so that an interrupted table goes on where it stopped and may be
made in pieces; what another torch, Python or example wrote there is not used.

A row is "within" if it ends at most DISTANCE nats above AdamW. The exit code is 1 if any row is not, explained in the
footer or not. One short run of a small model: it shows that a method works as an optimizer, not which is best.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_support.output import machine, table

from memadvise.optim.create import create_optimizer
from memadvise.optim.registry import default_lr_factor
from memadvise.plan.schema import Setting

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))

DISTANCE = 0.25  # nats above AdamW
GRID: Sequence[float] = (3e-4, 1e-3, 3e-3)
EXTENSIONS = 3  # half-decades beyond the grid, on each side
INT8 = {"first_moment": "int8", "second_moment": "int8"}

SETTINGS: tuple[Setting, ...] = (
    Setting("adamw"),
    Setting("slimadam", {"axes": [1]}),
    Setting("adam_mini", {"partition": "row"}),
    Setting("adapprox", {"rank": 4}),
    Setting("adapprox"),
    Setting("adapprox", {"rank": 4, "momentum": False}),
    Setting("micro_adam"),
    Setting("micro_adam", {"density": 0.1}),
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

# Why a setting ends further from AdamW than DISTANCE in so few steps.
WHY: dict[str, str] = {
    "micro_adam": "a step selects 1 % of each block (the paper's density), so that a coordinate is selected about once "
    "in a hundred steps, and a run as short as this one moves most of them once or twice. The row with density 0.1 is "
    "the same method with ten times the selection.",
}


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


def wanted(setting: Setting, tried: Iterable[Outcome], grid: Sequence[float] = GRID) -> list[float]:
    """The learning rates to run next: the grid, then half a decade beyond the edge on which the best one lies."""
    loss = {outcome.run.lr: outcome.loss for outcome in tried if outcome.run.setting.key == setting.key}
    first = [learning_rate(setting, lr) for lr in grid]
    if missing := [lr for lr in first if lr not in loss]:
        return missing
    rates = [learning_rate(setting, lr) for lr in ladder(grid)]
    edge = edge_of(loss)
    index = rates.index(min(loss) if edge == "<" else max(loss)) + {"<": -1, ">": 1, "": 0}[edge]
    return [rates[index]] if edge and 0 <= index < len(rates) else []


def learning_rate(setting: Setting, lr: float) -> float:
    """``lr``, meant for AdamW, as it is customary for the method; of one digit."""
    return float(f"{lr * default_lr_factor(setting.method):.0e}")


def ladder(grid: Sequence[float]) -> list[float]:
    """``grid`` with its extensions on both sides, in half-decades: 1 and 3 times powers of ten."""
    if len(grid) == 1:  # --quick
        return list(grid)
    whole = [float(f"{digit}e{power}") for power in range(-9, 3) for digit in (1, 3)]
    low, high = whole.index(grid[0]), whole.index(grid[-1])
    return whole[low - EXTENSIONS : high + EXTENSIONS + 1]


def edge_of(loss: dict[float, float]) -> str:
    """Which side, "<" or ">", if the best of ``lr -> loss`` is the smallest or largest lr of several; else ""."""
    finite = {lr: value for lr, value in loss.items() if not math.isnan(value)}
    if len(loss) < 2:
        return ""
    if not finite:
        return "<"  # all of them diverged
    best = min(finite, key=lambda lr: finite[lr])
    return "<" if best == min(loss) else ">" if best == max(loss) else ""


def rows(outcomes: Sequence[Outcome]) -> list[list[object]]:
    """One row a setting: its best learning rate, loss, distance to AdamW, state."""
    best: dict[str, Outcome] = {}
    losses: dict[str, dict[float, float]] = {}
    for outcome in outcomes:
        key = outcome.run.setting.key
        losses.setdefault(key, {})[outcome.run.lr] = outcome.loss
        if not math.isnan(outcome.loss) and (key not in best or outcome.loss < best[key].loss):
            best[key] = outcome
    yardstick = best["adamw"].loss
    found: list[list[object]] = []
    for key, tried in losses.items():
        if key not in best:
            found.append([key, "-", "diverged", "-", "-", "no"])
            continue
        outcome = best[key]
        above = outcome.loss - yardstick
        found.append([
            key, f"{outcome.run.lr:.0e}{edge_of(tried)}", f"{outcome.loss:.3f}", f"{above:+.3f}",
            f"{outcome.state_bytes_per_parameter:.2f}", "yes" if above <= DISTANCE else "no",
        ])  # fmt: skip
    return found


class Cache:
    """Finished runs, kept in a JSON file (None: not at all)."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.runs: dict[str, Any] = {}
        if path is not None and path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.get("made_by") == _made_by():
                self.runs = document["runs"]
            else:
                print(f"{path} is of another torch, Python or example: it begins anew", file=sys.stderr)

    def get(self, run: Run) -> Outcome | None:
        found = self.runs.get(_name(run))
        if found is None:
            return None
        loss, state = (math.nan if value is None else value for value in found)
        return Outcome(run, loss, state)

    def put(self, outcome: Outcome) -> None:
        values = (outcome.loss, outcome.state_bytes_per_parameter)
        self.runs[_name(outcome.run)] = [None if math.isnan(value) else value for value in values]
        if self.path is not None:
            text = json.dumps({"made_by": _made_by(), "runs": self.runs}, indent=1) + "\n"
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(text, encoding="utf-8")
            part.replace(self.path)


def _name(run: Run) -> str:
    return f"{run.setting.key} lr={run.lr:.0e} steps={run.steps}"


def _made_by() -> str:
    texts = b"".join((EXAMPLES / name).read_bytes() for name in ("gpt_text.py", "example_support.py"))
    return f"torch {torch.__version__}, Python {platform.python_version()}, {hashlib.sha256(texts).hexdigest()[:12]}"


def results(
    settings: Sequence[Setting], grid: Sequence[float], steps: int, jobs: int, cache: Cache
) -> Iterator[Outcome]:
    """Every run that the table needs, those of the cache at once, as they finish."""
    tried: list[Outcome] = []
    with _mapping(jobs) as run_all:
        while runs := [Run(s, lr, steps) for s in settings for lr in wanted(s, tried, grid)]:
            known = [cache.get(run) for run in runs]
            fresh = run_all(train, [run for run, outcome in zip(runs, known, strict=True) if outcome is None])
            for run, outcome in zip(runs, known, strict=True):
                if outcome is None:
                    outcome = next(fresh)
                    cache.put(outcome)
                    print(f"{_name(run)}: {outcome.loss:.3f}", file=sys.stderr, flush=True)
                tried.append(outcome)
                yield outcome


@contextlib.contextmanager
def _mapping(jobs: int) -> Iterator[Callable[..., Iterator[Outcome]]]:
    """``map``, over ``jobs`` processes."""
    if jobs == 1:
        yield map
    else:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            yield pool.imap


def main() -> int:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="methods, beside adamw")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep finished runs in this JSON file")
    parser.add_argument("--table", action="store_true", help="train nothing: the table of what the cache holds")
    parser.add_argument("--quick", action="store_true", help="20 steps, one learning rate, three methods")
    options = parser.parse_args()
    settings = [s for s in SETTINGS if not options.only or s.method in ("adamw", *options.only)]
    steps, grid = options.steps, GRID
    if options.quick:
        quick = ("adamw", "slimadam(axes=[1])", "lion")
        settings, steps, grid = [s for s in settings if s.key in quick], 20, GRID[1:2]
    cache = Cache(options.cache)
    if options.table:
        runs = [Run(s, learning_rate(s, lr), steps) for s in settings for lr in ladder(grid)]
        outcomes = [outcome for run in runs if (outcome := cache.get(run)) is not None]
    else:
        outcomes = list(results(settings, grid, steps, options.jobs, cache))
    order = {setting.key: number for number, setting in enumerate(settings)}
    found = rows(sorted(outcomes, key=lambda outcome: order[outcome.run.setting.key]))
    print(machine())
    print(f"examples/gpt_text.py, {steps} steps, one seed; 'within' means at most {DISTANCE} nats above AdamW\n")
    print(table(("optimizer", "best lr", "validation loss", "above AdamW", "state B/param", "within"), found))
    beyond = [str(row[0]) for row in found if row[-1] == "no"]
    for key in beyond:
        print(f"\n{key}: {WHY.get(key, 'not explained')}")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
