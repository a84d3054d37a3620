"""The tensors of a model and of an optimizer, and whose they are."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memadvise.names import canonical_name

_IMPLEMENTATIONS: dict[str | None, dict[str, Any]] = {
    None: {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
}


def default_optimizer(model: nn.Module, implementation: str | None = None) -> torch.optim.Optimizer:
    """``torch.optim.AdamW`` over the trainable parameters: ``implementation`` fused, foreach or for-loop, or torch's
    default for the device.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-3, **_IMPLEMENTATIONS[implementation])


def state_tensors(*optimizers: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor | None, torch.Tensor]]:
    """Every tensor of the optimizers' ``.state`` with the parameter that it belongs to."""

    def inside(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from inside(item)
        elif isinstance(value, list | tuple):
            for item in value:
                yield from inside(item)

    for optimizer in optimizers:
        for key, value in optimizer.state.items():
            for tensor in inside(value):
                yield (key if isinstance(key, torch.Tensor) else None), tensor


@contextlib.contextmanager
def stepping_optimizers() -> Iterator[list[torch.optim.Optimizer]]:
    """The optimizers that make a step while open, in the order of their first: a step may use some of its own."""
    found: list[torch.optim.Optimizer] = []

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not any(optimizer is other for other in found):
            found.append(optimizer)

    handle = register_optimizer_step_post_hook(note)
    try:
        yield found
    finally:
        handle.remove()


@lru_cache
def dtype_name(dtype: torch.dtype) -> str:
    """Torch's name of a dtype: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def state_bytes(*optimizers: torch.optim.Optimizer) -> int:
    """The sum of ``numel * itemsize`` over the different tensors of the optimizers' ``.state``.

    A wrapper subclass counts as the tensors that it wraps: 8-bit states call themselves floats of the whole shape.
    """
    tensors = {id(tensor): tensor for _, tensor in state_tensors(*optimizers)}
    parts = (part for tensor in tensors.values() for part in storage_parts(tensor))
    return sum(part.numel() * part.element_size() for part in parts)


def model_tensors(model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, module name, tensor) of everything the model holds: parameters, buffers, plain tensor attributes."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield "weights", canonical_name(name).rpartition(".")[0], parameter
    for name, module in model.named_modules():
        owner = canonical_name(name)
        for buffer in module._buffers.values():
            if buffer is not None:
                yield "buffers", owner, buffer
        for value in vars(module).values():
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, torch.Tensor):
                    yield "buffers", owner, item


def optimizer_name(optimizer: torch.optim.Optimizer, device: str) -> str:
    """Its class and, for torch's own, the implementation that runs on ``device``: "torch.optim.AdamW (foreach)"."""
    name = type(optimizer).__name__
    if not type(optimizer).__module__.startswith("torch.optim"):
        return name
    group = optimizer.param_groups[0]
    if group.get("fused"):
        kind = "fused"
    elif group.get("foreach") or (group.get("foreach") is None and "foreach" in group and device == "cuda"):
        kind = "foreach"
    else:
        kind = "for-loop"
    return f"torch.optim.{name} ({kind})"


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """No cycle is collected at some moment inside, which would make two traces differ."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def storage_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The dense tensors that hold the memory of ``tensor``."""
    wrapper: Any = tensor
    if tensor.layout is torch.sparse_coo:
        yield tensor._indices()
        yield tensor._values()
    elif is_traceable_wrapper_subclass(wrapper):
        for name in wrapper.__tensor_flatten__()[0]:
            part = getattr(wrapper, name)
            if isinstance(part, torch.Tensor):  # a DTensor names its mesh, too
                yield from storage_parts(part)
    else:
        yield tensor
