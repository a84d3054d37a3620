"""What every method must do with its state: made on the first step, in float32, saved, loaded, resumed bit for bit."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SETTINGS, Case, every_dtype, every_setting
from torch import nn
from toy import Toy, optimizer_for, same, train, weights

from memadvise.errors import OptimizerError
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import fitted, state_specs
from memadvise.plan.schema import Setting

# ---------------------------------------------------------------- state


@every_dtype
@every_setting
def test_state_is_lazy_complete_and_of_tensors_only_with_moments_in_fp32(
    case: Case, setting: Setting, dtype: torch.dtype
) -> None:
    model = Toy().to(dtype)
    optimizer = optimizer_for(model, setting, case.lr)
    assert len(optimizer.state) == 0  # T3: distributed checkpoints prime an optimizer only if it has no state
    train(model, optimizer, 1)
    for p in model.parameters():
        specs = state_specs(fitted(setting, tuple(p.shape)), tuple(p.shape), dtype)
        state = optimizer.state[p] if specs else {}
        assert list(state) == list(specs)
        for name, spec in specs.items():
            assert isinstance(state[name], torch.Tensor)
            assert (tuple(state[name].shape), state[name].dtype) == (spec.shape, spec.dtype)
            assert spec.dtype == torch.float32 or not (spec.elementwise or spec.moment)


@every_dtype
@every_setting
def test_load_keeps_dtypes_and_values_and_copies(case: Case, setting: Setting, dtype: torch.dtype) -> None:
    model = Toy().to(dtype)
    optimizer = optimizer_for(model, setting, case.lr)
    train(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())  # T2: what accelerate does to an optimizer it prepares
    other = copy.deepcopy(model)
    loaded = optimizer_for(other, setting, lr=9.0)
    loaded.load_state_dict(before)
    for result in (optimizer.state_dict(), loaded.state_dict()):
        assert result["state"].keys() == before["state"].keys()
        for index, state in before["state"].items():
            for name, value in state.items():
                again = result["state"][index][name]
                assert again.dtype == value.dtype
                assert torch.equal(again, value)
        assert result["param_groups"] == before["param_groups"]
    train(other, loaded, 2, first=3)
    assert all(
        torch.equal(value, before["state"][index][name])
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    ), "loading must copy: training on changed the state that was loaded from"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[torch.Tensor]]]:
    """Ten steps without a break, and a checkpoint after five continued in one fresh process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("resume")
    expected = {}
    for number, (case, setting) in enumerate(SETTINGS):
        for dtype in (torch.float32, torch.bfloat16):
            model = Toy().to(dtype)
            optimizer = optimizer_for(model, setting, case.lr)
            train(model, optimizer, 5)
            name = f"{number}-{str(dtype).removeprefix('torch.')}"
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"{name}.pt")
            train(model, optimizer, 5, first=5)
            expected[name] = weights(model)
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "resume_child.py"), str(folder)]
    subprocess.run(command, check=True, env=environment, timeout=300)
    return folder, expected


@every_dtype
@every_setting
def test_resume_in_a_fresh_process_is_bit_for_bit(
    case: Case, setting: Setting, dtype: torch.dtype, resumed: tuple[Path, dict[str, list[torch.Tensor]]]
) -> None:
    folder, expected = resumed
    name = f"{SETTINGS.index((case, setting))}-{str(dtype).removeprefix('torch.')}"
    assert same(expected[name], torch.load(folder / f"{name}.out", weights_only=True))


@every_setting
def test_deepcopy_and_pickle_continue_alike_and_apart(case: Case, setting: Setting) -> None:
    model = Toy()
    optimizer = optimizer_for(model, setting, case.lr)
    train(model, optimizer, 2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    loaded, loaded_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, 2, first=2)
    middle = weights(twin)
    assert not same(middle, weights(model))
    for other, other_optimizer in ((twin, twin_optimizer), (loaded, loaded_optimizer)):
        train(other, other_optimizer, 2, first=2)
        assert same(weights(other), weights(model))
        assert other_optimizer.memory() == optimizer.memory()


@every_setting
def test_state_of_another_setting_is_refused_by_name(case: Case, setting: Setting) -> None:
    other = Setting("lion") if setting.method != "lion" else Setting("adamw")
    model = Toy()
    optimizer = optimizer_for(model, setting, case.lr)
    train(model, optimizer, 1)
    target = optimizer_for(Toy(), other, case.lr)
    with pytest.raises(OptimizerError, match=r"^embed was trained with .*, this optimizer uses"):
        target.load_state_dict(optimizer.state_dict())
    assert len(target.state) == 0
    state_dict = optimizer.state_dict()
    if not state_dict["state"]:
        return  # nothing to compare without the settings
    del state_dict["memadvise"]  # tools that rebuild a state dict keep only torch's two keys
    with pytest.raises(OptimizerError, match="not the state of embed"):
        target.load_state_dict(state_dict)


def test_settings_that_mean_the_same_load() -> None:
    model = Toy()
    optimizer = optimizer_for(model, Setting("slimadam", {"axes": [0, 1]}), 1e-2)
    train(model, optimizer, 1)
    optimizer_for(Toy(), Setting("slimadam", {"axes": (1, 0)}), 1e-2).load_state_dict(optimizer.state_dict())


def test_a_newer_format_and_other_groups_are_refused() -> None:
    optimizer = optimizer_for(Toy(), Setting("adamw"), 1e-2)
    state_dict = optimizer.state_dict()
    with pytest.raises(OptimizerError, match="format 99"):
        optimizer.load_state_dict({**state_dict, "memadvise": {"format": 99, "settings": {}}})
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict({**state_dict, "param_groups": []})


def test_torch_adamw_state_loads_where_it_fits_and_fails_with_a_sentence_elsewhere() -> None:
    model = Toy()
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    train(model, theirs, 3)
    twin = copy.deepcopy(model)
    ours = optimizer_for(twin, Setting("adamw"), lr=1.0)
    ours.load_state_dict(theirs.state_dict())
    train(model, theirs, 3, first=3)
    train(twin, ours, 3, first=3)
    assert same(weights(model), weights(twin))
    slim = optimizer_for(Toy(), Setting("slimadam", {"axes": [1]}), lr=1.0)
    with pytest.raises(OptimizerError, match=r"not the state of embed: its exp_avg_sq has shape \[16, 12\]"):
        slim.load_state_dict(theirs.state_dict())


def test_state_in_another_order_of_parameters_is_refused() -> None:
    """State goes by position: with the layers swapped, every shape fits and every moment is another's."""
    layers = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    optimizer = optimizer_for(layers, Setting("adamw"), 1e-2)
    swapped = MemadviseOptimizer(reversed(list(layers.named_parameters())), Setting("adamw"), lr=1e-2)
    with pytest.raises(OptimizerError, match=r"another order: first.weight where this optimizer has second.bias"):
        swapped.load_state_dict(optimizer.state_dict())
    renamed = MemadviseOptimizer([(f"ema.{name}", p) for name, p in layers.named_parameters()], Setting("adamw"), lr=1)
    renamed.load_state_dict(optimizer.state_dict())  # other names altogether say nothing about the order


def test_load_hooks_of_the_user_see_and_may_change_the_state() -> None:
    model = Toy()
    optimizer = optimizer_for(model, Setting("adamw"), 1e-2)
    train(model, optimizer, 2)
    target = optimizer_for(Toy(), Setting("adamw"), 1e-2)

    def reset_steps(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        states = {i: {**s, "step": torch.tensor(41.0)} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": states}

    seen = []
    target.register_load_state_dict_pre_hook(reset_steps)
    target.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    target.load_state_dict(optimizer.state_dict())
    assert seen == [len(optimizer.state)]
    assert {float(s["step"]) for s in target.state.values()} == {41.0}
