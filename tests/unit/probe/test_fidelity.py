import math

import pytest
import torch

from memadvise.plan.schema import Setting
from memadvise.probe import fidelity as fidelity_module
from memadvise.probe.fidelity import fidelity, row_chunks

BETAS, EPS = (0.9, 0.95), 1e-8
ADAMW, ROWS, WHOLE = Setting("adamw"), Setting("slimadam", {"axes": [1]}), Setting("slimadam", {"axes": [0, 1]})


def approximate(setting: Setting, v: torch.Tensor) -> torch.Tensor | None:
    if setting.method == "adamw":
        return v
    if setting.method == "slimadam":
        return v.mean(setting.options["axes"], keepdim=True).expand_as(v)
    return None


def moments(shape=(12, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 1e-3, torch.rand(shape, generator=generator) * 1e-5


def test_adamw_is_exactly_itself():
    m, v = moments()
    (value,) = fidelity(m, v, 7, BETAS, EPS, [ADAMW])
    assert (value.candidate, value.abs_d1, value.one_minus_cos) == ("adamw", 0.0, 0.0)


def test_matches_the_formula_written_out():
    m, v = (t.double() for t in moments())
    step = 11
    m_hat, v_hat = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
    u = m_hat / (v_hat.sqrt() + EPS)
    other = m_hat / (v_hat.mean(1, keepdim=True).sqrt() + EPS)
    (value,) = fidelity(m, v, step, BETAS, EPS, [ROWS])
    assert value.abs_d1 == pytest.approx((0.5 * (other - u).square() * v_hat.sqrt()).sum().item(), rel=1e-12)
    cosine = torch.nn.functional.cosine_similarity(u.flatten(), other.flatten(), dim=0).item()
    assert value.one_minus_cos == pytest.approx(1 - cosine, rel=1e-9)


def test_registry_gives_the_same_as_the_definition():
    m, v = moments()
    ours = fidelity(m, v, 5, BETAS, EPS, [ROWS, WHOLE])
    assert ours == fidelity(m, v, 5, BETAS, EPS, [ROWS, WHOLE], approximate=approximate)


def test_averaging_what_is_constant_changes_nothing():
    m, _ = moments()
    v = torch.rand(12, 1).expand(12, 9).contiguous()
    rows, whole = fidelity(m, v, 3, BETAS, EPS, [ROWS, WHOLE], approximate=approximate)
    assert rows.abs_d1 == pytest.approx(0.0, abs=1e-12)
    assert rows.one_minus_cos == pytest.approx(0.0, abs=1e-12)
    assert whole.one_minus_cos > 0.01


def test_the_mean_of_the_average_is_the_average_of_the_mean():
    """Why no shadow state is needed: a SlimAdam v kept from step 0 equals AdamW's v averaged at the end."""
    generator = torch.Generator().manual_seed(3)
    dense, shadow = torch.zeros(6, 5, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64)
    for _ in range(40):
        g = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        dense.lerp_(g * g, 0.05)
        shadow.lerp_((g * g).mean(1, keepdim=True), 0.05)
    torch.testing.assert_close(approximate(ROWS, dense), shadow.expand(6, 5), rtol=1e-13, atol=0)


def test_coarser_means_move_the_update_more():
    m, v = moments((40, 30))
    v *= torch.logspace(-3, 3, 40).unsqueeze(1)  # rows of very different size
    rows, whole = fidelity(m, v, 30, BETAS, EPS, [ROWS, WHOLE])
    assert 0 < rows.abs_d1 < whole.abs_d1
    assert 0 < rows.one_minus_cos < whole.one_minus_cos < 1


def test_scaling_the_loss_scales_the_error_once():
    m, v = moments()
    (small,) = fidelity(m, v, 5, BETAS, 0.0, [ROWS])
    (large,) = fidelity(10 * m, 100 * v, 5, BETAS, 0.0, [ROWS])
    assert large.abs_d1 == pytest.approx(10 * small.abs_d1, rel=1e-5)
    assert large.one_minus_cos == pytest.approx(small.one_minus_cos, rel=1e-5)


def test_methods_without_second_moment_are_left_out():
    m, v = moments()
    values = fidelity(m, v, 5, BETAS, EPS, [Setting("lion"), ROWS, Setting("sgd")])
    assert [value.candidate for value in values] == [ROWS.key]


@pytest.mark.parametrize("shape", [(12, 9), (13,), (7, 2, 3, 2)])
def test_chunks_add_up(shape, monkeypatch):
    m, v = moments(shape)
    setting = Setting("slimadam", {"axes": list(range(len(shape)))})
    (whole,) = fidelity(m, v, 5, BETAS, EPS, [setting])
    monkeypatch.setattr(fidelity_module, "_CHUNK", 20)
    (parts,) = fidelity(m, v, 5, BETAS, EPS, [setting])
    assert parts.abs_d1 == pytest.approx(whole.abs_d1, rel=1e-12)
    assert parts.one_minus_cos == pytest.approx(whole.one_minus_cos, rel=1e-9)


def test_no_momentum_no_error():
    _, v = moments()
    (value,) = fidelity(torch.zeros_like(v), v, 5, BETAS, EPS, [ROWS])
    assert (value.abs_d1, value.one_minus_cos) == (0.0, 0.0)


def test_scalars():
    (value,) = fidelity(torch.tensor(0.1), torch.tensor(0.2), 1, BETAS, EPS, [ADAMW])
    assert value.abs_d1 == 0.0
    assert math.isfinite(value.one_minus_cos)


def test_row_chunks_cover_everything_once():
    assert row_chunks(torch.empty(10, 4), 12) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert row_chunks(torch.empty(3, 100), 12) == [(0, 1), (1, 2), (2, 3)]
    assert row_chunks(torch.empty(0, 4), 12) == []
