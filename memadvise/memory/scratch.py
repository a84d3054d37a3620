"""Scratch memory that kernels take from the allocator without the dispatcher seeing it.

CUDA: formulas from the kernels' sources (:mod:`.cuda_scratch`). CPU: what oneDNN takes depends on the processor, so
the kernels known to take some are run once per shape on zeros, alone, and the allocator is watched; large ones are left
out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from memadvise.memory import cudnn_convolution
from memadvise.memory.allocator_log import allocator_log
from memadvise.memory.architecture import DeviceModel
from memadvise.memory.cuda_scratch import FORMULAS, num_bytes
from memadvise.units import format_bytes

_aten = torch.ops.aten
_MAX_MEASURED_BYTES = 1 << 27
_HALF = (torch.float16, torch.bfloat16)


def _elements_bytes(args: tuple[Any, ...]) -> int:
    return math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape)) * args[0].element_size()


# Position of ``reduction`` (0 = none, default 1) among the arguments of losses whose result is a scalar in memory that
# was made for every element: it is shrunk with "resize_", which keeps the memory (Loss.cpp).
_KEEPS_ELEMENTS = {
    _aten.mse_loss.default: 2,
    _aten.smooth_l1_loss.default: 2,
    _aten.binary_cross_entropy.default: 3,
}


def _reduces(args: tuple[Any, ...], position: int) -> bool:
    return bool((args[position] if len(args) > position else 1) != 0)


def kept_bytes(func: Any, args: Any) -> int:
    """Bytes of the memory behind the result of ``func`` where that is more than its elements need; else 0."""
    position = _KEEPS_ELEMENTS.get(func)
    return _elements_bytes(args) if position is not None and _reduces(args, position) else 0


def _every_element(args: tuple[Any, ...]) -> list[int]:
    """Losses that are computed for every element and then reduced, ``reduction`` being the third argument."""
    return [_elements_bytes(args)] if _reduces(args, 2) else []


_ANY_DEVICE: dict[Any, Callable[[tuple[Any, ...]], list[int]]] = {
    _aten.mse_loss.default: _every_element,
    _aten.smooth_l1_loss.default: _every_element,
    _aten.huber_loss.default: _every_element,
    _aten.binary_cross_entropy_with_logits.default: lambda args: [_elements_bytes(args)] * 2,
    _aten.logsumexp.default: lambda args: [num_bytes(args[0])],  # exp(x - max)
}
_MEASURED_ON_CPU = {
    _aten.convolution.default,
    _aten.convolution_backward.default,
    _aten.native_batch_norm.default,
    _aten.native_batch_norm_backward.default,
    _aten.native_layer_norm.default,
    _aten.native_layer_norm_backward.default,
    _aten.native_group_norm.default,
    _aten.native_group_norm_backward.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    _aten.max_pool2d_with_indices_backward.default,
    _aten.mkldnn_rnn_layer.default,
    _aten.mkldnn_rnn_layer_backward.default,
}
_PROMOTING = {  # element by element, of two tensors
    overload
    for name in (
        *("add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "fmod", "remainder", "atan2", "hypot"),
        *("eq", "ne", "lt", "le", "gt", "ge", "add_", "sub_", "mul_", "div_"),
    )
    for overload in (getattr(getattr(_aten, name), kind, None) for kind in ("Tensor", "Tensor_Tensor", "default"))
    if overload is not None
}
_MATRIX_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}
_LSTM = _aten.mkldnn_rnn_layer.default
_WORKSPACE = 3  # the output of _LSTM that the backward pass reads; fake tensors make it empty


def _promoted(args: tuple[Any, ...]) -> list[int]:
    """On the CPU an operand of another dtype than both are computed in is converted first, whole (TensorIterator)."""
    if len(args) < 2 or not all(isinstance(x, torch.Tensor) for x in args[:2]) or args[0].dtype == args[1].dtype:
        return []
    common = torch.result_type(*args[:2])
    return [x.numel() * common.itemsize for x in args[:2] if x.ndim and x.dtype != common]


class KernelScratch:
    """Scratch sizes by operation and arguments for one device.

    Attributes:
        measured: how many kernels were run to learn their scratch.
        skipped: how many were too large for that, or would not run on zeros.
        convolutions: whether there were any on CUDA.
        convolution_workspace: the most bytes that one of them takes there.
    """

    def __init__(self, model: DeviceModel) -> None:
        self._model = model
        self._cuda = model.is_cuda
        self.measured = 0
        self.skipped = 0
        self.convolutions = False
        self.convolution_workspace = 0

    def __call__(self, func: Any, args: Any, kwargs: Any) -> list[int]:
        """Bytes of each scratch block that ``func`` holds while it runs; empty for most operations."""
        formula = _ANY_DEVICE.get(func)
        if formula is not None:
            return formula(args)
        if self._cuda:
            of_cuda = FORMULAS.get(func)
            taken = of_cuda(args, kwargs or {}, self._model) if of_cuda is not None else []
            if func in cudnn_convolution.FORMULAS:
                self.convolutions = True
                self.convolution_workspace = max(self.convolution_workspace, *taken, 0)
            return taken
        if func in _PROMOTING:
            return _promoted(args)
        if func in _MEASURED_ON_CPU or (func in _MATRIX_PRODUCTS and args[-1].dtype in _HALF):
            scratch = self._learn(func, args, kwargs or {}).scratch
            return [scratch] if scratch else []
        return []

    def completed(self, func: Any, args: Any, out: Any) -> Any:
        """``out`` with the sizes that fake tensors leave out: what oneDNN's LSTM keeps for its backward pass."""
        if func is not _LSTM or self._cuda:
            return out
        workspace = self._learn(func, args, {}).workspace
        return (*out[:_WORKSPACE], out[_WORKSPACE].new_empty(workspace), *out[_WORKSPACE + 1 :])

    def _learn(self, func: Any, args: Any, kwargs: Any) -> _Learned:
        leaves = tree_flatten((args, kwargs))[0]
        key = (func, *(_signature(x) for x in leaves))
        learned = _learned.get(key)
        if learned is None:
            if sum(num_bytes(x) for x in leaves if isinstance(x, torch.Tensor)) > _MAX_MEASURED_BYTES:
                self.skipped += 1
                return _Learned()
            try:
                learned = _run_alone(func, args, kwargs)
            except RuntimeError:  # fake tensors may have other dtypes than the kernel gives and takes
                self.skipped += 1
                return _Learned()
            self.measured += 1
            _learned[key] = learned
        return learned

    def assumptions(self) -> list[str]:
        """How the numbers came about, one sentence each."""
        if self._cuda:
            said = ["Scratch inside attention, normalisation, embedding, indexing, sorting, reduction and matrix "
                    "kernels follows their sources."]  # fmt: skip
            if self.convolutions:
                rule = "by a rule that was measured" if self._model.cudnn_workspace is None else "as assumed"
                said.append(
                    f"cuDNN's workspace of a convolution, up to {format_bytes(self.convolution_workspace)} here, is "
                    f"counted {rule}; with cudnn.benchmark it may be more (--assume cudnn_workspace=)."
                )
            return said
        said = ["Sizes are exact bytes as on the CPU; scratch inside convolution, normalisation, attention and "
                "half-precision matrix kernels is what those kernels take on this machine."]  # fmt: skip
        if self.skipped:
            said.append(
                f"Scratch of {self.skipped} kernels is not counted: they are too large to be tried alone, or would not "
                "run on zeros."
            )
        return said


@dataclass(frozen=True)
class _Learned:
    """Bytes a kernel takes while it runs, and the bytes of the workspace that the LSTM returns."""

    scratch: int = 0
    workspace: int = 0


_learned: dict[Any, _Learned] = {}  # a property of this machine and this torch: kept for the life of the process


def _signature(x: Any) -> Any:
    return (x.dtype, tuple(x.shape), x.stride()) if isinstance(x, torch.Tensor) else repr(x)


def _run_alone(func: Any, args: Any, kwargs: Any) -> _Learned:
    """The most that the allocator holds while ``func`` runs, beyond what it returns."""

    def real(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu").zero_()

    with _disable_current_modes(), torch.enable_grad():  # without gradients, an LSTM keeps no workspace
        real_args, real_kwargs = tree_map(real, (args, kwargs))
        with allocator_log() as log:
            kept = func(*real_args, **real_kwargs)
        workspace = num_bytes(kept[_WORKSPACE]) if func is _LSTM else 0
        del kept  # after the log has closed: what is returned is not scratch
    level = peak = 0
    for size in log.sizes():
        level += size
        peak = max(peak, level)
    return _Learned(peak - level, workspace)
