import math

import pytest
import torch

from memadvise.probe.fidelity import (
    WINDOW,
    Scores,
    displacement,
    one_minus_cos,
    spearman,
    step_sums,
    window_sums,
)


def updates(seed=0, shape=(12, 9)):
    generator = torch.Generator().manual_seed(seed)
    u, other = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return u, other, torch.rand(shape, generator=generator, dtype=torch.float64)


def test_step_sums_are_the_formula_written_out():
    u, other, root = updates()
    sums = step_sums(u, other, root, 1.0).tolist()
    assert sums[0] == pytest.approx(((other - u).square() * root).sum().item(), rel=1e-12)
    cosine = torch.nn.functional.cosine_similarity(u.flatten(), other.flatten(), dim=0).item()
    assert one_minus_cos(*sums) == pytest.approx(1 - cosine, rel=1e-9)


def test_equal_updates_are_exactly_equal():
    u, _, root = updates()
    assert one_minus_cos(*step_sums(u.float(), u.float(), root.float(), 1.0).tolist()) == 0.0


def test_weights_count_rows_several_times():
    u, other, root = updates()
    rows = torch.tensor([0, 3, 3, 3, 7])
    counts = torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64).unsqueeze(1)
    few = [t[[0, 3, 7]] for t in (u, other, root)]
    torch.testing.assert_close(step_sums(*few, counts), step_sums(u[rows], other[rows], root[rows], 1.0))
    torch.testing.assert_close(window_sums(*few, counts), window_sums(u[rows], other[rows], root[rows], 1.0))
    torch.testing.assert_close(step_sums(u, other, root, 5.0), 5 * step_sums(u, other, root, 1.0))


def test_displacements_are_compared_at_the_matched_rate():
    x, other, root = updates()
    d24, ratio = displacement(window_sums(x, other, root, 1.0).tolist())
    assert ratio == pytest.approx((other.norm() / x.norm()).item())
    matched = other / ratio
    assert matched.norm().item() == pytest.approx(x.norm().item())
    assert d24 == pytest.approx(((matched - x).square() * root).sum().item() / 2 / WINDOW**2)
    same, half = displacement(window_sums(x, 0.5 * x, root, 1.0).tolist())
    assert half == pytest.approx(0.5)
    assert same == pytest.approx(0.0, abs=1e-12)
    assert displacement([1.0, 0.0, 1.0, 0.0, 0.0]) is None


def test_scores_are_means_over_the_counted_steps():
    scores = Scores()
    for step, error in ((30, 8.0), (36, 4.0), (42, 2.0), (48, math.nan), (54, 6.0)):
        scores.steps.append((step, [error, 1.0, 1.0, 1.0]))
    value = scores.value("x")
    assert value.abs_d1 == pytest.approx((8 + 4 + 2 + 6) / 2 / 4)
    assert value.half_scores == (3.0, 2.0)
    assert value.abs_d24 is value.lr_multiplier is None
    assert scores.value("x", first_step=42).abs_d1 == pytest.approx(2.0)
    assert scores.value("x", first_step=60) is None
    scores.windows.append([4.0, 1.0, 2.0, 0.0, 2.0])
    value = scores.value("x")
    assert (value.displacement_ratio, value.lr_multiplier) == (0.5, 2.0)


def test_spearman():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 2, 3], [1, 2.5, 2.5, 4]) == pytest.approx(1.0)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) without ties
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / 120)
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None
