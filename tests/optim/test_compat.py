"""``compat: official`` is what the official codes do, on gradients with outliers and scale drift; and it is not always
what we do by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from reference import official
from torch import Tensor, nn

from memadvise.errors import OptimizerError
from memadvise.optim import AdamMini, SlimAdam
from memadvise.optim.executors import chunked
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import fitted, state_specs, validate
from memadvise.plan.schema import Setting

STEPS = 25
LR, DECAY, EPS = 1e-2, 0.1, 1e-6
BETAS = (0.9, 0.999)

Shape = tuple[int, ...]


def start(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.05


def gradients(shape: Shape) -> list[Tensor]:
    """Gaussian, growing and shrinking by a factor of 1000, outliers of 300 times the rest, some coordinates zero."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for t in range(STEPS):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        g = torch.where(torch.rand(shape, generator=generator) < 0.03, 300 * g, g)
        g = torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, g)
        found.append(g * 10.0 ** (3 * (t if t < 12 else 24 - t) / 12 - 3))
    return found


def follow(
    setting: Setting, shape: Shape, dtype: torch.dtype = torch.float32, executor: str | None = None
) -> list[Tensor]:
    p = nn.Parameter(start(shape).to(dtype))
    optimizer = MemadviseOptimizer(
        [("p", p)], {"p": setting}, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, executor=executor
    )
    seen = []
    for g in gradients(shape):
        p.grad = g.to(dtype)
        optimizer.step()
        seen.append(p.detach().double().clone())
    return seen


def difference(left: Sequence[Tensor], right: Sequence[Tensor], shape: Shape) -> float:
    """The largest difference at any step, relative to how far the parameter has come (RMS)."""
    found = []
    for a, b in zip(left, right, strict=True):
        found.append(((a - b).abs().max() / (b - start(shape)).square().mean().sqrt()).item())
    return max(found)


Theirs = Callable[[Tensor, list[Tensor]], list[Tensor]]


def slimadam(axes: list[int]) -> Theirs:
    return lambda p, gs: official.slimadam(p, gs, axes or None, lr=LR, betas=BETAS, eps=EPS, decay=DECAY)


def adam_mini(name: str, dim: int = 1, n_heads: int = 1) -> Theirs:
    return lambda p, gs: official.adam_mini(
        p, gs, name, dim=dim, n_heads=n_heads, lr=LR, betas=BETAS, eps=EPS, decay=DECAY
    )


def came(beta3: float = 0.9999) -> Theirs:
    return lambda p, gs: official.came(p, gs, lr=LR, betas=BETAS, beta3=beta3, decay=DECAY)


def mini(partition: str, **options: Any) -> Setting:
    return Setting("adam_mini", {"partition": partition, "compat": "official", **options})


HEADS = Setting("adam_mini", {"partition": "head", "heads": 4})

# (setting, shape, the official code, our default or None where the two are the same)
CASES: list[tuple[Setting, Shape, Theirs, Setting | None]] = [
    (Setting("slimadam", {"axes": [1], "compat": "official"}), (24, 10), slimadam([1]), None),
    (Setting("slimadam", {"axes": [0], "compat": "official"}), (24, 10), slimadam([0]), None),
    (Setting("slimadam", {"axes": [1, 2, 3], "compat": "official"}), (4, 3, 3, 3), slimadam([1, 2, 3]), None),
    (Setting("slimadam", {"axes": [], "compat": "official"}), (24, 10), slimadam([]), None),
    (Setting("slimadam", {"axes": [], "compat": "official"}), (24,), slimadam([]), Setting("adamw")),
    (
        Setting("slimadam", {"axes": [0], "compat": "official"}), (24,), slimadam([0]),
        Setting("slimadam", {"axes": [0]}),
    ),
    (mini("row"), (24, 10), adam_mini("mlp.weight"), None),
    (mini("row"), (24,), adam_mini("mlp.bias"), Setting("adamw")),
    (mini("whole"), (24,), adam_mini("norm.weight"), Setting("adam_mini", {"partition": "whole"})),
    (mini("whole"), (4, 3, 3, 3), adam_mini("conv.weight"), None),
    (mini("head", heads=4), (32, 32), adam_mini("q_proj", 32, 4), None),
    (mini("head", heads=4), (16, 32), adam_mini("k_proj", 32, 4), HEADS),
    (mini("head", heads=4), (64, 32), adam_mini("q_proj", 32, 4), HEADS),
    (
        Setting("adamw", {"compat": "official", "cautious": "official"}), (24, 10),
        lambda p, gs: official.c_adamw(p, gs, lr=LR, betas=BETAS, eps=EPS, decay=DECAY),
        Setting("adamw", {"cautious": True}),
    ),
    (
        Setting("lion", {"cautious": "paper"}), (24, 10),
        lambda p, gs: official.c_lion(p, gs, lr=LR, betas=BETAS, decay=DECAY),
        Setting("lion", {"cautious": True}),
    ),
    (Setting("came", {"compat": "official"}), (24, 10), came(), None),
    (Setting("came", {"compat": "official", "beta3": 0.99}), (1, 7), came(0.99), None),
    (Setting("came", {"compat": "official"}), (24,), came(), None),
    (Setting("came", {"compat": "official"}), (4, 3, 3, 3), came(), Setting("came")),
    (Setting("came", {"compat": "official"}), (3, 8, 5), came(), Setting("came")),
]  # fmt: skip
IDS = [f"{setting.key}-{list(shape)}" for setting, shape, _, _ in CASES]


@pytest.mark.parametrize(("setting", "shape", "theirs", "default"), CASES, ids=IDS)
def test_compat_is_the_official_code(
    setting: Setting, shape: Shape, theirs: Theirs, default: Setting | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = theirs(start(shape), gradients(shape))
    for executor in ("eager", "chunked"):
        assert difference(follow(setting, shape, torch.float64, executor), expected, shape) < 1e-10
        single = theirs(start(shape).float(), [g.float() for g in gradients(shape)])
        assert difference(follow(setting, shape, torch.float32, executor), single, shape) < 1e-5
    monkeypatch.setattr(chunked, "CPU_ELEMENTS", 40)
    assert difference(follow(setting, shape, torch.float64, "chunked"), expected, shape) < 1e-10
    plain = default or Setting(setting.method, {k: v for k, v in setting.options.items() if k != "compat"})
    if plain.options.get("axes") == []:
        plain = Setting("adamw")
    if default is None:
        assert difference(follow(plain, shape, torch.float64), expected, shape) < 1e-10
    else:
        assert difference(follow(plain, shape, torch.float64), expected, shape) > 1e-3


def test_each_part_of_c_adamw_differs_from_ours() -> None:
    """eps placement and mask scale apart."""
    shape = (24, 10)
    expected = official.c_adamw(start(shape), gradients(shape), lr=LR, betas=BETAS, eps=EPS, decay=DECAY)
    for options in ({"cautious": "official"}, {"compat": "official", "cautious": True}):
        assert difference(follow(Setting("adamw", options), shape, torch.float64), expected, shape) > 1e-5


def test_a_model_with_compat_keeps_its_vectors_as_the_official_code_does() -> None:
    vector, matrix = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(4, 4))
    for make, options, expected in (
        (SlimAdam, {}, "slimadam(axes=[], compat=official)"),
        (AdamMini, {"partition": "head", "heads": 4}, "adam_mini(compat=official, partition=row)"),
    ):
        optimizer = make([vector, matrix], lr=0.25, weight_decay=0.1, compat="official", **options)
        assert optimizer.memory()[0].setting == expected
        for p in (vector, matrix):
            p.data.fill_(1)
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert torch.equal(vector, torch.ones(12))
        torch.testing.assert_close(matrix, torch.full((4, 4), 0.975))
        assert [m.setting for m in make([vector], **options).memory()] == ["adamw"]
    common = fitted(Setting("slimadam", {"axes": [1], "compat": "official", "cautious": True}), (12,))
    assert common == Setting("slimadam", {"axes": [], "compat": "official", "cautious": True})


def test_head_blocks_of_the_official_code() -> None:
    """One a head, of grouped keys, too; another number where head_dim is not dim / heads."""
    for dim, heads, rows, blocks in ((32, 4, 32, 4), (32, 4, 16, 2), (32, 4, 64, 8), (896, 14, 128, 2)):
        specs = state_specs(mini("head", heads=heads), (rows, dim))
        assert specs["exp_avg_sq"].shape == (blocks, 1)


@pytest.mark.parametrize(
    ("setting", "shape", "words"),
    [
        (Setting("slimadam", {"axes": [1], "compat": "paper"}), (4, 4), "compat should be official"),
        (Setting("adam_mini", {"compat": True}), (4, 4), "compat should be official"),
        (mini("column"), (4, 4), "the official code has no such partition"),
        (mini("row", axis=1), (4, 4), "the official code has no such axis"),
        (mini("row", segments=[[0, 4, 2]]), (4, 4), "the official code has no such segments"),
        (mini("row"), (4, 3, 3, 3), r"does not cut the shape \[4, 3, 3, 3\]"),
        (mini("head", heads=3), (9, 8), r"\[9, 8\] does not divide in blocks of the official code, 8 / 3 rows each"),
        (mini("head", heads=2), (8,), r"\[8\] does not divide in blocks"),
        (Setting("slimadam", {"axes": []}), (4, 4), "axes is empty"),
    ],
)
def test_what_compat_does_not_go_with(setting: Setting, shape: Shape, words: str) -> None:
    with pytest.raises(OptimizerError, match=words):
        validate(setting, shape, name="p")
