"""The estimate on fake tensors against torch.profiler's allocator events of the real step, on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memadvise.memory.estimate import estimate
from memadvise.memory.measure import measure_cpu
from memadvise.optim.create import create_optimizer
from memadvise.plan.schema import Setting, Switches
from memadvise.target import Target, load_target

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
TOLERANCE = 0.001


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    def __init__(self, vocabulary: int = 257, length: int = 64, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids, labels):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images, labels):
        return F.cross_entropy(self.head(self.features(images).mean((2, 3))), labels)


class Vit(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 65, width))
        self.blocks = nn.Sequential(*(Block(width, 3, causal=False) for _ in range(3)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images, labels):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.positions
        return F.cross_entropy(self.head(self.norm(self.blocks(x))[:, 0]), labels)


def _text(vocabulary: int = 257):
    return [(torch.randint(vocabulary, (8, 64)), torch.randint(vocabulary, (8, 64))) for _ in range(2)]


def _images():
    return [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(2)]


def _llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def _llama_batches():
    ids = torch.randint(512, (4, 64))
    return [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}] * 2


TARGETS = {
    "gpt": (Target(build_model=Gpt, build_batches=_text, spec="gpt"), "blocks.*"),
    "cnn": (Target(build_model=Cnn, build_batches=_images, spec="cnn"), "features"),
    "vit": (Target(build_model=Vit, build_batches=_images, spec="vit"), "blocks.*"),
    "llama": (Target(build_model=_llama, build_batches=_llama_batches, spec="llama"), "model.layers.*"),
}


def _adamw(**options):
    return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, **options)


def _compare(target, optimizer=None, switches=None):
    switches = switches or Switches()
    traced = estimate(target, device="cpu", optimizer=optimizer, switches=switches)
    measured = measure_cpu(target, optimizer=optimizer, switches=switches)
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, rel=TOLERANCE)
    assert traced.peak_phase == measured.peak_phase
    for phase in measured.phases:
        assert traced.phase(phase.phase).peak_bytes == pytest.approx(phase.peak_bytes, rel=TOLERANCE), phase.phase
    assert traced.state_bytes == measured.state_bytes
    for ledger in (traced, measured):
        assert sum(ledger.by_category.values()) == ledger.peak_bytes
        assert sum(sum(counts.values()) for counts in ledger.by_module.values()) == ledger.peak_bytes
    return traced, measured


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*((name, "for-loop") for name in TARGETS), *((name, "foreach") for name in TARGETS), ("gpt", "fused")],
)
def test_peak_of_every_phase(name, optimizer):
    options = {"for-loop": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}[optimizer]
    traced, _ = _compare(TARGETS[name][0], _adamw(**options))
    assert traced.optimizer == f"torch.optim.AdamW ({optimizer})"


@pytest.mark.parametrize(
    "setting",
    [Setting("adamw"), Setting("slimadam", {"axes": [0]}), Setting("adam_mini", {"partition": "row"}), Setting("lion")],
    ids=lambda setting: setting.method,
)
def test_optimizers_of_the_engine(setting):
    traced, _ = _compare(TARGETS["gpt"][0], lambda model: create_optimizer(model, setting, lr=1e-3))
    assert (traced.state_bytes < estimate(TARGETS["gpt"][0]).state_bytes) == (setting.method != "adamw")


@pytest.mark.parametrize("name", TARGETS)
def test_categories_agree(name):
    # At the end of the forward pass: kernels of the backward pass may swap one temporary for another of equal size.
    traced, measured = (dict(ledger.phase("forward").by_category) for ledger in _compare(TARGETS[name][0]))
    traced["temporaries"] = traced.get("temporaries", 0) + traced.pop("workspace", 0)  # the profiler sees no kernels
    assert traced.keys() == measured.keys()
    for category, size in traced.items():
        assert size == pytest.approx(measured[category], rel=TOLERANCE, abs=64), category


def test_modules_agree():
    traced, measured = _compare(TARGETS["gpt"][0])
    assert traced.by_module.keys() == measured.by_module.keys()
    for module, counts in traced.by_module.items():
        assert sum(counts.values()) == pytest.approx(sum(measured.by_module[module].values()), abs=64), module


@pytest.mark.parametrize("name", TARGETS)
def test_checkpointing(name):
    target, pattern = TARGETS[name]
    traced, _ = _compare(target, switches=Switches(checkpoint=(pattern,)))
    plain = estimate(target, device="cpu")
    assert traced.phase("forward").peak_bytes < plain.phase("forward").peak_bytes


@pytest.mark.parametrize("name", TARGETS)
def test_micro_batches(name):
    traced, _ = _compare(TARGETS[name][0], switches=Switches(micro_batches=2))
    assert traced.micro_batches == 2


def test_own_training_step_with_clipping():
    def train_step(model, batch, optimizer):
        model(*batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    _compare(Target(build_model=Gpt, build_batches=_text, train_step=train_step))


def test_dropout_and_frozen_parameters():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 256), nn.Dropout(0.2), nn.Linear(256, 64))
            self.body[0].requires_grad_(False)

        def forward(self, x):
            return self.body(x).square().mean()

    _compare(Target(build_model=Net, build_batches=lambda: [torch.randn(32, 64)] * 2))


def _is_target(path: Path) -> bool:
    return "def build_model" in path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in EXAMPLES if _is_target(p)], ids=lambda p: p.stem)
def test_examples(path):
    if path.stem.endswith("_hf") and importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers")
    _compare(load_target(str(path)))
