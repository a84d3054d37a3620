"""Every architecture and every training technique: the estimate against the allocator's events of real steps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, vectors
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from memadvise.ledger import MemoryLedger
from memadvise.memory.estimate import estimate
from memadvise.memory.measure import measure_cpu
from memadvise.target import Target

TOLERANCE = 0.001


def compare(target: Target) -> tuple[MemoryLedger, MemoryLedger]:
    traced, measured = estimate(target, device="cpu"), measure_cpu(target)
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, rel=TOLERANCE)
    assert traced.peak_phase == measured.peak_phase
    for phase in measured.phases:
        assert traced.phase(phase.phase).peak_bytes == pytest.approx(phase.peak_bytes, rel=TOLERANCE), phase.phase
    assert traced.state_bytes == measured.state_bytes
    return traced, measured


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_takes_what_the_allocator_gave(name: str) -> None:
    compare(ARCHITECTURES[name])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_traced_for_cuda(name: str) -> None:
    ledger = estimate(ARCHITECTURES[name], device="cuda")
    weights = ledger.by_category["weights"]
    assert ledger.peak_bytes > weights + ledger.state_bytes > weights
    assert {phase.phase for phase in ledger.phases} == {"forward", "backward", "step"}


# ---------------------------------------------------------------- gradients that are added up


class Residual(nn.Module):
    """Small layers on wide batches: what a residual connection adds up is all that the backward pass takes."""

    def __init__(self, join) -> None:
        super().__init__()
        self.layers, self.join = nn.ModuleList(nn.Linear(16, 16) for _ in range(4)), join

    def forward(self, x):
        for layer in self.layers:
            x = self.join(layer, x)
        return x.mean()


class KeptGradient(torch.autograd.Function):
    """Its gradient is held elsewhere, too: the engine cannot add to it in place."""

    kept: list[torch.Tensor] = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        KeptGradient.kept[:] = [*KeptGradient.kept[-1:], gradient * 2]
        return KeptGradient.kept[-1]


class SumInPython(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2 + gradient * 3


JOINS = {
    "sum": lambda layer, x: x + layer(x).sin(),
    "three ways": lambda layer, x: x + layer(x).relu() + x.tanh(),
    "checkpointed": lambda layer, x: x + checkpoint(lambda x: layer(x).relu() * x, x, use_reentrant=False),
    "slices": lambda layer, x: torch.cat((layer(x[::2]).sin(), x[1::2]), 0) + x,
    "square": lambda layer, x: layer(x) * x + x * x,
    "transposed": lambda layer, x: x + layer(x.t().reshape(-1, 16)).view(16, -1).t().cos(),
    "gradient kept": lambda layer, x: KeptGradient.apply(x) + KeptGradient.apply(layer(x).sin()) + x,
    "sum in Python": lambda layer, x: SumInPython.apply(layer(x)) + SumInPython.apply(x),
}


@pytest.mark.parametrize("name", JOINS)
def test_gradients_are_added_up_as_the_engine_does(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    compare(
        Target(
            build_model=partial(Residual, JOINS[name]),
            build_batches=lambda: [torch.randn(4096, 16, generator=generator) for _ in range(2)],
        )
    )


# ---------------------------------------------------------------- techniques


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def _keep_products(ctx, op, *args, **kwargs):
    keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


RECOMPUTE = {
    "nothing": lambda block, x: block(x),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, _keep_products),
    ),
    "selective by a list": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]),
    ),
}


class Stack(nn.Module):
    def __init__(self, recompute: str = "nothing", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.recompute = RECOMPUTE[recompute]
        self.to(dtype)

    def forward(self, x):
        x = x.to(self.blocks[0].up.weight.dtype).requires_grad_()
        for block in self.blocks:
            x = self.recompute(block, x)
        return x.float().square().mean()


def _plain(model, batch, optimizer):
    model(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def _autocast(device, dtype, model, batch, optimizer):
    with torch.autocast(device, dtype=dtype):
        loss = model(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _scaled(device):
    scalers: list[torch.amp.GradScaler] = []  # made in the step: outside a trace there may be no CUDA to make it for

    def step(model, batch, optimizer):
        if not scalers:
            scalers.append(torch.amp.GradScaler(device))
            assert scalers[0].is_enabled()
        scaler = scalers[0]
        with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
            loss = model(batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def _accumulated(model, batch, optimizer):
    for part in batch.chunk(4):
        (model(part) / 4).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _kept_gradients(model, batch, optimizer):
    optimizer.zero_grad(set_to_none=False)
    model(batch).backward()
    optimizer.step()


def _clipped(how, model, batch, optimizer):
    model(batch).backward()
    if how == "norm":
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    elif how == "foreach norm":
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    else:
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


def _in_backward():
    """One optimizer for each parameter, stepped by a hook as soon as its gradient is there."""
    optimizers: dict[nn.Parameter, torch.optim.Optimizer] = {}

    def step_of(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    def step(model, batch, optimizer):
        if next(model.parameters()) not in optimizers:
            optimizers.clear()
            for parameter in model.parameters():
                optimizers[parameter] = torch.optim.AdamW([parameter], lr=1e-3)
                parameter.register_post_accumulate_grad_hook(step_of)
        model(batch).backward()

    return step


def _closure(model, batch, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        return loss

    optimizer.step(closure)


def _penalised(model, batch, optimizer):
    """A second backward pass through the first: the gradient's norm is a part of the loss."""
    batch = batch.requires_grad_()
    loss = model(batch)
    (gradient,) = torch.autograd.grad(loss, batch, create_graph=True)
    (loss + gradient.square().sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


TECHNIQUES = {
    **{f"checkpoint: {name}": (partial(Stack, name), None) for name in RECOMPUTE},
    "bf16": (partial(Stack, dtype=torch.bfloat16), None),
    "bf16, checkpoint": (partial(Stack, "non-reentrant", torch.bfloat16), None),
    "accumulation": (Stack, lambda device: _accumulated),
    "gradients kept": (Stack, lambda device: _kept_gradients),
    "autocast": (Stack, lambda device: partial(_autocast, device, torch.bfloat16)),
    "autocast, checkpoint": (
        partial(Stack, "non-reentrant"),
        lambda device: partial(_autocast, device, torch.bfloat16),
    ),
    "scaler": (Stack, _scaled),
    "clip by norm": (Stack, lambda device: partial(_clipped, "norm")),
    "clip by foreach norm": (Stack, lambda device: partial(_clipped, "foreach norm")),
    "clip by value": (Stack, lambda device: partial(_clipped, "value")),
    "in backward": (Stack, lambda device: _in_backward()),
    "closure": (Stack, lambda device: _closure),
    "penalty": (Stack, lambda device: _penalised),
    "step of one's own": (Stack, lambda device: _plain),
}


def technique(name: str, device: str) -> Target:
    build, step = TECHNIQUES[name]
    return Target(build_model=build, build_batches=vectors, train_step=step(device) if step else None, spec=name)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_takes_what_the_allocator_gave(name: str) -> None:
    traced, measured = estimate(technique(name, "cpu"), device="cpu"), measure_cpu(technique(name, "cpu"))
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, rel=TOLERANCE)
    for phase in measured.phases:
        assert traced.phase(phase.phase).peak_bytes == pytest.approx(phase.peak_bytes, rel=TOLERANCE), phase.phase
    assert traced.state_bytes == measured.state_bytes


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_is_traced_for_cuda(name: str) -> None:
    ledger = estimate(technique(name, "cuda"), device="cuda")
    assert ledger.peak_bytes > ledger.by_category["weights"] > 0
    assert {"forward", "backward"} <= {phase.phase for phase in ledger.phases}
