import pytest
import torch

from memadvise.errors import UsageError
from memadvise.ledger import SnrValue
from memadvise.probe import snr as snr_module
from memadvise.probe.snr import SNR_CAP, SnrTrajectory, axis_sets, rules_from_snr, snr, snr_all


def reference(v: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Per-slice mean^2 / population variance, straight from the definition."""
    v = v.double()
    return (v.mean(axes).square() / v.var(axes, unbiased=False)).flatten()


@pytest.mark.parametrize(("ndim", "count"), [(0, 0), (1, 1), (2, 3), (3, 7), (4, 15)])
def test_every_axis_set(ndim, count):
    sets = axis_sets(ndim)
    assert len(sets) == len(set(sets)) == count
    assert all(axes == tuple(sorted(axes)) for axes in sets)


@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 4, 5), (4, 3, 2, 5)])
def test_every_axis_set_matches_the_definition(shape):
    v = torch.rand(shape, generator=torch.Generator().manual_seed(1)) ** 4 * 1e-9
    for axes, value in snr_all(v).items():
        ratio = reference(v, axes)
        assert value.snr == pytest.approx(ratio.mean().item(), rel=1e-9)
        assert value.error == pytest.approx((1 / (1 + ratio)).mean().item(), rel=1e-9)
        assert value.median == pytest.approx(ratio.quantile(0.5).item(), rel=1e-9)


@pytest.mark.parametrize("shape", [(50, 6), (50, 3, 2, 4), (50,)])
def test_chunks_of_rows_add_up(shape, monkeypatch):
    v = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    whole = snr_all(v)
    monkeypatch.setattr(snr_module, "_CHUNK", 41)
    for axes, value in snr_all(v).items():
        assert value.snr == pytest.approx(whole[axes].snr, rel=1e-12)
        assert value.error == pytest.approx(whole[axes].error, rel=1e-12)


def test_single_axis_set_equals_the_same_of_all():
    v = torch.rand(4, 3, 2, 5)
    everything = snr_all(v)
    for axes, value in everything.items():
        alone = snr(v, axes)
        assert alone.snr == pytest.approx(value.snr)
        assert alone.median == pytest.approx(value.median)
    assert snr(v, (2, 0)) == snr(v, (0, 2))


def test_half_zero_half_two_is_exactly_one():
    v = torch.tensor([0.0, 2.0]).repeat(8, 3)
    assert snr(v, (1,)).snr == 1.0
    assert snr(v, (1,)).error == 0.5


def test_constant_slices_are_capped_and_untouched_ones_dropped():
    v = torch.tensor([3e-12, 7e-5, 0.0]).unsqueeze(1).expand(3, 100)
    assert snr(v, (1,)).snr == SNR_CAP
    untouched = torch.zeros(4, 10)
    untouched[2, :5] = 2.0
    assert snr(untouched, (1,)).snr == 1.0  # the three zero rows say nothing
    assert snr(torch.zeros(4, 10), (1,)).snr is None
    assert snr(torch.zeros(4, 10), (0, 1)).error is None


def test_infinite_slices_are_dropped():
    v = torch.tensor([[0.0, 2.0], [float("inf"), 1.0], [float("nan"), 1.0]])
    assert snr(v, (1,)).snr == 1.0
    assert snr(torch.full((3, 3), float("nan")), (0,)).snr is None


def test_axes_of_size_one_say_nothing():
    v = torch.rand(5, 1)
    assert snr(v, (1,)).snr is None
    assert snr(v, (0, 1)).snr == pytest.approx(snr(v, (0,)).snr)


def test_first_step_of_gaussian_noise_is_one_half():
    g = torch.randn(4, 10_000, generator=torch.Generator().manual_seed(0))
    assert snr(g * g, (1,)).snr == pytest.approx(0.5, rel=0.04)


def test_steady_state_of_gaussian_noise():
    generator = torch.Generator().manual_seed(0)
    v = torch.zeros(20_000)
    for _ in range(150):
        v.lerp_(torch.randn(v.shape, generator=generator).square(), 0.05)
    assert snr(v, (0,)).snr == pytest.approx((1 + 0.95) / (2 * (1 - 0.95)), rel=0.03)


def test_error_is_the_relative_squared_error_of_the_mean():
    v = torch.rand(64, dtype=torch.float64) ** 3
    lost = ((v - v.mean()).square().sum() / v.square().sum()).item()
    value = snr(v, (0,))
    assert value.error == pytest.approx(lost, rel=1e-12)
    assert 1 / (1 + value.snr) == pytest.approx(lost, rel=1e-12)


def test_low_precision_input_is_summed_in_double():
    v = (torch.rand(300, 300) * 1e-7).to(torch.bfloat16)
    assert snr(v, (0, 1)).snr == pytest.approx(reference(v, (0, 1)).item(), rel=1e-9)


@pytest.mark.parametrize("axes", [(), (2,), (-1,), (0, 0)])
def test_wrong_axes_are_refused(axes):
    with pytest.raises(UsageError, match="axes"):
        snr(torch.rand(3, 3), axes)


def test_scalars_and_empty_tensors_say_nothing():
    assert snr_all(torch.tensor(2.0)) == {}
    assert snr_all(torch.empty(0, 3))[(1,)].snr is None


def test_trajectory_is_the_mean_over_steps_that_say_something():
    trajectory = SnrTrajectory()
    first, second = torch.rand(4, 5), torch.rand(4, 5)
    for v in (torch.zeros(4, 5), first, second):
        trajectory.add(v)
    values = {value.axes: value for value in trajectory.values()}
    assert list(values) == [(0,), (1,), (0, 1)]
    assert values[(1,)].snr == pytest.approx((snr(first, (1,)).snr + snr(second, (1,)).snr) / 2)
    assert values[(1,)].error == pytest.approx((snr(first, (1,)).error + snr(second, (1,)).error) / 2)


def values_of(table: dict[tuple[int, ...], float | None]) -> list[SnrValue]:
    return [SnrValue(axes, value, value, None) for axes, value in table.items()]


def test_rules_take_the_highest_snr_above_the_cutoff():
    table = values_of({(0,): 0.5, (1,): 3.0, (0, 1): 1.5})
    assert rules_from_snr(table) == (1,)
    assert rules_from_snr(table, policy="max_compression") == (0, 1)
    assert rules_from_snr(table, cutoff=3.0) is None  # strictly above
    assert rules_from_snr(values_of({(0,): None, (1,): None, (0, 1): None})) is None


def test_maximum_compression_counts_elements_when_it_knows_the_shape():
    table = values_of({(0,): 2.0, (1,): 3.0})
    assert rules_from_snr(table, policy="max_compression", shape=(100, 10)) == (0,)
    assert rules_from_snr(table, policy="max_compression", shape=(10, 100)) == (1,)
    assert rules_from_snr(table, policy="max_compression") == (1,)


def test_equal_snr_keeps_the_finer_set():
    assert rules_from_snr(values_of({(1, 2): 4.0, (1,): 4.0})) == (1,)


def test_vectors_stay_dense():
    assert rules_from_snr(values_of({(0,): 100.0})) is None
