"""Every switch, traced on fake tensors, against torch.profiler's allocator events of the step that runs so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memadvise.errors import OptimizerError, UsageError
from memadvise.ledger import MemoryLedger
from memadvise.memory.estimate import estimate
from memadvise.memory.measure import measure_cpu
from memadvise.optim.create import create_optimizer, hold_weights
from memadvise.optim.registry import state_bytes
from memadvise.plan.schema import WEIGHT_FORMS, Plan, Rule, Setting, Switches
from memadvise.target import Target
from memadvise.whatif import trace_setting

TOLERANCE = 0.001


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Tower(nn.Module):
    """Tokens in, tied embedding out; float inputs beside them, which bfloat16 weights have to be given in bfloat16."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(300, width)
        self.lift = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 300, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.lift(features)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randint(300, (8, 32)), torch.randn(8, 32, 8)) for _ in range(2)]


TARGET = Target(build_model=Tower, build_batches=batches, spec="tower")


def both(plan: Plan | Setting, switches: Switches, target: Target = TARGET) -> tuple[MemoryLedger, MemoryLedger]:
    ways = {
        "prepare": lambda model: hold_weights(model, plan, switches=switches),
        "optimizer": lambda model: create_optimizer(model, plan, lr=1e-3, switches=switches),
        "switches": switches,
    }
    return estimate(target, device="cpu", **ways), measure_cpu(target, **ways)


def same(traced: MemoryLedger, measured: MemoryLedger) -> None:
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, rel=TOLERANCE)
    assert traced.peak_phase == measured.peak_phase
    for phase in measured.phases:
        assert traced.phase(phase.phase).peak_bytes == pytest.approx(phase.peak_bytes, rel=TOLERANCE), phase.phase
    assert traced.state_bytes == measured.state_bytes
    assert traced.switches == measured.switches


SWITCHES = {
    "release": Switches(gradient_release=True),
    "release, checkpoint": Switches(1, ("blocks.*",), True),
    **{form: Switches(weights=form) for form in WEIGHT_FORMS},
    "int8, release, checkpoint": Switches(1, ("blocks.*",), True, "int8"),
    "int8, micro-batches": Switches(2, weights="int8"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_traced_switch_is_the_measured_one(name: str) -> None:
    same(*both(Setting("adamw"), SWITCHES[name]))


def test_released_gradients_are_never_alive_together() -> None:
    wide = Target(
        build_model=lambda: Tower(256), build_batches=lambda: [(torch.randint(300, (2, 4)), torch.randn(2, 4, 8))] * 2
    )
    kept, _ = both(Setting("adamw"), Switches(), wide)
    released, measured = both(Setting("adamw"), Switches(gradient_release=True), wide)
    same(released, measured)
    largest, everything = 4 * 256 * 1024, released.by_category["weights"]
    assert kept.phase("step").by_category["gradients"] == everything
    assert released.by_category["gradients"] <= 2 * largest  # one, and the tied one that waits for its second part
    assert kept.peak_bytes - released.peak_bytes > 0.8 * (everything - 2 * largest)


def test_the_weights_switch_counts_as_its_rules_would() -> None:
    switched, _ = both(Setting("adamw"), Switches(weights="ecc8"))
    expected = sum(
        state_bytes(Setting("adamw", {"weights": "ecc8"}), p.shape, torch.bfloat16) for p in Tower().parameters()
    )
    assert switched.state_bytes == expected
    own = Plan(
        rules=(Rule("tokens.weight", "adamw", {"weights": "nearest"}), Rule("**", "adamw")),
        switches=Switches(weights="int8"),
    )
    traced, measured = both(own, own.switches)
    same(traced, measured)
    assert traced.weights == "int8"
    assert traced.by_module["tokens"]["weights"] == 4 * 300 * 64  # its own rule stands


def _clipping(model, batch, optimizer):  # type: ignore[no-untyped-def]
    model(*batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _accumulating(model, batch, optimizer):  # type: ignore[no-untyped-def]
    for part in (slice(0, 4), slice(4, 8)):
        model(batch[0][part], batch[1][part]).backward()
    optimizer.step()
    optimizer.zero_grad()


def _plain(model, batch, optimizer):  # type: ignore[no-untyped-def]
    model(*batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_release_in_a_step_of_the_users_own() -> None:
    own = replace(TARGET, train_step=_plain)
    same(*both(Setting("adamw"), Switches(gradient_release=True), own))
    refused = {_clipping: "linalg_vector_norm.default cannot have it", _accumulating: "a second gradient"}
    for train_step, words in refused.items():
        with pytest.raises(OptimizerError, match=words):
            trace_setting(
                replace(TARGET, train_step=train_step), Setting("adamw"), device="cpu", label="x",
                switches=Switches(gradient_release=True),
            )  # fmt: skip


def test_release_by_an_optimizer_that_cannot_is_refused() -> None:
    for run in (estimate, measure_cpu):
        with pytest.raises(UsageError, match="AdamW does not step inside backward"):
            run(TARGET, switches=Switches(gradient_release=True))


def test_a_model_made_elsewhere_is_not_touched_by_a_trace() -> None:
    model = Tower()
    target = replace(TARGET, build_model=lambda: model)
    for form in ("int8", "bf16"):
        trace_setting(target, Setting("adamw"), device="cpu", label="x", switches=Switches(weights=form))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(type(p) is nn.Parameter for p in model.parameters())
