import itertools

import pytest
import torch
from tiny_models import (
    WIDTH,
    describe,
    exact_hessian,
    language_batches,
    language_loss,
    trained_transformer,
)

from memadvise.probe import hessian as hessian_module
from memadvise.probe.hessian import MIN_SAMPLES, Energies, gradient_covariance, sign_pair_energies, sign_pairs
from memadvise.probe.partitions import COLUMNS, ROWS, Partition, layout

TRUE = Partition("true", ROWS, torch.arange(4).repeat_interleave(25))


def synthetic(seed: int = 0) -> torch.Tensor:
    """Block-diagonal random PSD matrix: 4 blocks of 25."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(25, 25, generator=generator, dtype=torch.float64) for _ in range(4)]
    return torch.block_diag(*(x @ x.T for x in blocks))


def shuffled(seed: int = 0) -> Partition:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
    return Partition("shuffled", ROWS, TRUE.labels[order])


def exact(hessian: torch.Tensor, partition: Partition, other: int = 1) -> Energies:
    """From the matrix itself; entries of the parameter are ``[rows, columns]`` in row-major order."""
    rows = len(hessian) // other if partition.axis == ROWS else other
    shape = (rows, len(hessian) // rows)
    labels = (
        partition.expand(partition.labels.new_tensor(range(int(partition.labels.max()) + 1))).expand(shape).flatten()
    )
    same = labels[:, None] == labels[None, :]
    square = hessian.square()
    return Energies(square.sum().item(), square.diagonal().sum().item(), square[same].sum().item())


def product(hessian: torch.Tensor):
    return lambda direction: (hessian @ direction.flatten()).view_as(direction)


LIKE = torch.zeros(100, 1, dtype=torch.float64)


def test_true_partition_is_exact_for_every_sign_pair():
    total, _, (blocks,) = sign_pair_energies(product(synthetic()), LIKE, [TRUE], num_probes=6)
    assert blocks == pytest.approx(total, rel=1e-12)
    (value,) = sign_pairs(product(synthetic()), LIKE, [TRUE], num_probes=6)
    assert value.score == pytest.approx(1.0, abs=1e-9)
    assert value.stderr == pytest.approx(0.0, abs=1e-9)
    assert exact(synthetic(), TRUE).score(TRUE.chance(1)) == pytest.approx(1.0)


def test_shuffled_labels_score_nothing_although_the_diagonal_flatters_rho():
    for seed in range(5):
        energies = exact(synthetic(), shuffled(seed))
        assert abs(energies.score(TRUE.chance(1))) < 0.1
        assert energies.rho > 0.4


def test_sign_pairs_find_the_exact_values():
    hessian, partition = synthetic(1), shuffled(1)
    total, diagonal, (blocks,) = sign_pair_energies(product(hessian), LIKE, [partition], num_probes=256)
    energies = exact(hessian, partition)
    assert sum(blocks) / sum(total) == pytest.approx(energies.rho, abs=0.06)
    assert sum(diagonal) / sum(total) == pytest.approx(energies.diagonal / energies.total, abs=0.06)
    (value,) = sign_pairs(product(hessian), LIKE, [partition], num_probes=256)
    assert value.score == pytest.approx(energies.score(value.chance), abs=4 * value.stderr)
    assert 0.005 < value.stderr < 0.2


def test_error_bars_are_honest():
    """Over repetitions the spread of the estimate is what the jackknife says, within a factor of 2."""
    hessian, partition = synthetic(2), shuffled(2)
    values = [sign_pairs(product(hessian), LIKE, [partition], num_probes=16, seed=s)[0] for s in range(40)]
    spread = torch.tensor([v.score for v in values]).std().item()
    claimed = torch.tensor([v.stderr for v in values]).mean().item()
    assert 0.5 < claimed / spread < 2


def test_scaling_changes_no_score():
    partitions = [TRUE, shuffled()]
    plain = sign_pairs(product(synthetic()), LIKE, partitions, num_probes=8)
    scaled = sign_pairs(product(7 * synthetic()), LIKE, partitions, num_probes=8)
    for a, b in zip(plain, scaled, strict=True):
        assert b.score == pytest.approx(a.score, rel=1e-9)


def test_diagonal_hessian_has_no_structure_to_score():
    hessian = torch.diag(torch.rand(100, dtype=torch.float64) + 0.1)
    total, diagonal, _ = sign_pair_energies(product(hessian), LIKE, [TRUE], num_probes=4)
    assert diagonal == pytest.approx(total, rel=1e-12)
    assert sign_pairs(product(hessian), LIKE, [TRUE], num_probes=4) == ()


# ---------------------------------------------------------------- gradient covariance


def naive_covariance(gradients: torch.Tensor, labels: torch.Tensor) -> Energies:
    """The U-statistic over four different samples written out; ``labels`` one per entry."""
    flat = gradients.double().flatten(1)

    def energy(groups: torch.Tensor) -> float:
        total = 0.0
        for group in groups.unique():
            part = flat[:, groups == group]
            g = (part @ part.T).tolist()
            terms = [
                g[i][j] ** 2 - 2 * g[i][j] * g[j][k] + g[i][j] * g[k][m]
                for i, j, k, m in itertools.permutations(range(len(flat)), 4)
            ]
            total += sum(terms) / len(terms)
        return total

    return Energies(energy(torch.zeros_like(labels)), energy(torch.arange(len(labels))), energy(labels))


PARTITIONS = [
    Partition("row", ROWS, torch.arange(6)),
    Partition("head", ROWS, torch.tensor([0, 0, 0, 1, 1, 1])),
    Partition("mixed", ROWS, torch.tensor([7, 7, 3, 4, 7, 9])),
    Partition("column", COLUMNS, torch.arange(4)),
    Partition("head_column", COLUMNS, torch.tensor([0, 0, 1, 1])),
]


def correlated(samples: int) -> torch.Tensor:
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(samples, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (noise @ mixing + 2).view(samples, 6, 4)


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: p.name)
@pytest.mark.parametrize("gram_bytes", [2**24, 2 * 8 * 7 * 7])
def test_covariance_matches_the_sum_written_out(partition, gram_bytes, monkeypatch):
    monkeypatch.setattr(hessian_module, "_GRAM_BYTES", gram_bytes)  # the second: two lines at a time
    gradients = correlated(7)
    labels = partition.labels.unsqueeze(1 - partition.axis).expand(6, 4).flatten()
    expected = naive_covariance(gradients, labels)
    values = {v.partition: v for v in gradient_covariance(1e-12 * gradients, PARTITIONS)}
    chance = partition.chance(4 if partition.axis == ROWS else 6)
    assert values[partition.name].score == pytest.approx(expected.score(chance), rel=1e-6)
    assert values[partition.name].chance == chance


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: p.name)
def test_jackknife_leaves_each_sample_out(partition):
    gradients = correlated(9)
    (whole,) = gradient_covariance(gradients.clone(), [partition])
    scores = []
    for out in range(9):
        kept = torch.cat([gradients[:out], gradients[out + 1 :]])
        scores.append(gradient_covariance(kept, [partition])[0].score)
    scores = torch.tensor(scores, dtype=torch.float64)
    expected = (8 / 9 * (scores - scores.mean()).square().sum()).sqrt().item()
    assert whole.stderr == pytest.approx(expected, rel=1e-6)


def test_a_common_offset_changes_nothing():
    """The mean gradient is no structure."""
    plain = gradient_covariance(correlated(12), PARTITIONS)
    moved = gradient_covariance(correlated(12) + 50 * torch.rand(6, 4, dtype=torch.float64), PARTITIONS)
    for a, b in zip(plain, moved, strict=True):
        assert b.score == pytest.approx(a.score, abs=1e-6)


def test_covariance_finds_blocks_and_only_blocks():
    """Gradients whose covariance is dense within groups of rows: 24 rows in 4 groups, 5 columns."""
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(400, 2, generator=generator) @ torch.randn(2, 30, generator=generator) for _ in range(4)]
    gradients = torch.cat([g.view(400, 6, 5) for g in groups], 1) + 1.0
    right = Partition("head", ROWS, torch.arange(4).repeat_interleave(6))
    wrong = Partition("shifted", ROWS, ((torch.arange(24) + 3) % 24) // 6)
    column = Partition("column", COLUMNS, torch.arange(5))
    values = {v.partition: v for v in gradient_covariance(gradients, [right, wrong, column])}
    assert values["head"].score == pytest.approx(1.0, abs=0.05)
    assert values["shifted"].score < 0.6
    assert abs(values["column"].score) < 0.1


def test_covariance_of_nothing_is_nothing():
    assert gradient_covariance(torch.zeros(8, 6, 4), PARTITIONS) == ()
    assert gradient_covariance(torch.ones(8, 6, 4), PARTITIONS) == ()
    assert gradient_covariance(torch.randn(MIN_SAMPLES - 1, 6, 4), PARTITIONS) == ()
    assert gradient_covariance(torch.full((8, 6, 4), float("nan")), PARTITIONS) == ()


# ---------------------------------------------------------------- a real (tiny) transformer


@pytest.fixture(scope="module")
def transformer():
    return trained_transformer(400)


def test_estimators_agree_with_the_exact_hessian_of_a_transformer(transformer):
    """Queries: one dense block per head (2406.16793); single rows clearly less."""
    parameter = next(p for p in describe(transformer) if p.name == "query.weight")
    lay = layout(parameter)
    weight = transformer.query.weight
    batch = torch.cat(language_batches(4))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = exact_hessian(language_loss(transformer, batch), weight)
        (gradient,) = torch.autograd.grad(language_loss(transformer, batch), weight, create_graph=True)
        hvps = sign_pairs(
            lambda u: torch.autograd.grad(gradient, weight, u, retain_graph=True)[0],
            weight,
            lay.partitions,
            num_probes=32,
        )
    truth = {p.name: exact(hessian, p, WIDTH).score(p.chance(WIDTH)) for p in lay.partitions}
    assert truth["head"] > 0.6
    assert truth["head"] > truth["row"] + 0.2 > truth["column"] + 0.2
    for value in hvps:
        assert value.score == pytest.approx(truth[value.partition], abs=max(0.15, 3 * value.stderr))

    samples = torch.cat(language_batches(4)).split(1)
    gradients = torch.stack([torch.autograd.grad(language_loss(transformer, s), weight)[0] for s in samples])
    screen = {v.partition: v for v in gradient_covariance(gradients, lay.partitions)}
    assert screen["head"].score > screen["row"].score + 0.15 > screen["column"].score + 0.15
    assert screen["head"].score == pytest.approx(truth["head"], abs=0.25)
