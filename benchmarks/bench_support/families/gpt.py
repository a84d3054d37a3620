"""A byte-level GPT with an untied head."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bench_support.families.common import (
    TABLE_FACTOR,
    Block,
    next_byte_loss,
    scaled_down,
    seeded,
    text_batches,
    text_validation,
    width,
)

WIDTH, HEADS, LAYERS, CONTEXT, SIZE = width(64), 4, 2, 64, 8
compute_loss = next_byte_loss


class Gpt(nn.Module):
    """Embeddings, blocks and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, causal=True) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)
        scaled_down(self.embed.weight, self.position.weight, self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = TABLE_FACTOR * (self.embed(x) + self.position(torch.arange(x.shape[1], device=x.device)))
        for block in self.blocks:
            x = block(x)
        return TABLE_FACTOR * self.head(self.norm(x))


def build_model() -> nn.Module:
    return seeded(Gpt)


def build_batches() -> Iterable[Tensor]:
    return text_batches(SIZE, CONTEXT)


def validation_loss(model: nn.Module) -> float:
    return text_validation(model, compute_loss, 4 * SIZE, CONTEXT)
