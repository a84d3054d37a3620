"""What the families share: seed and width from the environment, text, images, blocks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[3] / "examples"))

from example_support import digits, stdlib_text

SEED = int(os.environ.get("MEMADVISE_SEED", "0"))
# Adam's update of a table or a head that wants a larger step, as a multiplier in the forward pass: with one rate for
# all tensors, what a method with a tenfold rate of its own wins there would look like its merit.
TUNED = os.environ.get("MEMADVISE_TUNED") == "1"
TABLE_FACTOR = 10.0 if TUNED else 1.0
NOISE = 1.0  # standard deviation, beside pixels from -1 to 1
VALIDATION_BATCHES = 8


def width(default: int) -> int:
    """The model's width."""
    return int(os.environ.get("MEMADVISE_WIDTH", default))


def scaled_down(*weights: Tensor) -> None:
    """What is multiplied by ``TABLE_FACTOR`` in the forward pass begins at as much less."""
    with torch.no_grad():
        for weight in weights:
            weight /= TABLE_FACTOR


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(SEED)
    return build()


def text_batches(size: int, context: int, *, validation: bool = False) -> Iterator[Tensor]:
    """Bytes of Python's standard library, int64 [size, context + 1]; those for validation do not depend on the seed."""
    text = stdlib_text()[validation]
    generator = torch.Generator().manual_seed(-1 if validation else SEED)
    while True:
        starts = torch.randint(len(text) - context - 1, (size,), generator=generator).tolist()
        yield torch.stack([text[start : start + context + 1] for start in starts]).long()


def image_batches(size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Digits of scikit-learn under noise, [size, 1, 8, 8], and their labels."""
    images, labels = digits()[0]
    generator = torch.Generator().manual_seed(SEED)
    while True:
        chosen = torch.randint(len(labels), (size,), generator=generator)
        yield noisy(images[chosen], generator), labels[chosen]


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + NOISE * torch.randn(images.shape, generator=generator)


def next_byte_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def label_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def mean_loss(model: nn.Module, loss: Callable[[Any, Any], Tensor], batches: list[Any]) -> float:
    model.eval()
    with torch.no_grad():
        losses = [loss(model, batch).item() for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def text_validation(model: nn.Module, loss: Callable[[Any, Any], Tensor], size: int, context: int) -> float:
    batches = text_batches(size, context, validation=True)
    return mean_loss(model, loss, [next(batches) for _ in range(VALIDATION_BATCHES)])


def image_validation(model: nn.Module) -> float:
    images, labels = digits()[1]
    generator = torch.Generator().manual_seed(-1)
    batches = [(noisy(images, generator), labels) for _ in range(VALIDATION_BATCHES)]
    return mean_loss(model, label_loss, batches)


class Block(nn.Module):
    """A transformer's block before whose parts it is normalised."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))
