"""Build a target on fake tensors: shapes, dtypes and autograd as ever, no memory for weights or activations."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake
from torch.utils._python_dispatch import TorchDispatchMode

from memadvise.errors import TargetError
from memadvise.memory.architecture import DeviceModel, device_model
from memadvise.memory.hostvalues import HostValues, attach_value
from memadvise.memory.kept_torch import KeptTorch, torch_kept
from memadvise.memory.semantics import Semantics, cuda_stood_in_for, device_semantics, random_state_kept
from memadvise.memory.tensors import dtype_name, storage_parts
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


def describe_batch(batch: Any) -> tuple[str, ...]:
    """Dtype and shape of every tensor of a batch: ``("int64[8, 64]", "float32[8]")``."""
    return tuple(f"{dtype_name(tensor.dtype)}{list(tensor.shape)}" for tensor in tensors_of(batch))


def own_copy(batch: Any) -> Any:
    """The batch with memory of its own for every tensor, as after a move to the device: views keep no larger
    data set alive.

    Raises:
        TargetError: a tensor has no data.
    """

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta":
            raise TargetError(
                f'a batch of the target has a tensor of shape {list(tensor.shape)} on the device "meta", without data',
                hint="make batches on the CPU (or on CUDA): their numbers decide masks, lengths and routes",
            )
        return tensor.detach().clone()

    return map_tensors(batch, own)


class Built(TorchDispatchMode):
    """While open, notes the memory that operations make; what outlives the building is a part of the program, also
    where the model does not hold it: a teacher in a closure, a table in a global.

    Args:
        fakes: whether fake tensors are what counts, or real ones.
    """

    def __init__(self, *, fakes: bool) -> None:
        super().__init__()
        self._fakes = fakes
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            for part in storage_parts(out):
                if isinstance(part, FakeTensor) is not self._fakes:
                    continue
                storage = part.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage), part.ndim
        return out

    def strangers(self, known: Callable[[torch.UntypedStorage], object]) -> Iterator[tuple[torch.UntypedStorage, int]]:
        """The memory that the program still holds in tensors and that is not ``known``, and the number of dimensions
        of what it was made for.
        """
        storages = ((ref(), dimensions) for ref, dimensions in self._storages.values())
        unknown = [(s, dimensions) for s, dimensions in storages if s is not None and not known(s)]
        if unknown:
            gc.collect()  # what only cycles hold is there for a moment
            held = set()  # torch.load keeps memory of fakes that no tensor has any more
            for found in gc.get_objects():
                if issubclass(type(found), torch.Tensor):
                    with contextlib.suppress(NotImplementedError, RuntimeError):  # no memory of that kind behind it
                        held |= {part.untyped_storage()._cdata for part in storage_parts(found)}
            yield from ((s, dimensions) for s, dimensions in unknown if s._cdata in held)


@dataclass(frozen=True)
class Session:
    """A model and batches to run steps on; unpacks as ``model, batches``.

    Attributes:
        built: what building the model has made.
        kept_torch: torch as it was before.
        host_values: what was read back from fake tensors; None where the tensors are real.
        fake_mode: that of the fake tensors; None where they are real.
    """

    model: nn.Module
    batches: list[Any]
    semantics: Semantics
    built: Built
    kept_torch: KeptTorch
    host_values: HostValues | None = None
    fake_mode: FakeTensorMode | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.batches))


@contextlib.contextmanager
def fake_session(
    target: Target, device: str | DeviceModel = "cuda", *, batches: int | Sequence[Any] = 2
) -> Iterator[Session]:
    """Build ``target`` under FakeTensorMode with the semantics of ``device`` ("cuda", "cpu" or a model) while open.

    Batches (the first so many of the target, or the given ones) are built for real first; their integer and boolean
    tensors keep their values for host reads. Afterwards the random state of torch and Python is as before, and so
    is every attribute of torch.

    Raises:
        TargetError, TargetRaised: from the target's own functions. UsageError: an unknown device.
    """
    assumed = device_model(device)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        kept_torch = stack.enter_context(torch_kept())
        stack.enter_context(random_state_kept())
        stack.enter_context(_failures_unlogged())
        real_batches = [own_copy(batch) for batch in batches_of(target, assumed, batches)]
        semantics, patch_libraries = stack.enter_context(device_semantics(assumed))

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            made = fake_mode.from_tensor(tensor.cpu())
            attach_value(made, tensor.cpu())
            return made

        fake_batches = [map_tensors(batch, fake) for batch in real_batches]
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code allocates out of sight
        stack.enter_context(fake_mode)
        host_values = stack.enter_context(HostValues(fake_mode))
        stack.enter_context(host_values.blamed())
        with Built(fakes=True) as built:
            model = _on_fakes(target.model(), fake_mode)
        patch_libraries()
        yield Session(model, fake_batches, semantics, built, kept_torch, host_values, fake_mode)


@contextlib.contextmanager
def _failures_unlogged() -> Iterator[None]:
    """Without torch's own traceback in the log when shapes do not fit: what it raises is told in a sentence."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def batches_of(target: Target, model: DeviceModel, batches: int | Sequence[Any]) -> Sequence[Any]:
    """The target's batches; those that it puts on CUDA stay on the CPU where there is no CUDA."""
    if not isinstance(batches, int):
        return batches
    without = model.is_cuda and not torch.cuda.is_available()
    with cuda_stood_in_for(model) if without else contextlib.nullcontext():
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
