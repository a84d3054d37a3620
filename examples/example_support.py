"""What the examples share: real data that is on every machine already, and a plain training loop that takes a plan."""

from __future__ import annotations

import argparse
import functools
import os
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]


@functools.lru_cache(maxsize=1)
def stdlib_text(max_bytes: int = 8_000_000) -> tuple[torch.Tensor, torch.Tensor]:
    """(train, validation): the bytes, uint8, of Python's own standard library; every tenth file is for validation."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, names, found in os.walk(root):
        names[:] = [n for n in names if n not in ("site-packages", "dist-packages", "__pycache__", "test", "tests")]
        files += [Path(folder) / name for name in found if name.endswith(".py")]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    for number, file in enumerate(sorted(files, key=lambda f: f.relative_to(root).as_posix())):
        content = file.read_bytes()
        total += len(content)
        if total > max_bytes:
            break
        parts[number % 10 == 9].append(content)
    train, validation = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return train, validation


def text_batches(text: torch.Tensor, *, batch_size: int, context: int, seed: int = 0) -> Iterator[Batch]:
    """Endless (inputs, targets), int64 of shape [batch_size, context]; targets are the inputs one byte later."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - context - 1, (batch_size,), generator=generator).tolist()
        window = torch.stack([text[start : start + context + 1] for start in starts]).long()
        yield window[:, :-1].contiguous(), window[:, 1:].contiguous()


@functools.lru_cache(maxsize=1)
def digits() -> tuple[Batch, Batch]:
    """(train, validation) of scikit-learn's handwritten digits: images [n, 1, 8, 8] in [-1, 1], labels [n]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[300:], labels[300:]), (images[:300], labels[:300])


def image_batches(batch_size: int, *, seed: int = 0) -> Iterator[Batch]:
    """Endless (images, labels) of the training digits, drawn with replacement."""
    (images, labels), _ = digits()
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(labels), (batch_size,), generator=generator)
        yield images[chosen], labels[chosen]


def mean_loss(model: nn.Module, compute_loss: Callable[[Any, Batch], torch.Tensor], batches: Iterable[Batch]) -> float:
    """The mean loss over ``batches``, in evaluation mode and without gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        losses = [compute_loss(model, batch).item() for batch in batches]
    model.train(training)
    return sum(losses) / len(losses)


def train(
    *,
    build_model: Callable[[], nn.Module],
    build_batches: Callable[[], Iterable[Batch]],
    compute_loss: Callable[[Any, Batch], torch.Tensor],
    validation_loss: Callable[[nn.Module], float],
    lr: float,
    arguments: list[str] | None = None,
) -> None:
    """The script behind every example: train with plain AdamW, or with ``--plan memadvise.yaml``."""
    parser = argparse.ArgumentParser(description="Train this example with AdamW, or as a memadvise plan says.")
    parser.add_argument("--plan", type=Path, help="a plan written by: memadvise recommend")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    options = parser.parse_args(arguments)

    model = build_model().train()
    optimizer: torch.optim.Optimizer
    if options.plan:  # only then is memadvise needed
        from memadvise import apply_checkpoint, create_optimizer, load_plan, split_batch

        plan = load_plan(options.plan)
        optimizer = create_optimizer(model, plan, lr=options.lr, weight_decay=options.weight_decay)
        apply_checkpoint(model, plan.switches.checkpoint)
        num_parts = plan.switches.micro_batches
    else:
        num_parts = 1
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)

    start = time.perf_counter()
    every = max(1, options.steps // 6)
    for step, batch in zip(range(1, options.steps + 1), build_batches(), strict=False):
        loss = 0.0
        for part in split_batch(batch, num_parts) if num_parts > 1 else [batch]:
            part_loss = compute_loss(model, part) / num_parts
            part_loss.backward()
            loss += part_loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % every == 0 or step == 1:
            print(f"step {step:5d}   train loss {loss:.4f}   validation loss {validation_loss(model):.4f}")
    print(f"{options.steps} steps in {time.perf_counter() - start:.1f} s")
