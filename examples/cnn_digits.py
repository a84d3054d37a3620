"""A residual convolutional network with batch norms on scikit-learn's handwritten digits.

As a target:   memadvise scan examples/cnn_digits.py
As a script:   python examples/cnn_digits.py [--plan memadvise.yaml] [--steps 300] [--lr 1e-3]

Batch norms look across samples: a plan with micro-batches normalises over smaller groups than plain training does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from example_support import Batch, digits, image_batches, mean_loss, train
from torch import nn

CLASSES, WIDTH, BLOCKS = 10, 96, 6  # 1.0 million parameters
BATCH_SIZE = 128


class Block(nn.Module):
    """Two 3x3 convolutions around a residual: [batch, width, h, w] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, WIDTH, kernel_size=3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(WIDTH)
        self.second = nn.Conv2d(WIDTH, WIDTH, kernel_size=3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(x + self.second_norm(self.second(y)))


class ResNet(nn.Module):
    """Images [batch, 1, 8, 8] -> logits [batch, classes]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, kernel_size=3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.stem_norm(self.stem(images))))
        return self.classifier(x.mean(dim=(2, 3)))


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return ResNet()


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
        lr=1e-3,
    )
