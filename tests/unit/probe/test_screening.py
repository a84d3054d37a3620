import contextlib
import dataclasses

import pytest
import torch
from tiny_models import TinyTransformer, describe, language_batches, language_loss, trained_transformer
from torch import nn

from memadvise.errors import TargetError
from memadvise.probe import screening
from memadvise.probe.hessian import gradient_covariance
from memadvise.probe.partitions import layout
from memadvise.probe.screening import (
    combine_checkpoints,
    confirm,
    confirmation_batch,
    make_samples,
    measuring,
    screen,
    to_confirm,
    usable_samples,
)


@pytest.fixture(scope="module")
def model():
    return trained_transformer(50, torch.float32)


def pairs(model):
    live = dict(model.named_parameters())
    return [(p, live[p.name]) for p in describe(model)]


def loss_of(model):
    return lambda batch: language_loss(model, batch)


SAMPLES = torch.cat(language_batches(2)).split(1)


def test_samples_are_single_and_different():
    first, second = language_batches(2)
    samples = make_samples([first, second, first, second], 12)
    assert [tuple(s.shape) for s in samples] == [(1, 13)] * 12
    assert torch.equal(torch.cat(samples), torch.cat([first, second])[:12])
    assert len(make_samples([first, first, first], 32)) == 8  # the same batch again is no new sample
    assert make_samples([{"x": first, "n": torch.ones(3)}], 32)[0]["x"] is first  # no common first dimension


def test_measuring_restores_every_mode():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3)), nn.LSTM(3, 3))
    model[1].eval()
    inside = []
    with contextlib.suppress(KeyError), measuring(model):
        inside = [m.training for m in model.modules()]
        raise KeyError
    assert inside == [False, False, False, False, True]  # cuDNN differentiates recurrent layers in training mode only
    assert [m.training for m in model.modules()] == [True, True, False, False, True]


def test_screen_of_everything_equals_each_matrix_alone(model):
    """Groups and memory limits change nothing."""
    expected = {}
    for parameter, tensor in pairs(model):
        if (lay := layout(parameter)) is not None:
            gradients = [torch.autograd.grad(language_loss(model, s), tensor)[0] for s in SAMPLES]
            expected[parameter.name] = gradient_covariance(
                torch.stack([lay.matrix(g) for g in gradients]).clone(), lay.partitions
            )
    assert len(expected) == 9
    for memory_limit in (1, 10 * 4 * 16 * 256, 2**29):
        calls: list[tuple[int, int]] = []
        found = dict(
            screen(
                model,
                loss_of(model),
                SAMPLES,
                pairs(model),
                memory_limit=memory_limit,
                progress=lambda done, total, calls=calls: calls.append((done, total)),
            )
        )
        assert found.keys() == expected.keys()
        for name, values in found.items():
            for a, b in zip(values, expected[name], strict=True):
                assert a.partition == b.partition
                assert a.score == pytest.approx(b.score, abs=1e-4)
        assert calls[-1] == (9, 9)
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_memory_limit_bounds_a_group(model):
    parameters = [(p, t, layout(p)) for p, t in pairs(model) if layout(p)]
    for limit in (1, 2**16, 2**18):
        for group in screening._groups(parameters, 16, 2**18, limit):
            assert len(group) == 1 or sum(16 * 4 * p.numel for p, _, _ in group) <= limit


def test_large_matrices_are_represented_by_a_submatrix_of_touched_rows():
    """A table of 400 tokens of which 40 occur: the subset must not be spent on rows without gradient."""
    torch.manual_seed(0)
    table = nn.Embedding(400, 30)
    target = torch.randn(40, 30)

    def loss(tokens):
        return (table(tokens) - target[tokens // 10]).pow(3).mean()

    batch = 10 * torch.randint(0, 40, (32, 25))
    parameter = describe(table, {"weight": "token_embedding"})[0]
    group = [(parameter, table.weight, layout(parameter))]
    ((rows, columns),) = screening._subsets(loss, batch.split(1), group, 600, 0)
    assert set((rows % 10).tolist()) == {0}
    assert 10 <= len(rows) <= 40
    assert len(rows) * len(columns) <= 600
    found = dict(screen(table, loss, batch.split(1), [(parameter, table.weight)], max_entries=600))
    assert {v.partition for v in found["weight"]} == {"row", "column"}


def test_submatrix_scores_resemble_the_whole():
    """Rows of a linear layer with independent outputs: one block per row, in the whole and in a part of it."""
    torch.manual_seed(0)
    model = nn.Linear(20, 30, bias=False)
    x, y = torch.randn(64, 20), torch.randn(64, 30)

    def loss(rows):
        return (model(x[rows]) - y[rows]).square().mean()

    samples = torch.arange(64).split(1)
    (parameter,) = describe(model, {})
    whole = dict(screen(model, loss, samples, [(parameter, model.weight)]))["weight"]
    part = dict(screen(model, loss, samples, [(parameter, model.weight)], max_entries=300))["weight"]
    assert part != whole
    for a, b in zip(whole, part, strict=True):
        assert b.score == pytest.approx(a.score, abs=0.25)


def test_too_few_samples_give_nothing(model):
    assert dict(screen(model, loss_of(model), SAMPLES[:3], pairs(model))) == {}


def test_confirmation_touches_nothing_and_repeats(model):
    live = dict(model.named_parameters())
    frozen = live["head.weight"]
    frozen.requires_grad_(False)
    parameter = next(p for p in describe(model) if p.name == "query.weight")
    values = [
        confirm(model, loss_of(model), language_batches(1)[0], parameter, live["query.weight"], num_probes=4)
        for _ in range(2)
    ]
    assert values[0] == values[1]
    assert {v.partition for v in values[0]} == {"head", "row", "column"}
    assert {v.estimator for v in values[0]} == {"hessian-vector-products"}
    assert max(values[0], key=lambda v: v.score).partition == "head"
    assert not frozen.requires_grad
    frozen.requires_grad_(True)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_loss_linear_in_a_weight_has_no_hessian():
    model = nn.Linear(6, 5)
    (parameter, *_) = describe(model, {})
    assert confirm(model, lambda x: model(x).sum(), torch.randn(4, 6), parameter, model.weight) == ()


def test_one_of_each_role_is_confirmed():
    parameters = describe(TinyTransformer())
    chosen = to_confirm(parameters)
    assert [p.role for p in chosen] == [
        "attention_query", "attention_value", "attention_output", "mlp_up", "mlp_down", "token_embedding",
    ]  # fmt: skip
    assert to_confirm(describe(TinyTransformer().to(torch.bfloat16))) == []
    assert len(to_confirm(parameters, 2)) == 2


@pytest.mark.parametrize(("size", "kept"), [(1, 1), (4, 4), (8, 4), (9, 3), (7, 1), (12, 4)])
def test_confirmation_uses_at_most_four_samples(size, kept):
    assert len(confirmation_batch(torch.zeros(size, 3))) == kept
    mixed = {"x": torch.zeros(size, 3), "y": torch.zeros(size + 1)}
    assert confirmation_batch(mixed) is mixed


def test_samples_fall_back_to_what_the_loss_accepts():
    model = nn.Linear(3, 1)
    batches = list(torch.randn(4, 8, 3))

    def whole_only(batch):
        if len(batch) == 1:
            raise TargetError("needs a whole batch")
        return model(batch).mean()

    samples, training, note = usable_samples(model, whole_only, batches, 32)
    assert (len(samples), len(samples[0]), training, note) == (4, 8, False, None)

    def training_only(batch):
        if not model.training:
            raise TargetError("gives no loss in evaluation mode")
        return model(batch).mean()

    samples, training, note = usable_samples(model, training_only, batches, 32)
    assert (len(samples), training) == (4, True)
    assert "training mode" in note

    def never(batch):
        raise TargetError("no loss at all")

    with pytest.raises(TargetError, match="no loss at all"):
        usable_samples(model, never, batches, 32)


def test_two_checkpoints_are_averaged_and_their_distance_shown():
    noise = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    mixing = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    partitions = layout(describe(nn.Linear(4, 6), {})[0]).partitions[:1]
    (early,) = gradient_covariance((noise @ mixing).view(20, 6, 4), partitions)
    later = dataclasses.replace(early, score=early.score + 0.2, stderr=0.0)
    both = combine_checkpoints([early], [later])[0]
    assert both.score == pytest.approx(early.score + 0.1)
    assert both.stderr == pytest.approx(((early.stderr / 2) ** 2 + 0.1**2) ** 0.5)
    same = combine_checkpoints([early], [early])[0]
    assert same.score == early.score
    assert same.stderr == pytest.approx(early.stderr / 2**0.5)
    assert same.num_samples == 40
    assert combine_checkpoints([], [early]) == (early,)
    assert combine_checkpoints([early], []) == (early,)
