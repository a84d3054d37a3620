"""The main job from end to end: scan a GPT, recommend under a budget, train with the plan beside plain AdamW.

Run it with: make demo
"""

from __future__ import annotations

import argparse
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import gpt_text
import torch
from example_support import Batch
from rich.console import Console
from rich.table import Table
from torch import nn

from memadvise import apply_checkpoint, create_optimizer, load_plan, load_target, split_batch
from memadvise.ledger import load_scan
from memadvise.memory.measure import measure_cpu
from memadvise.plan.schema import Switches
from memadvise.units import format_bytes

EXAMPLES = Path(__file__).resolve().parent
# AdamW's, the best of a small grid (lr 1e-3, 2e-3, 4e-3; beta2 0.95, 0.99); the plan trains with the same.
LR, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 0.1


@dataclass
class Run:
    """One of the two trainings: its model, optimizer and switches, and what was seen of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    switches: Switches
    schedule: torch.optim.lr_scheduler.LRScheduler
    seconds: list[float]

    def step(self, batch: Batch) -> None:
        start = time.perf_counter()
        parts = split_batch(batch, self.switches.micro_batches)
        for part in parts:
            (gpt_text.compute_loss(self.model, part) / len(parts)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.seconds.append(time.perf_counter() - start)


def memadvise(*arguments: str) -> None:
    """Run the command line tool as a user would, and show what it says."""
    print(f"\n$ memadvise {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "memadvise", *arguments], check=True)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer really holds."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)


def warm_up_and_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear over the first tenth, then a cosine to zero."""
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--budget-percent", type=int, default=60, help="of the peak with plain AdamW")
    parser.add_argument("--out", type=Path, default=EXAMPLES / "demo_out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    scan_file, plan_file = options.out / "memadvise.scan.json", options.out / "memadvise.yaml"
    target_file = str(EXAMPLES / "gpt_text.py")

    hyper = ["--lr", str(LR), "--betas", *map(str, BETAS), "--weight-decay", str(WEIGHT_DECAY)]
    memadvise("scan", target_file, "--device", "cpu", *hyper, "-o", str(scan_file))
    before = load_scan(scan_file).memory[0]
    budget = before.peak_bytes * options.budget_percent // 100
    memadvise("recommend", "--budget", str(budget), "--scan", str(scan_file), "-o", str(plan_file), "--force")

    plan = load_plan(plan_file)

    def planned(model: nn.Module) -> torch.optim.Optimizer:
        return create_optimizer(model, plan, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)

    kinds: list[tuple[str, Callable[[nn.Module], torch.optim.Optimizer], Switches, int, int]] = [
        ("AdamW", adamw, Switches(), before.state_bytes, before.peak_bytes),
        ("the plan", planned, plan.switches, plan.predicted_state_bytes or 0, plan.predicted_peak_bytes or 0),
    ]
    print(f"\ntraining {options.steps} steps with each, alternating", flush=True)
    runs = []
    for name, build, switches, _, _ in kinds:
        model = gpt_text.build_model().train()
        apply_checkpoint(model, switches.checkpoint)
        optimizer = build(model)
        runs.append(Run(name, model, optimizer, switches, warm_up_and_cosine(optimizer, options.steps), []))
    for batch in itertools.islice(gpt_text.build_batches(), options.steps):
        for run in runs:
            run.step(batch)

    target = load_target(target_file)
    title = f"budget {format_bytes(budget)}: {options.budget_percent} % of AdamW's peak"
    table = Table("", title=title, title_justify="left")
    for column in ("validation loss", "state predicted", "state real", "peak predicted", "peak measured", "ms a step"):
        table.add_column(column, justify="right")
    for run, (name, build, switches, predicted_state, predicted_peak) in zip(runs, kinds, strict=True):
        measured = measure_cpu(target, optimizer=build, switches=switches)
        table.add_row(
            name,
            f"{gpt_text.validation_loss(run.model):.4f}",
            f"{predicted_state:,} B",
            f"{state_bytes(run.optimizer):,} B",
            format_bytes(predicted_peak),
            format_bytes(measured.peak_bytes),
            f"{1000 * median(run.seconds):.1f}",
        )
    print()
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
