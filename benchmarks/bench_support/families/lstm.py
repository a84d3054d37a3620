"""A byte-level language model of two LSTM layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from bench_support.families.common import (
    TABLE_FACTOR,
    next_byte_loss,
    scaled_down,
    seeded,
    text_batches,
    text_validation,
    width,
)

WIDTH, LAYERS, CONTEXT, SIZE = width(64), 2, 32, 16
compute_loss = next_byte_loss


class Lstm(nn.Module):
    """Embedding, LSTM and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, LAYERS, batch_first=True)
        self.head = nn.Linear(WIDTH, 256)
        scaled_down(self.embed.weight, self.head.weight, self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return TABLE_FACTOR * self.head(self.lstm(TABLE_FACTOR * self.embed(x))[0])


def build_model() -> nn.Module:
    return seeded(Lstm)


def build_batches() -> Iterable[Tensor]:
    return text_batches(SIZE, CONTEXT)


def validation_loss(model: nn.Module) -> float:
    return text_validation(model, compute_loss, 4 * SIZE, CONTEXT)
