"""Parameters that are not on the CPU, without such a device: "meta" tensors refuse to mix with the CPU's, as CUDA
tensors do, and a read of a number, for which a GPU would have to be waited for, is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, all_settings
from torch import nn
from toy import Toy

from memadvise.optim.method import device_type
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.plan.schema import Setting

every_setting = pytest.mark.parametrize(
    ("case", "setting"), all_settings(), ids=lambda x: x.key if isinstance(x, Setting) else None
)


def _elsewhere(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.empty(p.shape, device="meta", dtype=dtype)) for name, p in Toy().named_parameters()
    }


def _step(optimizer: MemadviseOptimizer, parameters: dict[str, nn.Parameter]) -> None:
    for p in parameters.values():
        p.grad = torch.empty_like(p)
    optimizer.step()


def _check_devices(optimizer: MemadviseOptimizer) -> None:
    """What steers the computation is on the CPU, everything else with its parameter."""
    for p, state in optimizer.state.items():
        for name, value in state.items():
            host = optimizer._resolved[p].specs[name].host
            assert value.device.type == ("cpu" if host else "meta")


@every_setting
@pytest.mark.parametrize("executor", ["eager", "chunked"])
@pytest.mark.parametrize(
    "lr", [1e-2, torch.tensor(1e-2), torch.empty((), device="meta")], ids=["float", "cpu", "device"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_mixes_no_devices_and_reads_nothing(
    case: Case, setting: Setting, executor: str, lr: Any, dtype: torch.dtype
) -> None:
    parameters = _elsewhere(dtype)
    optimizer = MemadviseOptimizer(parameters.items(), setting, lr=lr, weight_decay=0.1, executor=executor)
    for _ in range(2):
        _step(optimizer, parameters)
    _check_devices(optimizer)


@every_setting
def test_state_follows_the_parameter_when_it_is_loaded(case: Case, setting: Setting) -> None:
    parameters = _elsewhere(torch.float32)
    optimizer = MemadviseOptimizer(parameters.items(), setting, lr=case.lr)
    _step(optimizer, parameters)
    saved = optimizer.state_dict()
    other = _elsewhere(torch.float32)
    loaded = MemadviseOptimizer(other.items(), setting, lr=case.lr)
    loaded.load_state_dict(saved)
    _step(loaded, other)
    _check_devices(loaded)
    assert {float(state["step"]) for state in loaded.state.values() if "step" in state} <= {2.0}


def test_the_stand_in_does_what_it_is_here_for() -> None:
    p = torch.empty(3, device="meta")
    assert device_type(p) == "meta"
    with pytest.raises(RuntimeError):
        p + torch.ones(3)
    with pytest.raises(RuntimeError):
        p.sum().item()
