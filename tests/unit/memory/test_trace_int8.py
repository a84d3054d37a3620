"""A step with int8 weights: the estimate is the measurement, and weights cost what their bytes do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memadvise.errors import OptimizerError, PlanError
from memadvise.memory.estimate import estimate
from memadvise.memory.measure import measure_cpu
from memadvise.memory.session import fake_session
from memadvise.optim import Int8Weight, create_optimizer, quantize_weights
from memadvise.plan.schema import Plan, Rule, Setting
from memadvise.target import Target
from memadvise.whatif import trace_setting

SETTING = Setting("slimadam", {"axes": [1], "weights": "int8"})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 256)
        self.up = nn.Linear(256, 512)
        self.down = nn.Linear(512, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.embed(x)))).square().mean()


def in_int8() -> Net:
    model = Net()
    quantize_weights(model)
    return model


def _batches() -> list[Tensor]:
    return [torch.randint(0, 100, (8, 40))] * 2


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer(model, SETTING, lr=1e-3)


MATRICES = 100 * 256 + 2 * 512 * 256


def test_the_estimate_is_the_measurement() -> None:
    target = Target(build_model=in_int8, build_batches=_batches)
    measured, found = measure_cpu(target, optimizer=_optimizer), estimate(target, device="cpu", optimizer=_optimizer)
    assert abs(found.peak_bytes - measured.peak_bytes) <= 64  # 0-dim scalars of the step
    for category in ("weights", "gradients", "optimizer_state", "activations"):
        assert found.by_category[category] == measured.by_category[category]
    assert found.by_category["weights"] == MATRICES * (1 + 3 / 128) + 4 * 512
    assert found.by_category["gradients"] == 4 * (MATRICES + 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_floats_of_one_operation_are_counted(dtype: torch.dtype) -> None:
    """They are the peak where a matrix is large and the batch small: every phase is as measured."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 1024, bias=False), nn.Linear(1024, 1024, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)).float().square().mean()

    def build() -> nn.Module:
        model = Wide().to(dtype)
        quantize_weights(model)
        return model

    target = Target(build_model=build, build_batches=lambda: [torch.randn(4, 64, dtype=dtype)] * 2)
    measured, found = measure_cpu(target, optimizer=_optimizer), estimate(target, device="cpu", optimizer=_optimizer)
    for phase in ("forward", "backward", "step"):
        assert abs(found.phase(phase).peak_bytes - measured.phase(phase).peak_bytes) <= 64, phase
    floats = 1024 * 1024 * dtype.itemsize
    assert floats <= found.phase("forward").by_category["temporaries"] < 1.1 * floats


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_with_int8_weights_is_traced_as_it_will_run(device: str) -> None:
    target = Target(build_model=Net, build_batches=_batches)
    rules = (Rule("*.bias", "adamw"), Rule("**", SETTING.method, dict(SETTING.options)))
    of_plan = trace_setting(target, Plan(rules=rules), device=device, label="plan")
    direct = estimate(Target(build_model=in_int8, build_batches=_batches), device=device, optimizer=_optimizer)
    assert of_plan.peak_bytes == direct.peak_bytes
    assert of_plan.by_category == direct.by_category
    assert of_plan.by_module == direct.by_module
    floats = trace_setting(target, Setting("slimadam", {"axes": [1]}), device=device, label="plan")
    saved = floats.by_category["weights"] - of_plan.by_category["weights"]
    assert saved == pytest.approx(MATRICES * (3 - 3 / 128), abs=2048)


def test_a_model_that_was_built_elsewhere_is_copied_and_left_alone() -> None:
    elsewhere = in_int8()
    before = [p.detach().clone() for p in elsewhere.parameters()]
    target = Target(build_model=lambda: elsewhere, build_batches=_batches)
    with fake_session(target) as (model, _):
        assert isinstance(model.up.weight, Int8Weight)
        assert model.up.weight is not elsewhere.up.weight
    again = estimate(target, device="cpu", optimizer=_optimizer)
    fresh = estimate(Target(build_model=in_int8, build_batches=_batches), device="cpu", optimizer=_optimizer)
    assert again.peak_bytes == fresh.peak_bytes
    assert all(torch.equal(a, b) for a, b in zip(before, elsewhere.parameters(), strict=True))


def test_what_cannot_be_traced_says_so() -> None:
    with pytest.raises(OptimizerError, match="int8 weights cannot be changed in place"):  # torch.optim.AdamW
        estimate(Target(build_model=in_int8, build_batches=_batches))
    wrong = Plan(rules=(Rule("**", "adamw", {"weights": "int8"}),))
    with pytest.raises(PlanError, match=r"up.bias: weights: int8 is for matrices"):
        trace_setting(Target(build_model=Net, build_batches=_batches), wrong, device="cpu", label="plan")
