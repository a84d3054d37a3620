"""Fake CPU tensors that behave as CUDA tensors do, as far as memory is concerned; everything is undone afterwards.

Fake tensors on the device "cuda" need a CUDA build, and even there attention silently takes the wrong path; fake
CPU tensors work everywhere. What differs on CUDA is put on top: attention kernels (:mod:`.attention`), fused
dropout, softmax of half precision into fp32, the foreach default of optimizers, autocast (:mod:`.autocast`), device
arguments. For ``device="cpu"`` only what building on fake tensors needs is changed.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from memadvise.memory.architecture import DeviceModel
from memadvise.memory.attention import cuda_attention
from memadvise.memory.autocast import cuda_autocast
from memadvise.memory.cuda_calls import cuda_calls
from memadvise.memory.cudnn_rnn import KERNELS as RNN_KERNELS
from memadvise.memory.dispatch import kernels_replaced
from memadvise.memory.kernels import composites_as_they_run
from memadvise.memory.rms_norm import cuda_rms_norm, fuses

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten
_ATTENTION_KERNELS = {
    "cudnn": "cuDNN",
    "flash": "flash",
    "efficient": "memory-efficient",
    "math": "math (keeps the whole attention matrix)",
}


@dataclass
class Semantics:
    """What the layer did, for the assumptions of the ledger."""

    model: DeviceModel
    attention: Counter[str] = field(default_factory=Counter)
    foreach_by_default: bool = False
    fused_dropout: bool = False

    @property
    def device(self) -> str:
        return self.model.device

    def assumptions(self) -> list[str]:
        """One sentence for each."""
        if self.device == "cpu":
            return []
        said = [
            *self.model.sentences(),
            "The batch is on the device for the whole step, and only the batch of that step.",
        ]
        for kernel, count in sorted(self.attention.items()):
            said.append(
                f"Attention: the {_ATTENTION_KERNELS[kernel]} kernel, {count // 2 or count} calls a step (--attention)."
            )
        if self.fused_dropout:
            said.append("Dropout is the fused CUDA kernel: it keeps one byte an element.")
        return said


class _Patches:
    """Attributes replaced for a while; :meth:`undo` puts every one back, newest first."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._done: set[tuple[int, str]] = set()

    def set(self, owner: Any, name: str, value: Any) -> None:
        if (id(owner), name) not in self._done:
            self._done.add((id(owner), name))
            if name in vars(owner):
                self._stack.callback(setattr, owner, name, vars(owner)[name])
            else:  # inherited
                self._stack.callback(delattr, owner, name)
            setattr(owner, name, value)

    def undo(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def device_semantics(model: DeviceModel, *, fakes: bool = True) -> Iterator[tuple[Semantics, Callable[[], None]]]:
    """Change torch for building and running a model on fake tensors; leave it exactly as it was afterwards.

    Args:
        model: the device whose semantics they are.
        fakes: False for real CPU tensors, which need nothing of what fakes need to be built.

    Yields:
        the record of what was assumed, and a function to call when more modules may have been imported (patches
        for libraries the model brings along).
    """
    semantics = Semantics(model)
    patches = _Patches()

    def patch_libraries() -> None:
        if not fakes:
            return
        for name, module in sys.modules.copy().items():  # a copy at once: another thread may be importing
            # transformers asks "is this a fake tensor?" and then keeps masks that a real step never makes.
            if name.startswith("transformers.") and name.endswith(("masking_utils", "modeling_attn_mask_utils")):
                if "is_tracing" in vars(module):
                    patches.set(module, "is_tracing", _is_not_tracing)

    with contextlib.ExitStack() as stack:
        stack.callback(patches.undo)
        if fakes:
            patches.set(nn.Module, "_apply", _apply_to_fakes)
            patches.set(torch.Tensor, "__deepcopy__", _deepcopy_fakes(torch.Tensor.__deepcopy__))
            for name, function in list(vars(nn.init).items()):
                if callable(function) and name.endswith("_") and not name.startswith("_"):
                    patches.set(nn.init, name, _leave)  # nobody reads the numbers
        stack.enter_context(composites_as_they_run())
        if semantics.device == "cuda":
            _patch_optimizers(patches, semantics)
            for owner, name, stand_in in cuda_calls(model):
                if hasattr(owner, name):  # not every torch has every function
                    patches.set(owner, name, stand_in)
            stack.enter_context(cuda_autocast())
            stack.enter_context(_cuda_kernels(semantics))
            stack.enter_context(CudaDevices())
        patch_libraries()
        yield semantics, patch_libraries


@contextlib.contextmanager
def cuda_stood_in_for(model: DeviceModel) -> Iterator[None]:
    """While open, what asks for CUDA gets the CPU and the assumed device's answers; for batches, which are real."""
    patches = _Patches()
    with contextlib.ExitStack() as stack:
        stack.callback(patches.undo)
        for owner, name, stand_in in cuda_calls(model):
            if hasattr(owner, name):
                patches.set(owner, name, stand_in)
        stack.enter_context(CudaDevices())
        yield


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the random states of torch (CPU and CUDA devices in use) and Python back at the end."""
    state, python_state = torch.get_rng_state(), random.getstate()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def _is_not_tracing(tensor: Any = None) -> bool:
    return torch.compiler.is_compiling()  # so it would be in a real step, compiled or not


def _leave(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _deepcopy_fakes(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``Tensor.__deepcopy__`` for fakes: torch's own gives a parameter a second storage, and fails for a buffer."""

    def deepcopy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if type(tensor) is not FakeTensor or not tensor.is_leaf:
            return original(tensor, memo)
        if id(tensor) in memo:
            return memo[id(tensor)]  # type: ignore[no-any-return]
        made = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, tensor.requires_grad)
        elif tensor.requires_grad:
            made.requires_grad_()
        memo[id(tensor)] = made
        for name, value in vars(tensor).items():  # marks that user code leaves on parameters
            if name not in vars(made):
                setattr(made, name, copy.deepcopy(value, memo))
        return made

    return deepcopy


def _apply_to_fakes(module: nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
    """``Module._apply`` for fakes: sets the data in place, where torch would swap tensors and refuse."""
    if recurse:
        for child in module.children():
            child._apply(fn)
    for name, param in module._parameters.items():
        if param is not None:
            with torch.no_grad():
                applied = fn(param)
                if applied is not param and applied.device != param.device:  # filled in after a start on "meta"
                    module._parameters[name] = nn.Parameter(applied, param.requires_grad)
                    continue
                if applied is not param:
                    param.data = applied
                if param.grad is not None:
                    param.grad.data = fn(param.grad)
    for key, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[key] = fn(buffer)
    return module


def _patch_optimizers(patches: _Patches, semantics: Semantics) -> None:
    """``foreach=None`` means the foreach implementation for parameters on CUDA."""

    def default(params: Any, differentiable: bool, use_fused: bool = False) -> tuple[bool, bool]:
        foreach = not differentiable and not use_fused
        semantics.foreach_by_default |= foreach
        return (use_fused and not differentiable), foreach

    supported = "_get_foreach_kernels_supported_devices"  # what gradient clipping and averaged weights ask
    for name, module in list(sys.modules.items()):
        if name.startswith(("torch.utils._foreach_utils", "torch.optim.")) and supported in vars(module):
            patches.set(module, supported, lambda: ["cpu"])
        if name.startswith("torch.optim.") and "_default_to_fused_or_foreach" in vars(module):
            patches.set(module, "_default_to_fused_or_foreach", default)
    patches.set(nn.utils.clip_grad, "_has_foreach_support", lambda tensors, device: True)


def _is_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, int) and not isinstance(value, bool)  # an ordinal


def _default_is_cuda() -> bool:
    """Whether ``torch.set_default_device("cuda")`` holds: its mode lies below every other and would act after ours."""
    return _is_cuda(getattr(torch.utils._device, "CURRENT_DEVICE", None))


class CudaDevices(TorchFunctionMode):
    """Turns device arguments (and a default device) that say CUDA into the CPU, where the fake tensors are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if _is_cuda(device) or (device is None and func in _device_constructors() and _default_is_cuda()):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to:
            args = (args[0], *("cpu" if _is_cuda(value) else value for value in args[1:]))
        elif func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        elif func is torch.Tensor.backward:
            with self:  # a mode is off inside the functions that it sees, but checkpointed modules run in here
                return _backward(*args, **kwargs)
        return func(*args, **kwargs)


def _backward(
    tensor: torch.Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


@contextlib.contextmanager
def _cuda_kernels(semantics: Semantics) -> Iterator[None]:
    """Composite operations that CUDA composes differently, replaced in the dispatcher: whoever calls them, they
    take the CUDA way.
    """

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        return cuda_attention(*args, **kwargs, model=semantics.model, used=semantics.attention)

    def dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        if not train or p == 0 or x.numel() == 0:
            return x
        if p == 1:
            return x.mul(torch.zeros((), dtype=x.dtype))
        semantics.fused_dropout = True
        return torch.native_dropout(x, p, True)[0]

    def softmax(kernel: Any) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
            if dtype is torch.float32 and x.dtype in _HALF:
                return kernel(x, dim, True)  # reads half and writes fp32: no fp32 copy of the input
            return kernel(x if dtype is None else x.to(dtype), dim, False)

        return run

    with kernels_replaced("AutogradCPU") as replace:
        replace("scaled_dot_product_attention", attention)
        replace("dropout", dropout)
        replace("softmax.int", softmax(_aten._softmax))
        replace("log_softmax.int", softmax(_aten._log_softmax))
        for name, kernel in RNN_KERNELS.items():
            replace(name, kernel)
        if fuses(semantics.model):
            replace("rms_norm", cuda_rms_norm)
        yield
