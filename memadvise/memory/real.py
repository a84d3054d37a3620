"""A step on real tensors, where fake ones cannot go on: shapes that depend on computed numbers, kernels without a fake.

The model, the batch and the step are the user's, computed on the CPU; the recorder that follows fake storages follows
these. For ``device="cuda"`` the semantics of CUDA lie on top as they do on fakes. Before and while it runs, the
memory of this machine is watched: what does not fit ends with :class:`DoesNotFit`, not with a killed process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from memadvise.errors import EnvironmentProblem, MemadviseError, TargetRaised
from memadvise.memory.allocator_log import allocator_log
from memadvise.memory.architecture import DeviceModel, device_model
from memadvise.memory.hostvalues import AfterGuess, NotOnFakes
from memadvise.memory.kept_torch import torch_kept
from memadvise.memory.semantics import device_semantics, random_state_kept
from memadvise.memory.session import Built, Session, batches_of, own_copy
from memadvise.target import Target

_CHECK_EVERY = 1 << 26  # bytes of results between two looks at the memory that is left
_SHARE = 0.8  # of the memory available that weights, gradients and optimizer state may take: activations come on top
_QUICK = 1 << 28  # bytes of weights, gradients and state up to which a step for real is no long wait
_UNKNOWN = 1 << 30  # assumed to be available where the system does not say
_FAULTS_OF_FAKES = (
    fake_tensor.UnsupportedOperatorException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
)
# torch raises these as plain RuntimeErrors.
_SAID_BY_FAKES = (
    "FakeTensor",
    "fake impl",
    ".numpy() is not supported for tensor subclasses",
    "data pointer",
    "no rule registered for HigherOrderOperator",
    "meta tensor",
    "Meta tensor",
)


_aten = torch.ops.aten
_FACTORIES = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default}
_BY_VALUES = {  # kernels whose scratch depends on the numbers that they get
    _aten.nonzero.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.masked_select.default,
    _aten.bincount.default,
    _aten.repeat_interleave.Tensor,
    _aten._ctc_loss.default,
    _aten._ctc_loss.Tensor,
    _aten._ctc_loss_backward.default,
    _aten._ctc_loss_backward.Tensor,
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


class DoesNotFit(EnvironmentProblem):
    """The step on real tensors would take more memory than this machine has."""


def fault_of_fakes(error: BaseException) -> str | None:
    """What fake tensors could not do, if that is why ``error`` was raised; None for a mistake of the program's own."""
    if isinstance(error, NotOnFakes):
        return error.message
    cause = error.__cause__ if isinstance(error, TargetRaised) and error.__cause__ is not None else error
    said = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    if isinstance(cause, _FAULTS_OF_FAKES) or any(words in str(cause) for words in _SAID_BY_FAKES):
        where = error.where if isinstance(error, MemadviseError) else None
        return f"{where}: {said}" if where is not None else said
    return None


def available_bytes() -> int:
    """Memory that this process can still take: what the system calls available, within its control group's limit.

    1 GiB where the system does not say.
    """
    found = [_meminfo(), *_control_groups()]
    known = [size for size in found if size is not None]
    return max(0, min(known)) if known else _UNKNOWN


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        try:  # no Linux: half of what is built in
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, ValueError, OSError):
            return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _control_groups() -> Iterator[int | None]:
    """Limit less use of the control group, version 2 and version 1, as a container sees its own."""
    root = Path("/sys/fs/cgroup")
    for limit, use in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            yield int((root / limit).read_text()) - int((root / use).read_text())
        except (OSError, ValueError):  # no such version, or "max": no limit
            yield None


def fits(num_bytes: int) -> bool:
    """Whether a step whose weights, gradients and optimizer state take ``num_bytes`` may be run for real here."""
    return num_bytes <= _SHARE * available_bytes()


def worth_running(problem: Exception, least: int | None) -> bool:
    """Whether a step that failed with ``problem`` on fake tensors should be tried on real ones.

    Args:
        problem: why it failed. What looks like a mistake of the program's own is tried if that does not take long, or
            if values were guessed before.
        least: bytes that the step takes at the least; None where the model could not even be built.
    """
    if least is None:
        return isinstance(problem, TargetRaised | NotOnFakes)  # the memory is watched while it is built
    known = fault_of_fakes(problem) is not None or isinstance(problem, AfterGuess)
    return fits(least) and (known or least <= _QUICK)


class MemoryWatch(TorchDispatchMode):
    """Raises :class:`DoesNotFit` when little of the memory that was available at the beginning is left."""

    def __init__(self) -> None:
        super().__init__()
        self._keep = max(1 << 28, available_bytes() // 20)
        self._since = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        largest = 0  # memory that is handed out is taken when it is written to: the system counts it later
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                size = tensor.numel() * tensor.element_size()
                largest, self._since = max(largest, size), self._since + size
        if self._since >= _CHECK_EVERY:
            self._since = 0
            if available_bytes() - (largest if func in _FACTORIES else 0) < self._keep:
                raise DoesNotFit("the step on real tensors needs more memory than this machine has")
        return out


def scratch_by_values(func: Any, args: Any, kwargs: Any) -> list[int]:
    """Bytes that ``func`` takes on the CPU beyond its result, found by running it beforehand on copies; mostly none."""
    if func not in _BY_VALUES or not _has_mask(func, args):
        return []
    with _disable_current_modes():
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        with allocator_log() as log:
            kept = func(*args, **kwargs)
        del kept
    level = peak = 0
    for size in log.sizes():
        level += size
        peak = max(peak, level)
    return [peak - level] if peak > level else []


def _has_mask(func: Any, args: Any) -> bool:
    """False for an index of positions alone, which takes nothing."""
    if not func._schema.name.removeprefix("aten::").lstrip("_").startswith("index"):
        return True
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


@contextlib.contextmanager
def real_session(
    target: Target, device: str | DeviceModel = "cuda", *, batches: int | Sequence[Any] = 2
) -> Iterator[Session]:
    """Build ``target`` on real CPU tensors with the semantics of ``device`` ("cuda", "cpu" or a model) while open.

    Everything is computed and takes memory. Afterwards torch and its random state are as before.

    Raises:
        DoesNotFit: also from whatever runs inside. TargetError, TargetRaised: from the target's own functions.
    """
    assumed = device_model(device)
    with contextlib.ExitStack() as stack:
        kept_torch = stack.enter_context(torch_kept())
        stack.enter_context(random_state_kept())
        real_batches = [own_copy(batch) for batch in batches_of(target, assumed, batches)]
        semantics, patch_libraries = stack.enter_context(device_semantics(assumed, fakes=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(MemoryWatch())
        if assumed.is_cuda:
            from memadvise.memory.cuda_on_cpu import CudaOnCpu

            stack.enter_context(CudaOnCpu())
        with Built(fakes=False) as built:
            model = target.model()
        patch_libraries()
        yield Session(model, real_batches, semantics, built, kept_torch)
