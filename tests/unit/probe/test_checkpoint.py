"""A probe that goes on where training stands."""

import itertools
import pickle

import pytest
import torch
from tiny_models import (
    ADAMW,
    CANDIDATES,
    TinyTransformer,
    by_name,
    describe,
    language_batches,
    language_loss,
    language_target,
    probe,
)

from memadvise.errors import UsageError
from memadvise.plan.schema import Setting
from memadvise.probe.checkpoint import load_checkpoint

SHAPES = {name: tuple(p.shape) for name, p in TinyTransformer().named_parameters()}
INT8 = Setting("adamw", {"first_moment": "int8", "second_moment": "int8"})


def trained(steps, groups=lambda model: model.parameters(), **hyper):
    torch.manual_seed(0)
    model = TinyTransformer()
    optimizer = torch.optim.AdamW(groups(model), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.02, **hyper)
    for batch in itertools.islice(itertools.cycle(language_batches(20)), steps):
        optimizer.zero_grad()
        language_loss(model, batch).backward()
        optimizer.step()
    return model, optimizer


def saved(path, model, optimizer, weights=None):
    torch.save({"model": weights or model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("checkpoint") / "run.pt", *trained(30))


def test_the_probe_is_the_run_that_goes_on(file):
    """Losses and second moments are those of training that was never interrupted."""
    result = probe(language_target(num_batches=20), checkpoint=file, num_steps=10)
    torch.manual_seed(0)
    model, optimizer = trained(30)
    losses = []
    for batch in language_batches(20)[:10]:
        optimizer.zero_grad()
        loss = language_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=1e-6)
    assert result.checkpoint == str(file)
    assert result.lr == 2e-3
    assert any("betas 0.9 0.95, eps 1e-08, weight decay 0.02" in note for note in result.notes)


def test_shadows_start_from_live_moments(file):
    """In 8 bits, ten steps after the start, the update is AdamW's; empty state would not have it."""
    result = probe(
        language_target(), checkpoint=file, num_steps=10, settings=(*CANDIDATES, INT8, Setting("apollo_mini"))
    )
    assert not any("self-check" in w for w in result.warnings)
    for p in result.parameters:
        for value in p.fidelity:
            if value.candidate == INT8.key:
                assert value.one_minus_cos < 0.01
    assert any("say nothing of the state of apollo_mini" in note for note in result.notes)


def test_means_are_those_of_a_run_that_was_watched_from_the_start(file):
    """40 steps watched in one go, the last ten of them from a checkpoint: the same scores."""
    late = by_name(probe(language_target(), checkpoint=file, num_steps=10))
    target = language_target(
        num_batches=20, build_batches=lambda: list(itertools.islice(itertools.cycle(language_batches(20)), 30)) +
        language_batches(20)[:10],
    )  # fmt: skip

    def step(model, batch, optimizer):
        optimizer.param_groups[0]["lr"] = 2e-3  # of the run, from its first step on
        optimizer.zero_grad()
        loss = language_loss(model, batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    target = language_target(
        build_model=lambda: (torch.manual_seed(0), TinyTransformer())[1],
        build_batches=target.build_batches,
        train_step=step,
    )
    whole = by_name(probe(target, num_steps=40, betas=(0.9, 0.95), weight_decay=0.02))
    for name in ("query.weight", "up.weight", "head.weight"):
        for a, b in zip(late[name].fidelity, whole[name].fidelity, strict=True):
            assert a.candidate == b.candidate
            assert a.abs_d1 == pytest.approx(b.abs_d1, rel=0.6)  # of other steps of the same run


def test_bfloat16_moments_go_on_in_float32(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 10, bias=False, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = list(torch.randn(20, 64, 12, generator=torch.Generator().manual_seed(1)))

    def loss(model, x):
        return torch.nn.functional.mse_loss(model(x.bfloat16()).float(), x[:, :10].cumsum(1))

    for x in batches:
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    path = saved(tmp_path / "half.pt", model, optimizer)
    target = language_target(
        build_model=lambda: torch.nn.Sequential(torch.nn.Linear(12, 10, bias=False, dtype=torch.bfloat16)),
        build_batches=lambda: batches,
        compute_loss=loss,
    )
    result = probe(target, describe(model), checkpoint=path, num_steps=10, settings=(ADAMW, INT8))
    (p,) = result.parameters
    assert p.num_recorded == 5
    assert p.fidelity[1].one_minus_cos < 0.01


# ---------------------------------------------------------------- what is in a file


def test_parameters_are_known_by_name_or_by_position(tmp_path):
    def by_decay(model):
        named = list(model.named_parameters())
        decayed = [(n, p) for n, p in named if p.ndim > 1]
        rest = [(n, p) for n, p in named if p.ndim < 2]
        return [{"params": rest, "weight_decay": 0.0}, {"params": decayed}]

    plain = load_checkpoint(saved(tmp_path / "a.pt", *trained(3)), SHAPES)
    named = load_checkpoint(saved(tmp_path / "b.pt", *trained(3, by_decay)), SHAPES)
    assert set(plain.moments) == set(named.moments) == set(SHAPES)
    for name, (m, v, step) in named.moments.items():
        assert m.shape == v.shape == SHAPES[name]
        assert step == 3
    assert torch.allclose(plain.moments["up.bias"][1], named.moments["up.bias"][1])

    def unnamed(model):
        return [{"params": [p for n, p in group["params"]]} for group in by_decay(model)]

    with pytest.raises(UsageError, match=r"2 groups of .* parameters without names"):
        load_checkpoint(saved(tmp_path / "c.pt", *trained(3, unnamed)), SHAPES)


def test_wrapped_names_are_understood(tmp_path):
    model, optimizer = trained(2)
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint = load_checkpoint(saved(tmp_path / "ddp.pt", model, optimizer, wrapped), SHAPES)
    fresh = TinyTransformer()
    checkpoint.load_weights(fresh)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_files_that_are_no_checkpoint(tmp_path, capsys):
    model, _ = trained(2)
    with pytest.raises(UsageError, match="cannot read the checkpoint"):
        load_checkpoint(tmp_path / "none.pt", SHAPES)
    for name, content in (
        ("text.pt", b"hello"),
        ("empty.pt", b""),
        ("code.pt", pickle.dumps({"model": Harmful()}, protocol=2)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="cannot be loaded as tensors alone"):
            load_checkpoint(tmp_path / name, SHAPES)
    torch.save({"model": model.state_dict(), "optimizer": {"state": Harmful()}}, tmp_path / "more.pt")
    with pytest.raises(UsageError, match="cannot be loaded as tensors alone"):
        load_checkpoint(tmp_path / "more.pt", SHAPES)
    assert "executed" not in capsys.readouterr().out
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UsageError, match="does not hold a model's state dict"):
        load_checkpoint(tmp_path / "weights.pt", SHAPES)
    torch.save({"model": model.state_dict()}, tmp_path / "half.pt")
    with pytest.raises(UsageError, match="does not hold an optimizer's state dict"):
        load_checkpoint(tmp_path / "half.pt", SHAPES)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    with pytest.raises(UsageError, match="is not AdamW"):
        load_checkpoint(saved(tmp_path / "sgd.pt", model, sgd), SHAPES)
    with pytest.raises(UsageError, match="in another order"):
        load_checkpoint(saved(tmp_path / "order.pt", *trained(2, lambda m: list(m.parameters())[::-1])), SHAPES)


def test_another_models_weights_are_refused(file):
    other = language_target(build_model=lambda: torch.nn.Sequential(torch.nn.Linear(8, 8)))
    with pytest.raises(UsageError, match=r"trainable ones|no trainable parameter"):
        probe(other, describe(other.model()), checkpoint=file)
    checkpoint = load_checkpoint(file, SHAPES)
    with pytest.raises(UsageError, match="is not a checkpoint of this model"):
        checkpoint.load_weights(torch.nn.Linear(3, 3))
