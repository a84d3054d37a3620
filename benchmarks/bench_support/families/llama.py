"""A byte-level decoder as Llama's: RMS norms, rotary positions, grouped queries, a gated MLP."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench_support.families.common import next_byte_loss, seeded, text_batches, text_validation, width

WIDTH, HEADS, KEY_HEADS, LAYERS, CONTEXT, SIZE = width(64), 4, 2, 2, 64, 8
compute_loss = next_byte_loss


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rate = 1e4 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * rate
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Layer(nn.Module):
    """Attention with grouped queries, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.input_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, KEY_HEADS * size, bias=False)
        self.v = nn.Linear(WIDTH, KEY_HEADS * size, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 8 * WIDTH // 3, bias=False)
        self.up = nn.Linear(WIDTH, 8 * WIDTH // 3, bias=False)
        self.down = nn.Linear(8 * WIDTH // 3, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.input_norm(x)
        q = rotated(self.q(y).view(batch, length, HEADS, -1).transpose(1, 2))
        k = rotated(self.k(y).view(batch, length, KEY_HEADS, -1).transpose(1, 2))
        v = self.v(y).view(batch, length, KEY_HEADS, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, WIDTH))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Embedding, layers and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def build_model() -> nn.Module:
    return seeded(Llama)


def build_batches() -> Iterable[Tensor]:
    return text_batches(SIZE, CONTEXT)


def validation_loss(model: nn.Module) -> float:
    return text_validation(model, compute_loss, 4 * SIZE, CONTEXT)
