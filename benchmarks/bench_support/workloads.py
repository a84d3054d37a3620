"""The training steps that are estimated and measured: the examples, as they are and enlarged, and an HF Llama."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memadvise.advise.uniform import probe_methods
from memadvise.batches import batch_size
from memadvise.hf_target import hf_target
from memadvise.memory.session import fake_session
from memadvise.memory.trace import MakeOptimizer
from memadvise.optim.create import create_optimizer
from memadvise.plan.schema import Plan, Setting, Switches
from memadvise.roles import describe_parameters
from memadvise.switches import checkpoint_patterns
from memadvise.target import Target, load_target

EXAMPLES = Path(__file__).parents[2] / "examples"

# Sizes at which a step takes hundreds of MiB, so that a few MiB of the allocator's own do not matter.
LARGE: dict[str, dict[str, Any]] = {
    "gpt_text": {"WIDTH": 1024, "HEADS": 16, "LAYERS": 8, "CONTEXT": 256},
    "vit_digits": {"WIDTH": 768, "HEADS": 12, "LAYERS": 8, "BATCH_SIZE": 128},
    "cnn_digits": {"WIDTH": 256, "BATCH_SIZE": 1024},
    "llama_hf": {"SIZES": {"hidden": 1024, "intermediate": 2816, "heads": 16, "kv_heads": 8, "context": 256}},
}
_LLAMA_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
}
_LLAMA_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 128,
}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LLAMA_70B = {
    **LLAMA_7B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


FAMILIES = Path(__file__).with_name("families")
_FAMILY_WIDTH = 512  # enlarged


@dataclass(frozen=True)
class Workload:
    """A target by name; ``make`` loads it anew."""

    name: str
    make: Callable[[], Target]


def examples(*, large: bool = False) -> Iterator[Workload]:
    """Every file of examples/ that is a target, at its own size or enlarged."""
    for path in sorted(EXAMPLES.glob("*.py")):
        if "def build_model" not in path.read_text(encoding="utf-8"):
            continue
        name = path.stem + (" (large)" if large else "")
        yield Workload(name, partial(_example, path, LARGE[path.stem] if large else {}))


def families(*, large: bool = False) -> Iterator[Workload]:
    """The small models of families/: beside transformers an encoder, a ResNet, an LSTM and a graph network."""
    for path in sorted(FAMILIES.glob("*.py")):
        if "def build_model" in path.read_text(encoding="utf-8"):
            name = f"family {path.stem}" + (" (large)" if large else "")
            yield Workload(name, partial(_family, path, _FAMILY_WIDTH if large else None))


def _family(path: Path, width: int | None) -> Target:
    os.environ.pop("MEMADVISE_WIDTH", None)
    if width is not None:
        os.environ["MEMADVISE_WIDTH"] = str(width)
    return load_target(str(path))


def _example(path: Path, constants: dict[str, Any]) -> Target:
    target = load_target(str(path))
    module = target.build_model.__globals__
    for name, value in constants.items():
        if name not in module:
            raise KeyError(f"{path.name} has no {name}")
        if isinstance(value, dict):
            module[name].update(value)
        else:
            module[name] = value
    return target


def write_llama_config(folder: Path, sizes: dict[str, int]) -> Path:
    """A transformers configuration of a Llama."""
    path = folder / "config.json"
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, **sizes}
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return path


def llama_bf16(folder: Path, *, large: bool = False) -> Workload:
    """A transformers Llama in bfloat16: 4 x 512 tokens of 108 million parameters, or 2 x 128 of 4 million."""
    path = write_llama_config(folder, _LLAMA_LARGE if large else _LLAMA_SMALL)
    batch_size, seq_len = (4, 512) if large else (2, 128)
    name = "hf llama bf16" + (" (large)" if large else "")
    return Workload(name, partial(hf_target, f"hf:{path}", batch_size=batch_size, seq_len=seq_len))


# ---------------------------------------------------------------- optimizers and switches


OPTIMIZERS = {
    "cpu": ("AdamW for-loop", "AdamW fused", "memadvise adamw", "memadvise slimadam"),
    "cuda": ("AdamW foreach", "AdamW fused", "memadvise adamw", "memadvise slimadam"),
}


def make_optimizer(name: str, target: Target) -> MakeOptimizer:
    """AdamW of torch in the implementations that users meet, or our engine; ``name`` is one of OPTIMIZERS."""

    def adamw(model: nn.Module, **options: bool) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, **options)

    kinds = {"AdamW for-loop": {"foreach": False}, "AdamW foreach": {"foreach": True}, "AdamW fused": {"fused": True}}
    if name in kinds:
        return partial(adamw, **kinds[name])
    if name == "memadvise adamw":
        return partial(create_optimizer, plan=Setting("adamw"), lr=1e-3)
    if name == "memadvise slimadam":
        return partial(create_optimizer, plan=slimadam_plan(target), lr=1e-3)
    raise KeyError(name)


def slimadam_plan(target: Target) -> Plan:
    """SlimAdam as its paper applies it to this model."""
    with fake_session(target) as (model, batches):
        parameters = describe_parameters(model, lambda: target.loss(model, batches[0]))
    return probe_methods(parameters)["slimadam"]


def switches(target: Target) -> dict[str, Switches]:
    """No switch, checkpointing where there are blocks, and two micro-batches where a batch divides."""
    with fake_session(target) as (model, batches):
        patterns, size = checkpoint_patterns(model), batch_size(batches[0])
        norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    found = {"none": Switches()}
    if patterns:
        found["checkpoint"] = Switches(checkpoint=patterns)
    if size is not None and size % 2 == 0 and not norms:
        found["2 micro-batches"] = Switches(micro_batches=2)
    return found
