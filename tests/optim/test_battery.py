"""The cross-cutting battery of algorithms_b 6: ten checks of every method (its first setting) over shapes and dtypes.

The contract suite asks the same of a small model with all settings; here it is the shapes that are odd: scalars, one
element, single rows and columns, a convolution, both orientations, a size that no block divides, a wide matrix.
"""

from __future__ import annotations

import gc
import io
import math
import statistics
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import pytest
import torch
from cases import Case, all_cases, every_dtype
from test_executors import transient_bytes
from torch import Tensor, nn

from memadvise.optim import create_optimizer
from memadvise.optim.codecs.table import CODECS
from memadvise.optim.methods.blockmean import update_bound
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import fitted, problems_of, state_bytes
from memadvise.plan.schema import Setting

SHAPES = [(), (1,), (7,), (5, 1), (1, 5), (4, 3, 3, 3), (64, 48), (48, 64), (4097,), (128, 1000)]
Parameters = dict[str, nn.Parameter]
every_method = pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.method)


def parameters(case: Case, dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> Parameters:
    """One parameter of every shape that the setting fits; the names say the shapes."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for shape in shapes:
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
        name = "p" + "x".join(map(str, shape))
        if not problems_of(fitted(case.settings[0], shape), shape, name=name):
            made[name] = nn.Parameter(value.to(dtype))
    assert len(made) >= 4
    return made


def optimizer(case: Case, params: Parameters, lr: float, **arguments: float) -> MemadviseOptimizer:
    return MemadviseOptimizer(params.items(), case.settings[0], lr=lr, **{"weight_decay": 0.1, **arguments})


def random_gradients(params: Parameters, step: int, factor: float = 1.0) -> None:
    for number, p in enumerate(params.values()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * factor).to(p.dtype)


def same(left: Parameters, right: Parameters) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------- 1 finite


def one_hot(p: Tensor, step: int) -> Tensor:
    g = torch.zeros_like(p)
    g.view(-1)[-1] = 1
    return g


def zero_row(p: Tensor, step: int) -> Tensor:
    g = torch.ones_like(p)
    if p.ndim:
        g[p.shape[0] // 2] = 0
    return g


def constant(value: float, p: Tensor, step: int) -> Tensor:
    return torch.full_like(p, value)


GRADIENTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "zero": partial(constant, 0.0),
    "one-hot": one_hot,
    "1e-30": partial(constant, 1e-30),
    "1e+4": partial(constant, 1e4),
    "alternating": lambda p, step: torch.full_like(p, (-1.0) ** step),
    "zero row": zero_row,
    "constant": partial(constant, 1.0),
}


@every_dtype
@every_method
@pytest.mark.parametrize("kind", GRADIENTS)
def test_1_nothing_but_finite_numbers_after_20_steps(case: Case, dtype: torch.dtype, kind: str) -> None:
    params = parameters(case, dtype)
    made = optimizer(case, params, case.lr)
    for step in range(20):
        for p in params.values():
            p.grad = GRADIENTS[kind](p.detach(), step)
        made.step()
    for name, p in params.items():
        assert torch.isfinite(p).all(), name
        for key, value in made.state.get(p, {}).items():
            assert torch.isfinite(value).all(), (name, key)


# ---------------------------------------------------------------- 2 learning rate and decay


@every_dtype
@every_method
def test_2_lr_zero_moves_nothing_and_decay_alone_shrinks(case: Case, dtype: torch.dtype) -> None:
    params, untouched = parameters(case, dtype), parameters(case, dtype)
    made = optimizer(case, params, 0.0)
    for step in range(2):
        random_gradients(params, step)
        made.step()
    assert same(params, untouched)

    made = optimizer(case, params, 0.25)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    made.step()
    for name, p in params.items():
        expected = (untouched[name].float() * 0.975).to(dtype)
        torch.testing.assert_close(p.detach(), expected.detach(), rtol=torch.finfo(dtype).eps, atol=0)


# ---------------------------------------------------------------- 3 resume


@every_dtype
@every_method
def test_3_a_loaded_checkpoint_continues_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    params = parameters(case, dtype)
    made = optimizer(case, params, case.lr)
    for step in range(3):
        random_gradients(params, step)
        made.step()
    file = io.BytesIO()
    torch.save((made.state_dict(), {name: p.detach() for name, p in params.items()}), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    other = {name: nn.Parameter(weights[name]) for name in params}
    loaded = optimizer(case, other, 99.0)
    loaded.load_state_dict(state)
    for p, q in zip(params.values(), other.values(), strict=True):
        left, right = made.state.get(p, {}), loaded.state.get(q, {})
        assert {k: v.dtype for k, v in left.items()} == {k: v.dtype for k, v in right.items()}
    for step in range(3, 6):
        for both in (params, other):
            random_gradients(both, step)
        made.step()
        loaded.step()
    assert same(params, other)


# ---------------------------------------------------------------- 4 bytes


@pytest.fixture
def new_tensors() -> Iterator[Callable[[], list[Tensor]]]:
    """Every tensor that Python made since, wherever it hangs."""

    def found() -> list[Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]

    gc.freeze()  # what is there is not looked at
    yield found
    gc.unfreeze()


@every_dtype
@every_method
def test_4_state_is_the_closed_form_and_nothing_hangs_off_objects(
    case: Case, dtype: torch.dtype, new_tensors: Callable[[], list[Tensor]]
) -> None:
    setting, params = case.settings[0], parameters(case, dtype)
    made = optimizer(case, params, case.lr)
    for step in range(2):
        random_gradients(params, step)
        made.step()
    known = {id(v) for state in made.state.values() for v in state.values()}
    known |= {id(t) for p in params.values() for t in (p, p.grad)}
    tensors = new_tensors()
    assert known <= {id(o) for o in tensors}
    assert not [tuple(o.shape) for o in tensors if id(o) not in known]
    for p in params.values():
        shape = tuple(p.shape)
        real = sum(v.numel() * v.itemsize for v in made.state.get(p, {}).values())
        assert real == state_bytes(fitted(setting, shape), shape, dtype)
        if fitted(setting, shape) == setting:
            assert real == case.state_bytes(shape, setting.options)


# ---------------------------------------------------------------- 5 tied, and without a gradient


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 64)
        self.head = nn.Linear(64, 48, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.copy_(torch.linspace(-1, 1, 48 * 64).view(48, 64))


@every_method
def test_5_tied_parameters_step_once_and_those_without_gradient_wait(case: Case) -> None:
    model = Tied()
    made = create_optimizer(model, case.settings[0], lr=case.lr, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    alone = {"embed.weight": nn.Parameter(model.embed.weight.detach().clone())}
    other = optimizer(case, alone, case.lr)
    for step in range(3):
        random_gradients(alone, step)
        model.head.weight.grad = alone["embed.weight"].grad.clone()  # type: ignore[union-attr]
        made.step()
        other.step()
    assert torch.equal(model.embed.weight, alone["embed.weight"])
    assert [len(group["params"]) for group in made.param_groups] == [1]

    params = parameters(case)
    made = optimizer(case, params, case.lr)
    for step in range(3):
        random_gradients(params, step)
        waiting = dict(list(params.items())[step::2])
        before = {name: p.detach().clone() for name, p in waiting.items()}
        clocks = {name: made.state[p]["step"].item() for name, p in waiting.items() if "step" in made.state.get(p, {})}
        for p in waiting.values():
            p.grad = None
        made.step()
        for name, p in waiting.items():
            assert torch.equal(p, before[name])
            assert name not in clocks or made.state[p]["step"] == clocks[name]


# ---------------------------------------------------------------- 6 scale


@every_method
def test_6_the_scale_of_gradients_is_no_matter_where_that_is_promised(case: Case) -> None:
    promised = case.scale_invariant
    promised = promised(case.settings[0].options) if callable(promised) else promised
    runs = []
    for factor in (1.0, 2.0**-7, 2.0**7):
        params = parameters(case, torch.float64, SHAPES[:-1])
        made = optimizer(case, params, case.lr, eps=0.0)
        for step in range(3):
            random_gradients(params, step, factor)
            made.step()
        runs.append(params)
    for other in runs[1:]:
        close = all(torch.allclose(runs[0][name], other[name], rtol=1e-9, atol=1e-12) for name in other)
        assert close == promised


# ---------------------------------------------------------------- 7 convergence


# Three learning rates each, linear decay to zero; the others' are 3, 10 and 30 times those of their cases.
RATES = {
    "galore": (0.3, 1.0, 3.0), "lion": (0.01, 0.03, 0.1), "rmsprop": (3e-3, 0.01, 0.03), "sgd": (3e-3, 0.03, 0.3),
}  # fmt: skip
# Tensors this small have no coordinates and no directions to spare: 1 % of 64 is none, and with half of the directions
# at a time GaLore ends the quadratic at 1.6 times AdamW's loss in as many steps.
MEANS = {
    ("micro_adam", "quadratic"): {"density": 0.1}, ("micro_adam", "perceptron"): {"density": 0.1},
    ("galore", "quadratic"): {"rank": 8, "update_every": 10},
}  # fmt: skip
Problem = tuple[Parameters, Callable[[int], Tensor], Callable[[], Tensor]]  # parameters, loss of a batch, true loss


def quadratic() -> Problem:
    """Least squares in 64 coordinates (a matrix), curvatures 1 to 100 in a rotated basis; noise leaves a loss of 10
    of the 690 at the start."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator))
    root = torch.logspace(0, 1, 64).diag() @ basis.t()
    p = nn.Parameter(torch.randn(8, 8, generator=generator))

    def loss(step: int) -> Tensor:
        batch = torch.Generator().manual_seed(step)
        x = torch.randn(64, 64, generator=batch) @ root
        return 0.5 * (x @ p.flatten() - 20**0.5 * torch.randn(64, generator=batch)).square().mean()

    return {"p": p}, loss, lambda: 10 + 0.5 * (root @ p.flatten()).square().sum()


def perceptron() -> Problem:
    """Two layers that learn another two, whose outputs have noise of variance 0.03."""
    generator = torch.Generator().manual_seed(0)
    make = partial(torch.randn, generator=generator)
    first, bias = nn.Parameter(make(32, 16) / 4), nn.Parameter(torch.zeros(32))
    second = nn.Parameter(make(4, 32) / 6)
    a, b = make(24, 16) / 4, make(4, 24) / 5
    held_out = make(512, 16)

    def error(x: Tensor) -> Tensor:
        return torch.tanh(x @ first.t() + bias) @ second.t() - torch.tanh(x @ a.t()) @ b.t()

    def loss(step: int) -> Tensor:
        batch = torch.Generator().manual_seed(step)
        x = torch.randn(64, 16, generator=batch)
        return (error(x) - 0.03**0.5 * torch.randn(64, 4, generator=batch)).square().mean()

    return {"first": first, "bias": bias, "second": second}, loss, lambda: 0.03 + error(held_out).square().mean()


def best_loss(case: Case, problem: Callable[[], Problem]) -> float:
    """The lowest true loss after 120 steps over three learning rates; the median of five draws where there are any."""
    options = case.settings[0].options | MEANS.get((case.method, problem.__name__), {})
    if case.method not in ("apollo", "apollo_mini", "adapprox"):
        return _best_loss(case, problem, options)
    return statistics.median(_best_loss(case, problem, options | {"seed": seed}) for seed in range(5))


def _best_loss(case: Case, problem: Callable[[], Problem], options: dict[str, object]) -> float:
    setting, steps, found = Setting(case.method, options), 120, []
    for lr in RATES.get(case.method, (3 * case.lr, 10 * case.lr, 30 * case.lr)):
        params, loss, true_loss = problem()
        made = MemadviseOptimizer(params.items(), setting, lr=lr)
        for step in range(steps):
            made.param_groups[0]["lr"] = lr * (1 - step / steps)
            made.zero_grad()
            loss(step).backward()
            made.step()
        found.append(true_loss().item())
    return min(value for value in found if math.isfinite(value))


@lru_cache
def adamw_loss(problem: Callable[[], Problem]) -> float:
    (adamw,) = (case for case in all_cases() if case.method == "adamw")
    return best_loss(adamw, problem)


@every_method
@pytest.mark.parametrize("problem", [quadratic, perceptron])
def test_7_it_converges_within_1_5_of_adamw(case: Case, problem: Callable[[], Problem]) -> None:
    assert best_loss(case, problem) <= 1.5 * adamw_loss(problem)


# ---------------------------------------------------------------- 8 the bound of Adam's updates


BETAS = [(0.9, 0.95), (0.95, 0.98), (0.9, 0.99)]
ELEMENTWISE = [
    Setting("adamw"),
    Setting("adamw", {"compat": "official"}),
    Setting("adam_mini", {"partition": "row"}),  # of a vector: every coordinate its own block
]
CODED = [Setting("adamw", {"first_moment": codec, "second_moment": codec}) for codec in CODECS]


@pytest.mark.parametrize(
    ("setting", "betas"),
    [*((s, b) for s in ELEMENTWISE for b in BETAS), *((s, b) for s in CODED for b in BETAS[:2])],
    ids=lambda x: x.key if isinstance(x, Setting) else str(x),
)
def test_8_no_update_exceeds_what_any_gradients_can_give(setting: Setting, betas: tuple[float, float]) -> None:
    """The gradients that attain the bound, g ~ (b2 / b1)^t, in half of the coordinates, heavy tails in the others."""
    bound = update_bound(*betas)
    p = nn.Parameter(torch.zeros(64))
    made = MemadviseOptimizer([("p", p)], {"p": setting}, lr=1.0, betas=betas, eps=1e-30, weight_decay=0.0)
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for step in range(round(4 / (1 - betas[1]))):
        g = torch.randn(64, generator=generator) * 10 ** (4 * torch.rand(64, generator=generator) - 4)
        g[torch.rand(64, generator=generator) < 0.5] = 0
        g[::2] = (betas[1] / betas[0]) ** step
        p.data.zero_()
        p.grad = g
        made.step()
        largest = max(largest, p.abs().max().item())
    assert largest <= bound * (1 + 1e-5)
    assert setting in CODED or largest > 0.98 * bound  # attained


# ---------------------------------------------------------------- 9 memory of a step


@every_dtype
@every_method
def test_9_a_step_takes_at_most_three_times_the_largest_tensor(case: Case, dtype: torch.dtype) -> None:
    """In float32 bytes. The largest is one of more than a box here: where all are smaller, it is a few boxes of half a
    MiB, whatever the tensors. Steps that a method takes rarely (a new subspace) keep to the prediction.
    """
    params = parameters(case, dtype, [*SHAPES, (1024, 512)])
    made = optimizer(case, params, case.lr)
    for step in range(2):
        random_gradients(params, step)
        made.step()
    taken = [transient_bytes(made) for _ in range(2 if case.rare_scratch else 1)]
    assert max(taken) <= max(m.scratch_bytes for m in made.memory()) + 65536  # as predicted
    assert min(taken) <= 3 * 4 * max(p.numel() for p in params.values())  # if one takes more, the next does not


# ---------------------------------------------------------------- 10 determinism


@every_dtype
@every_method
def test_10_replicas_agree_and_torchs_random_numbers_are_left_alone(case: Case, dtype: torch.dtype) -> None:
    """Two replicas, the parameters of one in another order, and each with its own state of torch's generator."""
    setting = case.settings[0]
    if dtype == torch.bfloat16:
        setting = Setting(setting.method, {**setting.options, "weights": "stochastic"})
    runs = []
    for seed, order in ((1, 1), (2, -1)):
        torch.manual_seed(seed)
        params = parameters(case, dtype)
        made = MemadviseOptimizer(list(params.items())[::order], setting, lr=case.lr, weight_decay=0.1)
        before = torch.get_rng_state()
        for step in range(4):
            random_gradients(params, step)
            made.step()
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(params)
    assert same(*runs)
