"""A byte-level GPT on the source text of Python's standard library.

As a target:   memadvise scan examples/gpt_text.py
As a script:   python examples/gpt_text.py [--plan memadvise.yaml] [--steps 300] [--lr 1e-3]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from example_support import Batch, mean_loss, stdlib_text, text_batches, train
from torch import nn

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 256, 64, 256, 8, 4  # 3.3 million parameters
BATCH_SIZE = 8


class Attention(nn.Module):
    """Causal self-attention: [batch, time, width] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, _ = x.shape
        q, k, v = (f(x).view(batch, time, HEADS, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(y.transpose(1, 2).reshape(batch, time, WIDTH))


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


class GPT(nn.Module):
    """Tokens [batch, time] -> logits [batch, time, vocabulary]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return GPT()


def build_batches() -> Iterator[Batch]:
    return text_batches(stdlib_text()[0], batch_size=BATCH_SIZE, context=CONTEXT)


def compute_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def validation_loss(model: nn.Module) -> float:
    batches = text_batches(stdlib_text()[1], batch_size=BATCH_SIZE, context=CONTEXT, seed=1)
    return mean_loss(model, compute_loss, itertools.islice(batches, 20))


if __name__ == "__main__":
    train(
        build_model=build_model,
        build_batches=build_batches,
        compute_loss=compute_loss,
        validation_loss=validation_loss,
        lr=1e-3,
    )
