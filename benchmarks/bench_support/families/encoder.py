"""An encoder as BERT's: a head tied to the embedding guesses the bytes that were masked."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench_support.families.common import Block, seeded, text_batches, text_validation, width

WIDTH, HEADS, LAYERS, CONTEXT, SIZE, MASK = width(64), 4, 2, 64, 8, 256


class Encoder(nn.Module):
    """Embedding, blocks, and the embedding again as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(257, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, causal=False) for _ in range(LAYERS))
        self.norm, self.decoder = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 257, bias=False)
        self.decoder.weight = self.embed.weight
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return self.decoder(self.norm(x))


def compute_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Every fifth byte is to be guessed."""
    hidden = batch.clone()
    hidden[:, ::5] = MASK
    return F.cross_entropy(model(hidden)[:, ::5].flatten(0, 1), batch[:, ::5].flatten())


def build_model() -> nn.Module:
    return seeded(Encoder)


def build_batches() -> Iterable[Tensor]:
    return (window[:, :-1] for window in text_batches(SIZE, CONTEXT))


def validation_loss(model: nn.Module) -> float:
    return text_validation(model, lambda m, window: compute_loss(m, window[:, :-1]), 4 * SIZE, CONTEXT)
