"""Small models of every kind that people train, as targets: the estimate is held against the allocator on each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memadvise.target import Target


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---------------------------------------------------------------- transformers, from the library


def _hf(model: str, config: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options))


_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt2() -> nn.Module:
    return _hf("GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=64)


def llama() -> nn.Module:
    sizes = {**_SIZES, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 176}
    return _hf("LlamaForCausalLM", "LlamaConfig", **sizes, vocab_size=300, use_cache=False)


def bert() -> nn.Module:
    return _hf("BertForMaskedLM", "BertConfig", **_SIZES, intermediate_size=128, vocab_size=300)


def t5() -> nn.Module:
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 300}
    return _hf("T5ForConditionalGeneration", "T5Config", **sizes, decoder_start_token_id=0)


def vit() -> nn.Module:
    sizes = {**_SIZES, "intermediate_size": 128, "image_size": 32, "patch_size": 8}
    return _hf("ViTForImageClassification", "ViTConfig", **sizes, num_labels=10)


def mixtral() -> nn.Module:
    sizes = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return _hf("MixtralForCausalLM", "MixtralConfig", **sizes, **experts, use_cache=False)


def text(*, mask: bool = False) -> list[dict[str, torch.Tensor]]:
    generator = _generator()

    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(300, (4, 48), generator=generator)
        padded = torch.arange(48) < torch.tensor([[48], [40], [31], [48]])
        return {"input_ids": ids, "labels": ids.clone(), **({"attention_mask": padded.long()} if mask else {})}

    return [batch() for _ in range(2)]


def masked_text() -> list[dict[str, torch.Tensor]]:
    return text(mask=True)


def pictures() -> list[dict[str, torch.Tensor]]:
    generator = _generator()
    return [
        {
            "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
            "labels": torch.randint(10, (4,), generator=generator),
        }
        for _ in range(2)
    ]


# ---------------------------------------------------------------- plain torch


class ResidualBlock(nn.Module):
    """Of a ResNet: two convolutions, the shortcut projected where the shape changes."""

    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(wide_in, wide_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(wide_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide_out, wide_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(wide_out),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or wide_in != wide_out:
            self.shortcut = nn.Sequential(nn.Conv2d(wide_in, wide_out, 1, stride, bias=False), nn.BatchNorm2d(wide_out))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.stages = nn.Sequential(ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 32, 1))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, pixel_values, labels):
        return F.cross_entropy(self.head(self.pool(self.stages(self.stem(pixel_values))).flatten(1)), labels)


class TimeBlock(nn.Module):
    """Of a diffusion model: convolutions shifted by an embedding of the time step."""

    def __init__(self, wide_in: int, wide_out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, wide_in), nn.Conv2d(wide_in, wide_out, 3, padding=1)
        self.time = nn.Linear(time, wide_out)
        self.norm2, self.conv2 = nn.GroupNorm(4, wide_out), nn.Conv2d(wide_out, wide_out, 3, padding=1)
        self.skip = nn.Conv2d(wide_in, wide_out, 1) if wide_in != wide_out else nn.Identity()

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(4, wide), nn.Conv1d(wide, 3 * wide, 1), nn.Conv1d(wide, wide, 1)

    def forward(self, x):
        batch, wide, height, width = x.shape
        q, k, v = self.qkv(self.norm(x).flatten(2)).view(batch, 3, 2, wide // 2, -1).transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(batch, wide, -1)
        return x + self.out(h).view(batch, wide, height, width)


class UNet(nn.Module):
    """Noise in, noise out: down, middle with attention, up with skip connections."""

    def __init__(self, wide: int = 16, time: int = 32) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(wide, time), nn.SiLU(), nn.Linear(time, time))
        self.register_buffer("alphas", torch.linspace(1, 0.01, 100).cumprod(0))
        self.first = nn.Conv2d(3, wide, 3, padding=1)
        self.down1, self.down2 = TimeBlock(wide, wide, time), TimeBlock(wide, 2 * wide, time)
        self.shrink1 = nn.Conv2d(wide, wide, 3, 2, 1)
        self.middle, self.attention = TimeBlock(2 * wide, 2 * wide, time), SpatialAttention(2 * wide)
        self.up2, self.up1 = TimeBlock(4 * wide, wide, time), TimeBlock(2 * wide, wide, time)
        self.last = nn.Sequential(nn.GroupNorm(4, wide), nn.SiLU(), nn.Conv2d(wide, 3, 3, padding=1))
        self.wide = wide

    def forward(self, pixel_values, labels):
        step = labels * 9
        noise, alpha = torch.randn_like(pixel_values), self.alphas[step][:, None, None, None]
        x = alpha.sqrt() * pixel_values + (1 - alpha).sqrt() * noise
        angles = step[:, None] * torch.exp(-torch.arange(self.wide // 2, device=step.device) / 2)
        t = self.time(torch.cat((angles.sin(), angles.cos()), 1))
        one = self.down1(self.first(x), t)
        two = self.down2(self.shrink1(one), t)
        x = self.attention(self.middle(two, t))
        x = F.interpolate(self.up2(torch.cat((x, two), 1), t), scale_factor=2, mode="nearest")
        return F.mse_loss(self.last(self.up1(torch.cat((x, one), 1), t)), noise)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(300, 32)
        self.body = kind(32, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, 300)

    def forward(self, input_ids, labels):
        return F.cross_entropy(self.head(self.body(self.tokens(input_ids))[0]).flatten(0, 1), labels.flatten())


def lstm() -> nn.Module:
    return Recurrent(nn.LSTM)


def gru() -> nn.Module:
    return Recurrent(nn.GRU)


def short_text() -> list[dict[str, torch.Tensor]]:
    return [{name: tensor[:, :12].clone() for name, tensor in batch.items()} for batch in text()]


class MessagePassing(nn.Module):
    """Messages along edges summed at their targets, divided by how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(2 * 32 + 8, 32), nn.GRUCell(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x, edges, features, graph, labels):
        source, target = edges
        for _ in range(2):
            messages = F.relu(self.message(torch.cat((x[source], x[target], features), 1)))
            total = torch.zeros_like(x).index_add_(0, target, messages)
            degree = torch.zeros(len(x), 1, device=x.device).index_add_(0, target, torch.ones_like(messages[:, :1]))
            x = self.update(total / degree.clamp(min=1), x)
        pooled = torch.zeros(int(graph.max()) + 1, 32, device=x.device).scatter_add(0, graph[:, None].expand_as(x), x)
        return F.cross_entropy(self.head(pooled), labels)


def graphs() -> list[tuple[torch.Tensor, ...]]:
    generator = _generator()

    def batch() -> tuple[torch.Tensor, ...]:
        edges = torch.randint(120, (2, 600), generator=generator)
        graph = torch.arange(120) // 15
        features = torch.randn(600, 8, generator=generator)
        return torch.randn(120, 32, generator=generator), edges, features, graph, torch.arange(8) % 5

    return [batch() for _ in range(2)]


class LoraLinear(nn.Module):
    """A frozen matrix and a trained one of low rank beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.up.weight)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))


def lora() -> nn.Module:
    model = llama().requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, LoraLinear(getattr(layer.self_attn, name)))
    return model


class Tied(nn.Module):
    """The head is the embedding, one block is used three times, and buffers hold positions and a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.block = nn.Embedding(300, 32), nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True)
        self.head = nn.Linear(32, 300, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("positions", torch.randn(48, 32))
        self.register_buffer("mean", torch.zeros(32), persistent=False)

    def forward(self, input_ids, labels):
        x = self.tokens(input_ids) + self.positions
        for _ in range(3):
            x = self.block(x)
        self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        return F.cross_entropy(self.head(x - self.mean).flatten(0, 1), labels.flatten())


class Swish(torch.autograd.Function):
    """Keeps its input only and computes the sigmoid again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradient * (s + x * s * (1 - s))


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return (self.second(Swish.apply(self.first(x))) - x).square().mean()


def vectors() -> list[torch.Tensor]:
    generator = _generator()
    return [torch.randn(64, 64, generator=generator) for _ in range(2)]


class Branching(nn.Module):
    """Reads numbers on the host: a loss that is skipped when it is no number, a mask that may be empty."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.extra = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        h = self.body(x)
        if torch.isfinite(h).all():
            h = h + self.extra(h)
        return h.square().mean()


ARCHITECTURES = {
    name: Target(build_model=build, build_batches=batches, spec=name)
    for name, build, batches in (
        ("gpt2", gpt2, masked_text),
        ("llama", llama, text),
        ("bert", bert, masked_text),
        ("t5", t5, masked_text),
        ("vit", vit, pictures),
        ("mixtral", mixtral, text),
        ("resnet", ResNet, pictures),
        ("unet", UNet, pictures),
        ("lstm", lstm, text),
        ("gru", gru, short_text),
        ("message_passing", MessagePassing, graphs),
        ("lora", lora, text),
        ("tied", Tied, text),
        ("custom_function", CustomFunction, vectors),
        ("branching", Branching, vectors),
    )
}
