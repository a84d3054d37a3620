"""Golden checks of cautious updates (arXiv 2411.16085) and cautious weight decay (2510.12402): algorithms_b 3.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_golden_slimadam import stream
from torch import Tensor, nn

from memadvise.errors import OptimizerError
from memadvise.optim.compose import CAUTION, Compose
from memadvise.optim.executors import chunked, eager
from memadvise.optim.executors.work import Work
from memadvise.optim.method import Hyper
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.recipe import make_recipe
from memadvise.optim.registry import method_info, validate
from memadvise.plan.schema import Setting

START = torch.linspace(-1, 1, 24 * 10, dtype=torch.float64).reshape(24, 10)
BASES = [
    Setting("adamw"),
    Setting("lion"),
    Setting("slimadam", {"axes": [1]}),
    Setting("sgd", {"momentum": 0.9}),
]
every_base = pytest.mark.parametrize("base", BASES, ids=lambda s: s.method)
every_mode = pytest.mark.parametrize("mode", CAUTION)
MOMENTS = {"sgd": "momentum_buffer"}  # the others call it exp_avg


def with_(base: Setting, **options: Any) -> Setting:
    return Setting(base.method, {**base.options, **options})


@pytest.fixture(params=["eager", "chunked", "boxes"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whole tensors, and boxes: one, or many of a few rows."""
    if request.param == "boxes":
        monkeypatch.setattr(chunked, "CPU_ELEMENTS", 50)
    return "eager" if request.param == "eager" else "chunked"


class Run:
    """One parameter stepped by a setting."""

    def __init__(
        self,
        setting: Setting,
        start: Tensor = START,
        *,
        lr: float = 1e-2,
        decay: float = 0.0,
        executor: str = "chunked",
    ) -> None:
        self.setting, self.p = setting, nn.Parameter(start.clone())
        self.optimizer = MemadviseOptimizer(
            [("p", self.p)], {"p": setting}, lr=lr, weight_decay=decay, executor=executor
        )

    def step(self, g: Tensor) -> Tensor:
        """The weights' change."""
        before = self.p.detach().clone()
        self.p.grad = g.to(self.p.dtype)
        self.optimizer.step()
        return self.p.detach() - before

    def remember(self, value: Tensor) -> None:
        """Make the state (by a step of zeros) and let the first moment be ``value``."""
        self.step(torch.zeros_like(self.p))
        self.optimizer.state[self.p][MOMENTS.get(self.setting.method, "exp_avg")].copy_(value)


@every_base
def test_3_5_1_the_first_step_is_the_methods_own(base: Setting, executor: str) -> None:
    (g,) = stream((24, 10), 1)
    assert (g != 0).all()
    plain = Run(base, executor=executor).step(g)
    for mode in (True, "support", "official"):
        torch.testing.assert_close(
            Run(with_(base, cautious=mode), executor=executor).step(g), plain, rtol=1e-12, atol=0
        )
    # the paper's N / (kept + 1) is a little less than one where all is kept
    paper = Run(with_(base, cautious="paper"), executor=executor).step(g)
    torch.testing.assert_close(paper, plain * 240 / 241, rtol=1e-12, atol=1e-15)


@every_base
def test_3_5_2_half_that_disagrees_rests_and_the_other_half_moves_twice(base: Setting, executor: str) -> None:
    g = torch.ones(24, 10, dtype=torch.float64)
    g[:, ::2] = -1
    for mode, factor in (("support", 2.0), ("official", 2.0), ("paper", 240 / 121)):
        runs = [Run(setting, decay=0.1, executor=executor) for setting in (base, with_(base, cautious=mode))]
        for run in runs:
            run.remember(torch.ones(24, 10, dtype=torch.float64) * 4)
        before = runs[1].p.detach().clone()
        plain, cautious = (run.step(g) for run in runs)
        decay = -1e-2 * 0.1 * before
        torch.testing.assert_close(cautious[:, ::2], decay[:, ::2], rtol=1e-9, atol=1e-15)
        torch.testing.assert_close((cautious - decay)[:, 1::2], factor * (plain - decay)[:, 1::2], rtol=1e-9, atol=0)


@every_mode
@every_base
def test_3_5_3_no_coordinate_moves_against_its_gradient(base: Setting, mode: str, executor: str) -> None:
    run = Run(with_(base, cautious=mode), executor=executor)
    disagreed = 0
    for g in stream((24, 10), 30):
        delta = run.step(g)
        assert (delta * g <= 0).all()
        disagreed += int((delta == 0).sum())
    assert disagreed > 50  # caution did act


def test_3_5_4_updates_of_one_size_keep_their_sum(executor: str) -> None:
    """Lion's |u| is constant: what is dropped is made up for exactly, in the paper's form but for its + 1."""
    for mode in CAUTION:
        run, plain = Run(with_(BASES[1], cautious=mode), executor=executor), Run(BASES[1], executor=executor)
        for g in stream((24, 10), 10):
            applied, proposed = run.step(g).abs(), plain.step(g).abs()
            kept = int((applied > 0).sum())
            assert 0 < kept <= 240
            expected = proposed.sum() * (kept / (kept + 1) if mode == "paper" else 1)
            torch.testing.assert_close(applied.sum(), expected, rtol=1e-9, atol=0)


@every_mode
@every_base
def test_3_5_5_nothing_agrees_nothing_moves(base: Setting, mode: str, executor: str) -> None:
    run = Run(with_(base, cautious=mode), executor=executor)
    run.remember(torch.full((24, 10), 100.0, dtype=torch.float64))
    assert torch.equal(run.step(torch.full((24, 10), -1e-3)), torch.zeros(24, 10, dtype=torch.float64))
    assert torch.isfinite(run.p).all()


@every_base
def test_3_5_6_one_touched_row_of_a_thousand(base: Setting, executor: str) -> None:
    g = torch.zeros(1000, 8, dtype=torch.float64)
    g[3] = torch.linspace(0.5, 1, 8)
    start = torch.zeros(1000, 8, dtype=torch.float64)
    plain = Run(base, start, executor=executor).step(g)
    for mode, factor in (("support", 1.0), ("official", 1000.0), ("paper", 8000 / 9)):
        delta = Run(with_(base, cautious=mode), start, executor=executor).step(g)
        torch.testing.assert_close(delta[3], plain[3] * factor, rtol=1e-12, atol=0)
        assert not delta[:3].any()
        assert not delta[4:].any()


@pytest.mark.parametrize("step", [eager.step, chunked.step], ids=["eager", "chunked"])
def test_3_5_7_without_momentum_it_is_a_no_op_and_refused_as_such(step: Callable[[list[Work], Hyper], None]) -> None:
    sgd = method_info("sgd").method
    options = sgd.options_type(momentum=0)  # type: ignore[call-arg]
    seen = []
    for compose in (Compose(), Compose(cautious=True)):  # past the check that refuses it
        p = START.clone()
        for g in stream((24, 10), 5):
            step(
                [Work(p, g, {}, make_recipe(sgd, options, (24, 10), torch.float64, compose))], Hyper(0.1, 0, 0, 0, 0.1)
            )
        seen.append(p)
    assert torch.equal(*seen)
    for setting in (
        Setting("sgd", {"momentum": 0, "cautious": True}),
        Setting("adafactor", {"cautious": True}),
    ):
        with pytest.raises(OptimizerError, match="cautious would do nothing: the update of"):
            validate(setting, (24, 10), name="p")


@every_base
def test_3_5_8_cautious_decay_only_where_the_update_shrinks_the_weight(base: Setting, executor: str) -> None:
    start = START.clone()
    start[5] = 0
    (g,) = stream((24, 10), 1)
    plain = Run(base, start, executor=executor).step(g)
    decayed = Run(with_(base, cautious_decay=True), start, decay=0.5, executor=executor).step(g)
    shrinks = (-plain).sign() * start.sign() >= 0  # u theta >= 0
    assert 60 < int(shrinks.sum()) < 180
    torch.testing.assert_close(decayed[~shrinks], plain[~shrinks], rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(decayed[shrinks], (plain - 1e-2 * 0.5 * start)[shrinks], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(decayed[5], plain[5], rtol=1e-12, atol=1e-16)
    assert torch.isfinite(decayed).all()


# ---------------------------------------------------------------- pitfalls (3.3)


@every_base
def test_both_cautions_together_decay_by_the_update_before_it_is_masked(base: Setting, executor: str) -> None:
    run = Run(with_(base, cautious=True, cautious_decay=True), decay=0.5, executor=executor)
    run.remember(torch.ones(24, 10, dtype=torch.float64) * 4)  # u > 0: decay where p >= 0, also where u is dropped
    before = run.p.detach().clone()
    delta = run.step(-torch.ones(24, 10, dtype=torch.float64))
    torch.testing.assert_close(delta, torch.where(before >= 0, -1e-2 * 0.5 * before, 0.0), rtol=1e-9, atol=1e-16)


@every_base
def test_products_that_underflow_still_agree(base: Setting, executor: str) -> None:
    """u g is below the smallest float32 for gradients of 1e-23; their signs are not."""
    start, g = START.float(), torch.full((24, 10), 1e-23)
    plain = Run(base, start, executor=executor, lr=1.0)
    cautious = Run(with_(base, cautious=True), start, executor=executor, lr=1.0)
    for _ in range(2):
        assert torch.equal(plain.step(g), cautious.step(g))


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counts_of_many_ones_are_not_rounded(mode: str, dtype: torch.dtype) -> None:
    """A mask summed or averaged in bfloat16 stops at 256, or keeps 8 bits of the mean."""
    start, g = torch.zeros(300, 100, dtype=dtype), torch.ones(300, 100, dtype=dtype)
    g.view(-1)[: 10000 + 77] = -1
    run = Run(with_(BASES[1], cautious=mode), start, lr=1.0)
    run.remember(torch.full((300, 100), 50.0))
    delta = run.step(g).view(-1)[-1].float()
    kept = 30000 - 10077
    expected = -(30000 / (kept + 1) if mode == "paper" else 30000 / kept)
    torch.testing.assert_close(delta, torch.tensor(expected).to(dtype).float(), rtol=1e-6, atol=0)


@every_base
def test_zero_gradients_do_not_drift_one_way(base: Setting, executor: str) -> None:
    """Comparing sign bits would let updates of one sign pass where the gradient is 0."""
    run = Run(with_(base, cautious=True), executor=executor)
    run.remember(torch.where(START > 0, 1.0, -1.0).double())
    for zero in (0.0, -0.0):
        assert not run.step(torch.full((24, 10), zero)).any()


@every_base
def test_a_nan_passes_as_it_does_without_caution(base: Setting, executor: str) -> None:
    """As in torch the weight becomes NaN; a frozen weight beside NaN state would say nothing. (A sign of NaN is 0.)"""
    g = torch.ones(24, 10)
    g[3, 4] = float("nan")
    runs = [Run(base, executor=executor), Run(with_(base, cautious=True), executor=executor)]
    for run in runs:
        run.step(g)
    assert torch.equal(*(run.p.isnan() for run in runs))
    assert bool(runs[0].p[3, 4].isnan()) == (base.method != "lion")


@pytest.mark.parametrize(
    ("base", "shape"),
    [(base, shape) for base in BASES for shape in ((), (1,), (5, 1)) if base.method != "slimadam" or len(shape) > 1],
    ids=str,
)
def test_tiny_tensors_stay_finite(base: Setting, shape: tuple[int, ...], executor: str) -> None:
    for mode in CAUTION:
        run = Run(with_(base, cautious=mode), torch.ones(shape), executor=executor)
        for number in range(6):
            run.step(torch.full(shape, (-1.0) ** number))
        assert torch.isfinite(run.p).all()
