"""A small vision transformer on scikit-learn's handwritten digits.

As a target:   memadvise scan examples/vit_digits.py
As a script:   python examples/vit_digits.py [--plan memadvise.yaml] [--steps 300] [--lr 5e-4]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from example_support import Batch, digits, image_batches, mean_loss, train
from torch import nn

IMAGE, PATCH, CLASSES = 8, 2, 10
WIDTH, HEADS, LAYERS = 128, 4, 6  # 1.2 million parameters
BATCH_SIZE = 20


class Attention(nn.Module):
    """Self-attention with one fused projection: [batch, patches, width] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, patches, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, patches, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.projection(y.transpose(1, 2).reshape(batch, patches, WIDTH))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class ViT(nn.Module):
    """Images [batch, 1, 8, 8] -> logits [batch, classes]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, kernel_size=PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.2 * torch.randn(1, (IMAGE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return ViT()


def build_batches() -> Iterator[Batch]:
    return image_batches(BATCH_SIZE)


def compute_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def validation_loss(model: nn.Module) -> float:
    return mean_loss(model, compute_loss, [digits()[1]])


if __name__ == "__main__":
    train(
        build_model=build_model,
        build_batches=build_batches,
        compute_loss=compute_loss,
        validation_loss=validation_loss,
        lr=5e-4,
    )
