"""An optimizer in backward on CUDA, where hooks run on a thread of the device and the gradients on its stream."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memadvise.errors import OptimizerError
from memadvise.optim import AdamW, SlimAdam, release

pytestmark = pytest.mark.gpu

SIZE, LAYERS = 1024, 16


def _deep(device: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS))).to(device, dtype)


@pytest.mark.parametrize("kind", [AdamW, SlimAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_of_the_ordinary_loop(kind: type[AdamW] | type[SlimAdam], dtype: torch.dtype, device: str) -> None:
    model, twin = _deep(device, dtype), _deep(device, dtype)
    left = release.attach(model, lambda params: kind(params, lr=1e-3))
    right = kind(twin.named_parameters(), lr=1e-3)
    for _ in range(4):
        x = torch.randn(8, SIZE, device=device, dtype=dtype)
        for m, optimizer in ((model, left), (twin, right)):
            m(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_gradients_are_never_alive_together(device: str) -> None:
    model = _deep(device)
    optimizer = release.attach(model, lambda params: AdamW(params, lr=1e-3))
    x = torch.randn(1, SIZE, device=device)
    for _ in range(2):  # the first makes the state
        loss = model(x).square().mean()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        optimizer.step()
    one = SIZE * SIZE * 4
    assert torch.cuda.max_memory_allocated() - before < 4 * one < LAYERS * one


def test_clipping_and_accumulation_are_refused(device: str) -> None:
    model = _deep(device)
    optimizer = release.attach(model, lambda params: AdamW(params, lr=1e-3))
    x = torch.randn(1, SIZE, device=device)
    model(x).mean().backward()
    with pytest.raises(OptimizerError, match="used in backward and freed"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(OptimizerError, match="second gradient before step"):
        model(x).mean().backward()
    optimizer.zero_grad()
    optimizer.step()
