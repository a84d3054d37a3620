"""The rows of the table of step times: parameters as GPT-2 has them, our methods on them, and the ratios to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memadvise.memory.tensors import state_bytes
from memadvise.optim.create import create_optimizer
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.plan.schema import Plan, Rule, Setting

WIDTH, HEADS = 768, 12
BLOCK_MATRICES = ("blocks.*.attn.*.weight", "blocks.*.mlp.*.weight")
NO_REFRESH = 1_000_000  # steps between two projections: more than any benchmark makes
MakeOptimizer = Callable[[nn.Module], Optimizer]


class Gpt2(nn.Module):
    """The parameters of a GPT-2 with a tied head, 124,439,808 at its default size; it has no forward pass.

    The names are those that the official Adam-mini looks for.
    """

    def __init__(self, *, width: int = WIDTH, blocks: int = 12, vocabulary: int = 50257, positions: int = 1024) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "attn": nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}),
                    "norm2": nn.LayerNorm(width),
                    "mlp": nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}),
                }
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: what it is called.
        make: an optimizer for a model.
        target: the ratio to torch's fused AdamW to reach on the CPU with one thread; None where none is set.
        period: steps after which the work repeats; that many are timed together, or the median would hide the
            expensive one.
    """

    name: str
    make: MakeOptimizer
    target: float | None = None
    period: int = 1


def torch_adamw(model: nn.Module, **options: bool) -> Optimizer:
    """Torch's own, with the hyper-parameters of every row."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, **options)


def _ours(model: nn.Module, plan: Plan | Setting, executor: str | None = None) -> Optimizer:
    return create_optimizer(model, plan, lr=1e-3, weight_decay=0.1, executor=executor)


def torch_rows() -> list[Row]:
    """What comes with torch."""
    return [
        Row("torch AdamW fused (against itself)", partial(torch_adamw, fused=True)),
        Row("torch AdamW for-loop", partial(torch_adamw, foreach=False)),
        Row("torch AdamW foreach", partial(torch_adamw, foreach=True)),
        *(
            Row(f"torch Adafactor {name}", partial(_torch_adafactor, foreach=foreach))
            for name, foreach in (("for-loop", False), ("foreach", True))
        ),
    ]


def _torch_adafactor(model: nn.Module, *, foreach: bool) -> Optimizer:
    return torch.optim.Adafactor(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=foreach)


def our_rows(dtype: torch.dtype, width: int = WIDTH) -> list[Row]:
    """Every bundled method. A row that forces an executor has its name at the end; others leave the choice to us."""
    rank = width // 4  # GaLore's and APOLLO's own choice: 192 of 768
    rows: list[Row] = []

    def add(
        name: str,
        plan: Plan | Setting,
        target: float | None = None,
        *,
        forced: dict[str, float | None] | None = None,
        free: bool = True,
        period: int = 1,
    ) -> None:
        if free:
            rows.append(Row(f"memadvise {name}", partial(_ours, plan=plan), target, period))
        for executor, own_target in (forced or {}).items():
            make = partial(_ours, plan=plan, executor=executor)
            rows.append(Row(f"memadvise {name} {executor}", make, own_target, period))

    both: dict[str, float | None] = {"chunked": 1.6}
    neither: dict[str, float | None] = {"compiled": None, "chunked": None}
    add("adamw", Setting("adamw"), 1.0, forced=neither)
    add("slimadam axes [1] (row means)", Setting("slimadam", {"axes": [1]}), 1.3, forced=both)
    add("slimadam axes [0] (column means)", Setting("slimadam", {"axes": [0]}), 1.3, forced=both)
    add("slimadam axes [0, 1]", Setting("slimadam", {"axes": [0, 1]}), 1.3, forced=both)
    add("adam_mini row", Setting("adam_mini", {"partition": "row"}), 1.3, forced=both)
    add("adam_mini heads", _adam_mini_heads(width), 1.3, forced=both)
    add("adam_mini column", Setting("adam_mini", {"partition": "column"}))
    add("adam_mini whole", Setting("adam_mini", {"partition": "whole"}))
    add(
        "slimadam [1] + int8",
        Setting("slimadam", {"axes": [1], "first_moment": "int8"}),
        1.3,
        forced={"chunked": None},
    )
    add("adafactor", Setting("adafactor"), 1.3, forced={"chunked": None})
    add("came", Setting("came"), 2.0, forced={"chunked": None})
    add("adamw cautious", Setting("adamw", {"cautious": True}), 1.6, forced={"chunked": None})
    for codec, target in (("int8", 2.0), ("dynamic8", 2.0), ("int4", None), ("bf16", None)):
        setting = Setting("adamw", {"first_moment": codec, "second_moment": codec})
        add(f"adamw {codec}", setting, target, forced={"chunked": None})
    add("apollo_mini", _hidden("apollo_mini", update_every=NO_REFRESH), 1.0)
    add("apollo gaussian", _hidden("apollo", rank=rank, update_every=NO_REFRESH), 7.0)
    add("apollo sketch", _hidden("apollo", rank=rank, projection="sketch", update_every=NO_REFRESH), 2.0)
    add("galore", _hidden("galore", rank=rank, stagger=False, update_every=NO_REFRESH), 9.0)
    for few in (4, 16):
        own = {"rank": few, "adapt_every": 0}
        add(f"adapprox rank {few}", Setting("adapprox", own))
        add(f"adapprox rank {few} every 4", Setting("adapprox", {**own, "refresh_every": 4}), 3.0, period=4)
        warm = {**own, "warm_start": True, "power_iterations": 2, "refresh_every": 4}
        add(f"adapprox rank {few} every 4, warm", Setting("adapprox", warm), 3.0, period=4)
    add("micro_adam", Setting("micro_adam"), 3.0)
    add("lion", Setting("lion"))
    add("sgd momentum 0.9", Setting("sgd", {"momentum": 0.9}))
    add("sgd momentum 0", Setting("sgd", {"momentum": 0.0}))
    add("rmsprop", Setting("rmsprop"))
    add("rmsprop factored", Setting("rmsprop", {"store": "factored"}))
    add("adagrad", Setting("adagrad"))
    if dtype is torch.bfloat16:
        for weights in ("stochastic", "ecc8"):
            add(f"adamw weights {weights}", Setting("adamw", {"weights": weights}))
    return rows


def _hidden(method: str, **options: Any) -> Plan:
    """A low-rank method on the blocks' matrices, and AdamW for embeddings, norms and biases, as its paper uses it."""
    return Plan((*(Rule(pattern, method, options) for pattern in BLOCK_MATRICES), Rule("**", "adamw")))


def _adam_mini_heads(width: int) -> Plan:
    """Adam-mini as its paper divides: heads of query and key, rows elsewhere (value too), norms and biases whole."""
    segments = [[0, width, HEADS], [width, 2 * width, HEADS], [2 * width, 3 * width, 0]]
    return Plan(
        (
            Rule("blocks.*.attn.qkv.weight", "adam_mini", {"partition": "head", "segments": segments}),
            Rule("**.bias", "adam_mini", {"partition": "whole"}),
            Rule("**norm*.weight", "adam_mini", {"partition": "whole"}),
            Rule("**", "adam_mini", {"partition": "row"}),
        )
    )


# ---------------------------------------------------------------- bytes


def moved_bytes(optimizer: Optimizer) -> int | None:
    """What one step has to read and write where nothing stays in a cache; None for optimizers that are not known.

    Parameters are read and written, gradients read, state read and written; and once more for each pass that a method
    cannot do without: statistics that are complete only when the whole tensor was seen.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, MemadviseOptimizer):
        return sum(map(sum, map(_of_parameter, params, optimizer.memory())))
    if type(optimizer) in (torch.optim.AdamW, torch.optim.SGD):
        weights = sum(p.numel() * p.itemsize for p in params)
        return 3 * weights + 2 * state_bytes(optimizer)
    return None


def _of_parameter(p: torch.Tensor, memory: Any) -> Iterator[int]:
    weights = p.numel() * p.itemsize
    method, _, options = memory.setting.partition("(")
    moment = 4 * p.numel()  # a first moment in float32
    yield 2 * memory.state_bytes
    matrix = p.ndim > 1
    if method == "micro_adam":  # writes a share of the weights; its error and ring buffer are in the state
        yield weights + 2 * weights // 10
    elif method == "galore" and matrix:  # the update is multiplied straight into the weights
        yield 3 * weights
    elif method == "came" and matrix:  # statistics, first moment, statistics of the residual, update
        yield 4 * weights + moment
    elif method == "adapprox" and matrix:
        yield 5 * weights
    else:
        again = matrix and (
            method in ("adafactor", "apollo", "apollo_mini")
            or (method == "rmsprop" and "factored" in options)
            or (method == "slimadam" and "axes=[1]" not in options)
            or (method == "adam_mini" and "row" not in options)
        )
        yield 3 * weights + again * weights
    if "cautious=True" in options:  # the mask's mean first: gradient and first moment
        yield weights + moment
