"""The estimate against the allocator's events, on models that are unlike the examples: each was once far off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memadvise.errors import TargetError
from memadvise.memory.estimate import estimate
from memadvise.memory.measure import measure_cpu
from memadvise.target import Target

TOLERANCE = 0.001


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 64)
        self.body = nn.LSTM(64, 96, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(192, 50)

    def forward(self, ids, labels):
        return F.cross_entropy(self.head(self.body(self.tokens(ids))[0]).flatten(0, 1), labels.flatten())


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` makes its layers with ``copy.deepcopy``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.1, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(64, 50)

    def forward(self, ids, labels):
        x = self.body(self.tokens(ids), src_key_padding_mask=ids == 0)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Teacher(nn.Module):
    """A frozen copy with buffers, as of a momentum encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        return F.mse_loss(self.student(x), self.teacher(x))


class Graph(nn.Module):
    """Messages along edges: rows by index, sums by index, a mask for the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(32, 64), nn.Linear(64, 7)

    def forward(self, x, edges, labels, mask):
        h = self.body(x)
        out = self.head(F.elu(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])))
        return F.cross_entropy(out[mask], labels[mask])


class LogProbabilities(nn.Module):
    """``gather`` on logits that dwarf the model, as in preference training."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(2000, 16), nn.Linear(16, 2000, bias=False)

    def forward(self, ids, labels):
        return -self.head(self.tokens(ids)).gather(-1, labels.unsqueeze(-1)).mean()


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 512)

    def forward(self, x):
        return self.gate(x.repeat(8, 1)).topk(2, -1).values.square().mean()


class Autoencoder(nn.Module):
    """A reduced loss of every element keeps the memory of all of them."""

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.body, self.loss = nn.Linear(64, 64), loss

    def forward(self, x):
        x = x.repeat(32, 1)
        return self.loss(self.body(x).sigmoid(), x.sigmoid())


def _bfloat16() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).to(torch.bfloat16)

        def forward(self, x):
            return self.body(x.bfloat16()).float().square().mean()

    return Net()


def _words():
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(50, (2, 4, 16), generator=generator)) for _ in range(2)]


def _vectors():
    return [torch.randn(64, 64) for _ in range(2)]


def _graphs():
    generator = torch.Generator().manual_seed(0)

    def graph():
        edges = torch.randint(200, (2, 800), generator=generator)
        labels = torch.randint(7, (200,), generator=generator)
        return torch.randn(200, 32), edges, labels, torch.arange(200) % 5 < 2

    return [graph() for _ in range(2)]


TARGETS = {
    "lstm": Target(build_model=Lstm, build_batches=_words),
    "encoder": Target(build_model=Encoder, build_batches=_words),
    "teacher": Target(build_model=Teacher, build_batches=_vectors),
    "graph": Target(build_model=Graph, build_batches=_graphs),
    "log_probabilities": Target(build_model=LogProbabilities, build_batches=_words),
    "router": Target(build_model=Router, build_batches=_vectors),
    "bfloat16": Target(build_model=_bfloat16, build_batches=_vectors),
    **{
        loss.__name__: Target(build_model=lambda loss=loss: Autoencoder(loss), build_batches=_vectors)
        for loss in (F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy)
    },
}


@pytest.mark.parametrize("name", TARGETS)
def test_peak_of_every_phase(name):
    traced, measured = estimate(TARGETS[name], device="cpu"), measure_cpu(TARGETS[name])
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, rel=TOLERANCE)
    for phase in measured.phases:
        assert traced.phase(phase.phase).peak_bytes == pytest.approx(phase.peak_bytes, rel=TOLERANCE), phase.phase
    assert traced.state_bytes == measured.state_bytes


def test_a_gradient_scaler_makes_its_step():
    """It asks whether gradients are finite; an estimate that lets it skip the step has no optimizer state."""

    def target():
        scaler = torch.amp.GradScaler("cpu")

        def train_step(model, batch, optimizer):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(batch).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        def build():
            return nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 64))

        return Target(build_model=build, build_batches=_vectors, train_step=train_step)

    traced, measured = estimate(target(), device="cpu"), measure_cpu(target())
    assert traced.state_bytes == measured.state_bytes > 0
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, rel=TOLERANCE)


def test_a_deep_copy_keeps_what_user_code_says_of_a_parameter():
    def build():
        model = nn.Linear(4, 4)
        model.weight.no_decay = True
        model.bias.requires_grad_(False)
        seen.append(copy.deepcopy(model))
        return seen[-1]

    seen: list[nn.Module] = []
    target = Target(
        build_model=build, build_batches=lambda: [torch.ones(2, 4)] * 2, compute_loss=lambda m, x: m(x).sum()
    )
    estimate(target, device="cpu")
    assert seen[0].weight.no_decay
    assert seen[0].weight.requires_grad
    assert isinstance(seen[0].weight, nn.Parameter)
    assert not seen[0].bias.requires_grad


def test_a_shape_that_nobody_can_know_is_named_with_its_line():
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 200)

        def forward(self, x, labels):
            scores = F.log_softmax(self.head(x), -1)
            return F.ctc_loss(scores, labels, torch.full((16,), 30), torch.full((16,), 6))

    def batches():
        return [(torch.randn(30, 16, 8), torch.randint(1, 200, (16, 6)))] * 2

    with pytest.raises(TargetError, match=r"test_trace_vs_profiler_models.py:\d+ calls aten._ctc_loss.*shape"):
        estimate(Target(build_model=Speech, build_batches=batches), device="cpu", tensors="fake")
    traced, measured = (
        find(Target(build_model=Speech, build_batches=batches))
        for find in (partial(estimate, device="cpu"), measure_cpu)
    )
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, rel=TOLERANCE)
