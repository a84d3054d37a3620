"""Golden checks of CAME (arXiv 2307.02047): algorithms_b 4.3."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from test_golden_adafactor import START, adafactor, follow, rms
from test_golden_slimadam import stream
from torch import Tensor

from memadvise.errors import OptimizerError
from memadvise.optim.registry import state_bytes, state_specs, validate
from memadvise.plan.schema import Setting


def came(**options: Any) -> Setting:
    return Setting("came", options)


def signs(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    """Gradients of one magnitude: v is a constant."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 2, shape, generator=generator).double() * 2 - 1 for _ in range(steps)]


@pytest.mark.parametrize(("options", "expected"), [({}, 11.11), ({"correct_instability": True}, 0.1111)])
def test_4_3_the_first_step_is_eleven_times_the_learning_rate_or_a_ninth(
    options: dict[str, Any], expected: float
) -> None:
    lr = 1e-3
    (p,) = follow(came(**options), START, signs((24, 10), 1), lr=lr)
    assert rms(p - START) / lr == pytest.approx(expected, rel=1e-3)


def test_4_3_steady_gradients_raise_the_step_to_fifty_and_the_correction_does_not() -> None:
    lr, g = 1e-3, torch.ones(24, 10, dtype=torch.float64)

    def largest(**options: Any) -> float:
        seen = [START, *follow(came(**options), START, [g] * 200, lr=lr)]
        return max(rms(b - a) for a, b in itertools.pairwise(seen)) / lr

    assert 40 < largest() < 60  # "climbs to 50 (constant gradient)"
    assert largest(correct_instability=True) < 12


def test_4_3_pure_noise_settles_at_one_only_after_hundreds_of_steps() -> None:
    lr, seen = 1e-3, [START, *follow(came(), START, stream((24, 10), 600), lr=1e-3)]
    sizes = [rms(b - a) / lr for a, b in itertools.pairwise(seen)]
    assert sizes[20] > 3
    assert 0.7 < sum(sizes[-20:]) / 20 < 1.4


def test_4_3_a_vector_is_adafactor_with_momentum() -> None:
    """With gradients of one magnitude v and its schedule do not matter: both clip u to RMS 1."""
    grads, start = signs((24,), 50), torch.linspace(-1, 1, 24, dtype=torch.float64)
    for decay in (0.0, 0.1):
        left = follow(came(), start, grads, decay=decay)[-1]
        right = follow(adafactor(momentum=0.9), start, grads, decay=decay)[-1]
        torch.testing.assert_close(left, right, rtol=0, atol=1e-13)


def test_4_3_state_sizes() -> None:
    for shape, count in (((300, 200), 500), ((8, 4, 3, 3), 8 + 36), ((5, 30, 20), 5 * 50)):
        assert state_bytes(came(), shape) == 4 + 4 * math.prod(shape) + 2 * 4 * count
    assert state_bytes(came(), (7,)) == 4 + 8 * 7
    assert state_bytes(came(), (4096, 4096)) / 4096**2 == pytest.approx(4.0, abs=0.005)
    windows = state_specs(came(compat="official"), (8, 4, 3, 3))
    assert windows["exp_avg_sq_row"].shape == (8, 4, 3, 1)  # 6/9 of a dense v
    assert windows["exp_avg_sq_col"].shape == (8, 4, 1, 3)


@pytest.mark.parametrize("executor", ["eager", "chunked"])
def test_4_3_rows_of_zeros_and_nothing_but_zeros_are_finite(executor: str) -> None:
    g = torch.full((6, 4), 1e8)
    g[2] = 0
    for grads in ([g] * 5, [torch.zeros(6, 4)] * 5, [torch.zeros(6, 4), g, torch.zeros(6, 4)]):
        p = follow(came(), torch.ones(6, 4), grads, executor=executor)[-1]
        assert torch.isfinite(p).all()
        assert torch.equal(p[2], torch.ones(4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta3": 1}, r"beta3 should be a number in \[0, 1\)"),
        ({"correct_instability": "yes"}, "correct_instability should be true or false"),
        ({"eps2": -1e-16}, "eps2 should be a number above 0"),
        ({"compat": "paper"}, "compat should be official"),
        ({"compat": "official", "correct_instability": True}, "does not correct the instability"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptimizerError, match=words):
        validate(came(**options), (4, 4), name="p")
