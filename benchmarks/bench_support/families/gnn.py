"""A graph network on a synthetic citation graph: papers of ten fields, noisy words, citations mostly within a field.

Graph and topics are the same for all seeds; a batch is the whole graph with the papers whose field is asked for, and
words drawn anew around their topics.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench_support.families import common
from bench_support.families.common import VALIDATION_BATCHES, mean_loss, seeded, width

WIDTH, PAPERS, FIELDS, WORDS, CITATIONS, SIZE = width(96), 1200, 10, 128, 6, 128
SIGNAL = 0.2  # of a topic, beside noise of one
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@functools.cache
def graph() -> tuple[Tensor, Tensor, Tensor]:
    """(words that its topic expects of a paper [papers, words], edges [2, citations of all], fields [papers])."""
    generator = torch.Generator().manual_seed(7)
    fields = torch.randint(FIELDS, (PAPERS,), generator=generator)
    topics = torch.randn(FIELDS, WORDS, generator=generator)
    source = torch.arange(PAPERS).repeat_interleave(CITATIONS)
    target = torch.randint(PAPERS, source.shape, generator=generator)
    alike = [(fields == field).nonzero().flatten() for field in range(FIELDS)]
    within = torch.rand(source.shape, generator=generator) < 0.4
    for i in within.nonzero().flatten().tolist():
        peers = alike[int(fields[source[i]])]
        target[i] = peers[int(torch.randint(len(peers), (1,), generator=generator))]
    edges = torch.stack([torch.cat([source, target]), torch.cat([target, source])])
    return SIGNAL * topics[fields], edges, fields


def drawn(expected: Tensor, generator: torch.Generator) -> Tensor:
    return expected + torch.randn(expected.shape, generator=generator)


class Convolution(nn.Module):
    """A paper's own features and the mean of those it cites or is cited by."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.own, self.cited = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        sums = torch.zeros_like(x).index_add_(0, edges[1], x[edges[0]])
        counts = torch.zeros(len(x), device=x.device).index_add_(0, edges[1], torch.ones_like(edges[0], dtype=x.dtype))
        return self.own(x) + self.cited(sums / counts.clamp(min=1.0)[:, None])


class Gnn(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Convolution(WORDS, WIDTH), Convolution(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, FIELDS)

    def forward(self, words: Tensor, edges: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.first(words, edges)), 0.3, self.training)
        return self.head(F.relu(self.second(x, edges)))


def build_model() -> nn.Module:
    return seeded(Gnn)


def build_batches() -> Iterator[Batch]:
    expected, edges, fields = graph()
    generator = torch.Generator().manual_seed(common.SEED)
    while True:
        asked = torch.randint(PAPERS // 2, (SIZE,), generator=generator)
        yield drawn(expected, generator), edges, asked, fields[asked]


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    words, edges, asked, fields = batch
    return F.cross_entropy(model(words, edges)[asked], fields)


def validation_loss(model: nn.Module) -> float:
    expected, edges, fields = graph()
    asked = torch.arange(PAPERS // 2, PAPERS)
    generator = torch.Generator().manual_seed(-1)
    batches = [(drawn(expected, generator), edges, asked, fields[asked]) for _ in range(VALIDATION_BATCHES)]
    return mean_loss(model, compute_loss, batches)
