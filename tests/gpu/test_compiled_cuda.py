"""The compiled executor on CUDA, where it is the default: against eager on the CPU, and without temporaries."""

from __future__ import annotations

import pytest
import torch
from test_compiled import FORMS, SETTINGS, Matrices, agree, run
from torch import nn

from memadvise.plan.schema import Setting

pytestmark = pytest.mark.gpu

CODECS = [Setting("adamw", {"first_moment": name, "second_moment": name}) for name in ("dynamic8", "int4", "bf16")]


@pytest.mark.parametrize("setting", [*SETTINGS, *CODECS], ids=lambda s: s.key)
def test_agrees_with_eager_on_the_cpu(setting: Setting, device: str) -> None:
    agree(setting, torch.float32, device, columns=256)  # dynamic8's blocks, which have to end where rows do


@pytest.mark.parametrize(("setting", "dtype"), FORMS, ids=lambda x: getattr(x, "key", str(x)))
def test_weights_of_every_form_and_dtype(setting: Setting, dtype: torch.dtype, device: str) -> None:
    agree(setting, dtype, device)


@pytest.mark.parametrize("setting", [*SETTINGS, *CODECS], ids=lambda s: s.key)
def test_nothing_of_a_parameters_size_is_allocated(setting: Setting, device: str) -> None:
    model = Matrices(rows=(16384,), columns=1024).to(device)
    optimizer = run(model, setting, None, steps=2)
    (memory,) = optimizer.memory()
    assert memory.executor == "compiled"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= memory.scratch_bytes + (1 << 20)


class Vectors(nn.Module):
    """Norms and biases: alike ones are stepped a few at a time, and lengths share a kernel."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = (300, 300, 300, 300, 300, 512, 768, 64)
        self.vectors = nn.ParameterList(nn.Parameter(torch.randn(n, generator=generator)) for n in sizes)


@pytest.mark.parametrize(
    "setting",
    [Setting("adafactor"), Setting("came"), Setting("rmsprop", {"store": "factored"})],
    ids=lambda s: s.key,
)
def test_vectors_that_cannot_be_gathered_are_compiled(setting: Setting, device: str) -> None:
    oracle, model = Vectors(), Vectors().to(device)
    run(oracle, setting, "eager")
    optimizer = run(model, setting, None)
    assert [m.executor for m in optimizer.memory()] == ["compiled"] * 7 + ["chunked"]
    for p, q in zip(oracle.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=2e-5, atol=2e-5)


def test_a_learning_rate_on_the_device_stays_there(device: str) -> None:
    lr = torch.tensor(1e-2, device=device)
    model, twin = Matrices().to(device), Matrices().to(device)
    optimizer, other = (run(m, Setting("slimadam", {"axes": [1]}), "compiled", steps=1) for m in (model, twin))
    optimizer.param_groups[0]["lr"], other.param_groups[0]["lr"] = lr, 1e-2
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
