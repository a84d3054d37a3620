"""A vision transformer on the digits: patches of 2 x 2, the mean of all positions is classified."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bench_support.families.common import (
    TABLE_FACTOR,
    Block,
    image_batches,
    image_validation,
    label_loss,
    scaled_down,
    seeded,
    width,
)

WIDTH, HEADS, LAYERS, SIZE = width(64), 4, 2, 32
compute_loss, validation_loss = label_loss, image_validation


class Vit(nn.Module):
    """Patches, blocks, and a classifier of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(1, WIDTH, 2, stride=2), nn.Parameter(torch.randn(1, 16, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, causal=False) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
        scaled_down(self.position, self.head.weight, self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + TABLE_FACTOR * self.position
        for block in self.blocks:
            x = block(x)
        return TABLE_FACTOR * self.head(self.norm(x.mean(1)))


def build_model() -> nn.Module:
    return seeded(Vit)


def build_batches() -> Iterable[tuple[Tensor, Tensor]]:
    return image_batches(SIZE)
