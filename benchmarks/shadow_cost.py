"""What the probe's shadows cost, in training steps.

    python benchmarks/shadow_cost.py [--quick] [--device cpu|cuda]

The probe runs every candidate of every tensor beside AdamW, at each of its 60 steps, and compares them at 5 of these,
where it also reads the SNR of the second moment. Each row times that on one tensor (memadvise.probe called as the probe
calls it) beside the tensor's own forward and backward at 8,192 tokens: x @ W, the gradient of x and that of W; for an
embedding the lookup and its dense gradient. "a recorded step" is the whole cost of watching in the probe, divided by
the 5 recorded steps and by the tensor's own step: at most 3 is wanted of a model. The last row adds up GPT-2 small: 12
layers, and the table of 50,257 tokens that is its head, too. Medians: CPU seconds of the process, one thread; on CUDA
between events.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bench_support.output import Rows, machine
from bench_support.timing import seconds_of

from memadvise.advise.candidates import probe_settings
from memadvise.ledger import Parameter
from memadvise.plan.schema import Setting
from memadvise.probe.shadow import Moment, TensorShadows
from memadvise.probe.snr import SnrTrajectory

TOKENS = 8192
RECORDED, STEPS = 5, 60  # of the probe as `memadvise scan` runs it
BETAS, EPS = (0.9, 0.999), 1e-8
COLUMNS = (
    "tensor", "what it is", "candidates", "watched", "step ms", "shadows ms", "compared ms", "snr ms",
    "a recorded step",
)  # fmt: skip
LAYERS = 12


@dataclass(frozen=True)
class Case:
    """One tensor; ``share`` of the tokens is timed, and the time divided by it: all of it is linear in tokens.

    ``count``: how many there are in GPT-2 small.
    """

    shape: tuple[int, int]
    role: str
    heads: int | None = None
    lookup: bool = False
    share: float = 1.0
    count: int = 0


CASES = (
    Case((768, 768), "attention_output", count=LAYERS),
    Case((768, 768), "attention_query", heads=12),
    Case((2304, 768), "attention_qkv", count=LAYERS),
    Case((3072, 768), "mlp_up", count=LAYERS),
    Case((768, 3072), "mlp_down", count=LAYERS),
    Case((50257, 768), "token_embedding", lookup=True),
    Case((50257, 768), "tied_embedding", share=1 / 32, count=1),
)


def own_step(case: Case, tokens: int, device: str) -> Callable[[], object]:
    """The tensor's own forward and backward."""
    weight = (torch.randn(case.shape, device=device) * 0.02).requires_grad_()
    if case.lookup:
        index = torch.randint(case.shape[0], (tokens,), device=device)
        grad = torch.randn(tokens, case.shape[1], device=device)

        def step() -> object:
            return torch.autograd.grad(torch.nn.functional.embedding(index, weight), weight, grad)
    else:
        x = torch.randn(tokens, case.shape[1], device=device, requires_grad=True)
        grad = torch.randn(tokens, case.shape[0], device=device)

        def step() -> object:
            return torch.autograd.grad(torch.nn.functional.linear(x, weight), (x, weight), grad)

    return step


def parameter(case: Case) -> Parameter:
    """The tensor's record."""
    axes = {"fan_in": (1,), "fan_out": (0,)}
    size = 4 * case.shape[0] * case.shape[1]
    return Parameter(
        "weight", case.shape, "float32", size, True, case.role, "module", "Linear", **axes, heads=case.heads
    )


def candidates(case: Case) -> tuple[Setting, ...]:
    """What the probe would watch of such a tensor."""
    return probe_settings(parameter(case))


def watching(case: Case, device: str) -> tuple[TensorShadows, dict[str, Callable[[], object]]]:
    """The tensor's shadows, and what the probe does with it at a step, at a recorded step beside that, and for SNR."""
    gradient, m = (torch.randn(case.shape, device=device) * 1e-3 for _ in range(2))
    v = torch.rand(case.shape, device=device) * 1e-6
    shadows = TensorShadows(parameter(case), candidates(case), BETAS, EPS, gradient)
    moment: Moment = (m, v, 30)

    def step(record: bool) -> object:
        return shadows.step(gradient, moment, 30, record=record, begin=False, end=False)

    return shadows, {
        "step": lambda: step(False),
        "record": lambda: step(True),
        "snr": lambda: SnrTrajectory().add(v),
    }


def milliseconds(step: Callable[[], object], device: str, rounds: int) -> float:
    """The median, after one call that warms up."""
    step()
    return 1000 * statistics.median(seconds_of(step, device, time.process_time) for _ in range(rounds))


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one tensor: its own step, its shadows' at a step, what a recorded one takes more, and SNR."""

    own: float
    step: float
    record: float
    snr: float

    @property
    def ratio(self) -> float:
        """Training steps a recorded step of the probe."""
        return (STEPS * self.step + RECORDED * (self.record + self.snr)) / RECORDED / self.own

    def cells(self) -> list[object]:
        return [self.own, self.step, self.record, self.snr, self.ratio]


def measure(case: Case, tokens: int, device: str, rounds: int) -> tuple[list[object], Cost]:
    """One row, and what it says."""
    timed = max(1, round(tokens * case.share))
    own = milliseconds(own_step(case, timed, device), device, rounds) * tokens / timed
    shadows, work = watching(case, device)
    parts = {name: milliseconds(step, device, rounds) for name, step in work.items()}
    cost = Cost(own, parts["step"], max(0.0, parts["record"] - parts["step"]), parts["snr"])
    what = case.role + (" (lookup)" if case.lookup else "")
    part = "all" if shadows.sampled is None else f"1/{case.shape[0] * case.shape[1] / shadows.sampled:.0f}"
    return [f"{case.shape[0]} x {case.shape[1]}", what, len(shadows.shadows), part, *cost.cells()], cost


def total(costs: Sequence[tuple[Case, Cost]]) -> list[object]:
    """The row of a whole model."""
    sums = [sum(case.count * getattr(cost, part) for case, cost in costs) for part in ("own", "step", "record", "snr")]
    return ["GPT-2 small", "all matrices", "", "", *Cost(*sums).cells()]


def main() -> None:
    parser = argparse.ArgumentParser(description="The probe's shadows of a tensor against its forward and backward.")
    parser.add_argument("--quick", action="store_true", help="tensors of an eighth, 64 tokens, one round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no CUDA device")
        return
    torch.set_num_threads(1)
    tokens, rounds = (64, 1) if options.quick else (TOKENS, 5)
    print(machine())
    print(f"shadows:  {options.device}, {tokens:,} tokens, float32; medians of {rounds}", end="\n\n")
    table = Rows(COLUMNS, (13, 25))
    table.start()
    costs = []
    for case in CASES:
        shape = (case.shape[0] // 8, case.shape[1] // 8) if options.quick else case.shape
        row, cost = measure(dataclasses.replace(case, shape=shape), tokens, options.device, rounds)
        table.add(row)
        costs.append((case, cost))
    table.add(total(costs))


if __name__ == "__main__":
    main()
