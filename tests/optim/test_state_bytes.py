"""Predicted bytes are the real bytes, for every method, shape and dtype; and the closed forms of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, all_settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reference import adam

from memadvise.errors import OptimizerError
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import DENSE, METHODS, fitted, problems_of, state_bytes, state_specs
from memadvise.plan.schema import Setting

SHAPES = [
    (), (1,), (7,), (4097,), (5, 1), (1, 5), (64, 48), (48, 64), (128, 100), (3, 8, 5), (4, 3, 3, 3), (0, 4), (4, 0),
]  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def real_bytes(optimizer: MemadviseOptimizer) -> int:
    return sum(v.numel() * v.itemsize for state in optimizer.state.values() for v in state.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("case", "setting"), all_settings(), ids=lambda x: x.key if isinstance(x, Setting) else None)
def test_predicted_is_real(case: Case, setting: Setting, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    chosen = fitted(setting, shape)
    p = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    if problems_of(chosen, shape, name="p"):
        with pytest.raises(OptimizerError, match="p: "):
            MemadviseOptimizer([("p", p)], setting, lr=0.1)
        with pytest.raises(OptimizerError):
            state_bytes(chosen, shape)
        return
    optimizer = MemadviseOptimizer([("p", p)], setting, lr=0.1)
    predicted = state_bytes(chosen, shape, dtype)
    assert [m.state_bytes for m in optimizer.memory()] == [predicted]
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert real_bytes(optimizer) == predicted
    if dtype != torch.float64 and chosen == setting and math.prod(shape):
        assert predicted == state_bytes(chosen, shape) == case.state_bytes(shape, setting.options)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_axis_set_of_slimadam_keeps_one_value_a_slice(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, max_size=len(shape), unique=True))
    specs = state_specs(Setting("slimadam", {"axes": axes}), shape)
    assert torch.Size(specs["exp_avg_sq"].shape).numel() == len(adam.over_axes(shape, axes))
    assert specs["exp_avg"].shape == shape
    assert (specs["step"].shape, specs["step"].dtype) == ((), torch.float32)


def test_dense_is_what_torch_keeps() -> None:
    p = torch.nn.Parameter(torch.ones(13, 7))
    p.grad = torch.ones_like(p)
    theirs = torch.optim.AdamW([p])
    theirs.step()
    assert sum(v.numel() * v.itemsize for v in theirs.state[p].values()) == state_bytes(DENSE, (13, 7))


def test_the_table_says_what_a_method_costs() -> None:
    for info in METHODS:
        number, text = info.bytes_per_parameter.split(maxsplit=1)
        assert text.startswith("bytes a parameter")
        assert float(number) == pytest.approx(state_bytes(Setting(info.name), (2000, 2000)) / 2000**2, abs=0.01)
