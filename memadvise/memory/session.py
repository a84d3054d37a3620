"""Build a target on fake tensors: shapes, dtypes and autograd as ever, no memory for weights or activations."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

from memadvise.memory.hostvalues import HostValues, attach_value
from memadvise.memory.semantics import CudaDevices, Semantics, check_device, device_semantics, random_state_kept
from memadvise.target import Target


def map_tensors(batch: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``batch`` with ``fn`` applied to every tensor in it; tuples, lists, named tuples and mappings are followed."""
    if isinstance(batch, torch.Tensor):
        return fn(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, fn) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [map_tensors(value, fn) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def tensors_of(batch: Any) -> list[torch.Tensor]:
    """Every tensor of a batch."""
    found: list[torch.Tensor] = []
    map_tensors(batch, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def own_copy(batch: Any) -> Any:
    """The batch with memory of its own for every tensor, as after a move to the device: views keep no larger
    data set alive.
    """
    return map_tensors(batch, lambda tensor: tensor.detach().clone())


@dataclass(frozen=True)
class FakeSession:
    """A model and batches made of fake tensors; unpacks as ``model, batches``."""

    model: nn.Module
    batches: list[Any]
    semantics: Semantics
    host_values: HostValues

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.batches))


@contextlib.contextmanager
def fake_session(target: Target, device: str = "cuda", *, batches: int | Sequence[Any] = 2) -> Iterator[FakeSession]:
    """Build ``target`` under FakeTensorMode with the semantics of ``device`` ("cuda" or "cpu") while open.

    Batches (the first so many of the target, or the given ones) are built for real first; their integer and boolean
    tensors keep their values for host reads. Afterwards the random state of torch and Python is as before, and so
    is every attribute of torch.

    Raises:
        TargetError, TargetRaised: from the target's own functions. UsageError: an unknown device.
    """
    check_device(device)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state_kept())
        stack.enter_context(_failures_unlogged())
        real_batches = [own_copy(batch) for batch in _real_batches(target, device, batches)]
        semantics, patch_libraries = stack.enter_context(device_semantics(device))

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            made = fake_mode.from_tensor(tensor.cpu())
            attach_value(made, tensor.cpu())
            return made

        fake_batches = [map_tensors(batch, fake) for batch in real_batches]
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code allocates out of sight
        stack.enter_context(fake_mode)
        host_values = stack.enter_context(HostValues(fake_mode))
        model = _on_fakes(target.model(), fake_mode)
        patch_libraries()
        yield FakeSession(model, fake_batches, semantics, host_values)


@contextlib.contextmanager
def _failures_unlogged() -> Iterator[None]:
    """Without torch's own traceback in the log when shapes do not fit: what it raises is told in a sentence."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def _real_batches(target: Target, device: str, batches: int | Sequence[Any]) -> Sequence[Any]:
    """The target's batches; those that it puts on CUDA stay on the CPU where there is no CUDA."""
    if not isinstance(batches, int):
        return batches
    with CudaDevices() if device == "cuda" and not torch.cuda.is_available() else contextlib.nullcontext():
        return target.batches(batches)


def _on_fakes(model: nn.Module, fake_mode: FakeTensorMode) -> nn.Module:
    """The model itself; or, when it was built before (a global, a cached model), a copy of it on fake tensors."""
    real = {id(t): t for t in (*model.parameters(), *model.buffers()) if not is_fake(t)}
    if not real:
        return model
    memo: dict[int, Any] = {}
    for key, tensor in real.items():
        fake = _fake_on_cpu(tensor.detach(), fake_mode)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[key] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return copy.deepcopy(model, memo)


def _fake_on_cpu(tensor: torch.Tensor, fake_mode: FakeTensorMode) -> torch.Tensor:
    """A fake CPU tensor like ``tensor``, wherever that is: on the CPU, on a GPU already, or on "meta"."""
    if tensor.device.type == "cpu":
        return fake_mode.from_tensor(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
