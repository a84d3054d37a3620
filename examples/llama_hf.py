"""A transformers Llama of any size, from a config, on the bytes of Python's standard library (extra: memadvise[hf]).

As a target:   LLAMA_HIDDEN=512 LLAMA_LAYERS=8 memadvise scan examples/llama_hf.py
As a script:   python examples/llama_hf.py --hidden 512 --layers 8 [--plan memadvise.yaml] [--steps 300] [--lr 1e-3]
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator

import torch
from example_support import Batch, mean_loss, stdlib_text, text_batches, train
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

# Names of the sizes and their defaults (2.8 million parameters); LLAMA_<NAME> in the environment changes one.
SIZES = {"hidden": 256, "intermediate": 512, "layers": 4, "heads": 8, "kv_heads": 4, "context": 64, "batch": 8}
SIZES = {name: int(os.environ.get(f"LLAMA_{name.upper()}", default)) for name, default in SIZES.items()}


def build_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=SIZES["hidden"],
        intermediate_size=SIZES["intermediate"],
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=SIZES["heads"],
        num_key_value_heads=SIZES["kv_heads"],
        max_position_embeddings=SIZES["context"],
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def build_batches() -> Iterator[Batch]:
    return text_batches(stdlib_text()[0], batch_size=SIZES["batch"], context=SIZES["context"])


def compute_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs, targets = batch
    logits = model(input_ids=inputs).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def validation_loss(model: nn.Module) -> float:
    batches = text_batches(stdlib_text()[1], batch_size=SIZES["batch"], context=SIZES["context"], seed=1)
    return mean_loss(model, compute_loss, itertools.islice(batches, 20))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    sizes, rest = parser.parse_known_args()
    SIZES.update(vars(sizes))
    train(
        build_model=build_model,
        build_batches=build_batches,
        compute_loss=compute_loss,
        validation_loss=validation_loss,
        lr=1e-3,
        arguments=rest,
    )
