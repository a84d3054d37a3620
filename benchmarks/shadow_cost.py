"""What watching a tensor in the probe costs, relative to the tensor's own part of a training step.

    python benchmarks/shadow_cost.py [--quick] [--device cpu|cuda]

Where the probe records a step, it reads the second moment of every tensor: the SNR along every axis set, and how far
each candidate of the advisor would move AdamW's update (memadvise.probe.snr and fidelity, called as the runner calls
them). Beside it stands that tensor's forward and backward at 8,192 tokens: x @ W, the gradient of x and that of W; for
an embedding the lookup and its dense gradient. The probe records 5 of its 60 steps, which the last column counts in.
A ratio of at most 1 is wanted. Medians: CPU seconds of the process, one thread; on CUDA between events.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_support.output import Rows, machine
from bench_support.timing import seconds_of

from memadvise.advise.candidates import candidate_settings
from memadvise.ledger import Parameter
from memadvise.optim.registry import approximate_second_moment
from memadvise.plan.schema import Setting
from memadvise.probe.fidelity import fidelity
from memadvise.probe.snr import SnrTrajectory

TOKENS = 8192
RECORDED, STEPS = 5, 60  # of the probe as `memadvise scan` runs it
BETAS, EPS = (0.9, 0.999), 1e-8
COLUMNS = (
    "tensor", "what it is", "candidates", "step ms", "shadows ms", "ratio", "snr ms", "fidelity ms", "of it fixed",
    "a candidate", "in the probe",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One tensor; ``share`` of the tokens is timed, and the time divided by it: all of it is linear in tokens."""

    shape: tuple[int, int]
    role: str
    heads: int | None = None
    lookup: bool = False
    share: float = 1.0


CASES = (
    Case((768, 768), "attention_output"),
    Case((768, 768), "attention_query", heads=12),
    Case((2304, 768), "attention_qkv"),
    Case((3072, 768), "mlp_up"),
    Case((768, 3072), "mlp_down"),
    Case((50257, 768), "token_embedding", lookup=True),
    Case((50257, 768), "tied_embedding", share=1 / 32),
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


def candidates(case: Case) -> tuple[Setting, ...]:
    """What the advisor would weigh for such a tensor."""
    axes = {"fan_in": (1,), "fan_out": (0,)}
    size = 4 * case.shape[0] * case.shape[1]
    return candidate_settings(
        Parameter("weight", case.shape, "float32", size, True, case.role, "module", "Linear", **axes, heads=case.heads)
    )


def shadows(case: Case, device: str, settings: tuple[Setting, ...]) -> dict[str, Callable[[], object]]:
    """What the probe does with this tensor at a recorded step, and its parts."""
    m, v = torch.randn(case.shape, device=device) * 1e-3, torch.rand(case.shape, device=device) * 1e-6

    def distances(few: tuple[Setting, ...]) -> object:
        return fidelity(m, v, 30, BETAS, EPS, few, approximate=approximate_second_moment)

    return {
        "snr": lambda: SnrTrajectory().add(v),
        "fidelity": lambda: distances(settings),
        "fixed": lambda: distances(()),  # AdamW's own update, whatever it is compared with
    }


def milliseconds(step: Callable[[], object], device: str, rounds: int) -> float:
    """The median, after one call that warms up."""
    step()
    return 1000 * statistics.median(seconds_of(step, device, time.process_time) for _ in range(rounds))


def measure(case: Case, tokens: int, device: str, rounds: int) -> list[object]:
    """One row."""
    settings = candidates(case)
    timed = max(1, round(tokens * case.share))
    own = milliseconds(own_step(case, timed, device), device, rounds) * tokens / timed
    parts = {name: milliseconds(step, device, rounds) for name, step in shadows(case, device, settings).items()}
    whole = parts["snr"] + parts["fidelity"]
    each = (parts["fidelity"] - parts["fixed"]) / len(settings)
    what = case.role + (" (lookup)" if case.lookup else "")
    return [
        f"{case.shape[0]} x {case.shape[1]}", what, len(settings), own, whole, whole / own, parts["snr"],
        parts["fidelity"], parts["fixed"], each, whole / own * RECORDED / STEPS,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="The probe's statistics of a tensor against its forward and backward.")
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
    for case in CASES:
        shape = (case.shape[0] // 8, case.shape[1] // 8) if options.quick else case.shape
        table.add(measure(dataclasses.replace(case, shape=shape), tokens, options.device, rounds))


if __name__ == "__main__":
    main()
