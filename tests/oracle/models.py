"""Small models of five families, for the product's trace and for the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

_TEXT = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


@dataclass(frozen=True)
class Case:
    """A model, its batch (shape and range of integers, or None for floats), and the attention kernel of an A100."""

    build: Callable[[], nn.Module]
    batch: tuple[int, ...]
    integers: int | None
    kernel: str
    blocks: str
    dtype: torch.dtype = torch.float32

    def tensors(self) -> Any:
        """One batch on the default device."""
        if self.integers is None:
            return torch.randn(self.batch)
        return torch.randint(self.integers, self.batch)

    def model(self) -> nn.Module:
        """The model, built in its dtype: fake tensors on "cuda" cannot be cast in place."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            return self.build()
        finally:
            torch.set_default_dtype(before)


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the input itself, or the mean square of the logits."""
    if batch.is_floating_point():
        out = model(batch)
        return (out.logits if hasattr(out, "logits") else out).square().mean()
    return model(input_ids=batch, labels=batch).loss


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norms[0](self.first(x)), inplace=True)
        return F.relu(self.norms[1](self.second(y)) + self.shortcut(x), inplace=True)


def _resnet() -> nn.Module:
    blocks = [Residual(a, b, stride) for a, b, stride in ((32, 32, 1), (32, 64, 2), (64, 128, 2))]
    stem = [nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=128, n_layer=3, n_head=4, vocab_size=1000, n_positions=256, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=1000, intermediate_size=512, max_position_embeddings=256, **_TEXT)
    return transformers.BertForMaskedLM(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(image_size=64, patch_size=8, intermediate_size=512, num_labels=10, **_TEXT)
    return transformers.ViTForImageClassification(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        intermediate_size=352, vocab_size=1000, num_key_value_heads=2, use_cache=False, **_TEXT
    )
    return transformers.LlamaForCausalLM(config)


CASES = {
    "gpt2": Case(_gpt2, (4, 256), 1000, "efficient", "transformer.h.*"),
    "bert": Case(_bert, (4, 256), 1000, "efficient", "bert.encoder.layer.*"),
    "vit": Case(_vit, (8, 3, 64, 64), None, "efficient", "vit.layers.*"),
    "resnet": Case(_resnet, (64, 3, 64, 64), None, "none", "[456]"),
    "llama": Case(_llama, (4, 256), 1000, "flash", "model.layers.*", torch.bfloat16),
    "gpt2 short": Case(_gpt2, (1, 16), 1000, "efficient", "transformer.h.*"),  # its peak lies in the optimizer
    "gpt2 bf16": Case(_gpt2, (4, 256), 1000, "flash", "transformer.h.*", torch.bfloat16),
}
