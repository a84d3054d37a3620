"""Every method with every codec on either moment, in every dtype: all executors agree with eager, the oracle.

The compiled executor is run as it was traced, without the compiler (test_compiled compiles a selection): what is
compiled is this graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import all_cases
from torch import Tensor, nn

from memadvise.optim.codecs.table import CODECS
from memadvise.optim.executors import chunked, compiled
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.recipe import make_recipe
from memadvise.optim.registry import list_methods, parse_setting, problems_of
from memadvise.plan.schema import Setting

SHAPE = (16, 128)
FORMS = (None, *CODECS)  # of a moment


def codings() -> Iterator[Setting]:
    for plain in (case.settings[0] for case in all_cases()):
        for first, second in itertools.product(FORMS, FORMS):
            moments = {"first_moment": first, "second_moment": second}
            coded = {moment: form for moment, form in moments.items() if form is not None}
            setting = Setting(plain.method, {**plain.options, **coded})
            if not problems_of(setting, SHAPE, name="p"):
                yield setting


def compilable(setting: Setting) -> bool:
    """On a GPU, that is; what a CPU looks up instead is compiled there."""
    parsed = parse_setting(setting)
    return compiled.supports(make_recipe(parsed.method, parsed.options, SHAPE, torch.float32, parsed.compose), "cuda")


SETTINGS = list(codings())
TRACED = [
    setting
    for setting in SETTINGS
    if len({setting.options.get("first_moment"), setting.options.get("second_moment")} - {None}) <= 1
    and compilable(setting)
]
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def run(setting: Setting, dtype: torch.dtype, executor: str) -> tuple[Tensor, MemadviseOptimizer]:
    """Two steps: the second one reads what the first one wrote."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(SHAPE, generator=generator).to(dtype))
    optimizer = MemadviseOptimizer([("p", p)], setting, lr=1e-2, weight_decay=0.1, executor=executor)
    for _ in range(2):
        p.grad = (torch.randn(SHAPE, generator=generator) * 0.1).to(dtype)
        optimizer.step()
    return p.detach(), optimizer


def agree(setting: Setting, dtype: torch.dtype, executor: str) -> None:
    slow, first = run(setting, dtype, "eager")
    quick, second = run(setting, dtype, executor)
    # Of 2048 codes rounded at random a few may fall the other way when the last bit of a sum is another one; a code is
    # a whole step of its moment away, and where a factor of the update hangs on it, so is the row.
    coded = bool({"first_moment", "second_moment"} & setting.options.keys())
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    tolerance = max(tolerance, 2e-6) if coded else tolerance  # moments in fewer bits are computed with in fp32
    near = (quick.double() - slow.double()).abs() <= tolerance * (1 + slow.double().abs())
    assert near.double().mean() >= (0.99 if coded else 1.0), (quick.double() - slow.double()).abs().max()
    held, other = (dict(optimizer.state_dict()["state"][0]) for optimizer in (first, second))
    assert {k: v.dtype for k, v in held.items()} == {k: v.dtype for k, v in other.items()}
    assert {k: v.shape for k, v in held.items()} == {k: v.shape for k, v in other.items()}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.key)
@every_dtype
def test_chunked(setting: Setting, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_ELEMENTS", 300)  # boxes of two rows
    agree(setting, dtype, "chunked")


@pytest.mark.parametrize("setting", TRACED, ids=lambda s: s.key)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traced(setting: Setting, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "supports", lambda recipe, kind: True)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, fakes, **_: graph)
    compiled.forget()
    try:
        agree(setting, dtype, "compiled")
        assert not compiled._failures
        assert compiled._kernels
    finally:
        compiled.forget()


def test_the_matrix_is_not_empty() -> None:
    methods: dict[str, set[Any]] = {}
    for setting in SETTINGS:
        methods.setdefault(setting.method, set()).add(
            (setting.options.get("first_moment"), setting.options.get("second_moment"))
        )
    assert set(methods) == set(list_methods())
    assert len(methods["adamw"]) == len(FORMS) ** 2
