"""Scratch memory that kernels take from the allocator without the dispatcher seeing it.

CUDA: formulas from the kernels' sources. CPU: what oneDNN takes depends on the processor, so the kernels known to
take some are run once per shape on zeros, alone, and the allocator is watched; large ones are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from memadvise.memory.allocator_log import allocator_log

_aten = torch.ops.aten
_MAX_MEASURED_BYTES = 1 << 27
_HALF = (torch.float16, torch.bfloat16)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flash_backward(args: tuple[Any, ...]) -> list[int]:
    """FlashAttention-2: fp32 accumulator of dq, row sums, and dk, dv per query head when queries are grouped."""
    query, key = args[1], args[2]
    batch, heads, length, head_dim = query.shape
    rows = -(-length // 128) * 128
    columns = -(-head_dim // 32) * 32 if head_dim <= 192 else 256
    scratch = [4 * batch * rows * heads * columns, 4 * batch * heads * rows]
    if key.shape[1] != heads:
        scratch += [query.element_size() * batch * key.shape[2] * heads * head_dim] * 2
    return scratch


def _efficient_backward(args: tuple[Any, ...]) -> list[int]:
    """The row sums in fp32, and the fp32 accumulator of dq when the output is narrower."""
    query = args[1]
    batch, heads, length, head_dim = query.shape
    rows = 4 * batch * heads * length
    return [rows] if query.dtype is torch.float32 else [rows, rows * head_dim]


def _contiguous_copies(*positions: int) -> Callable[[tuple[Any, ...]], list[int]]:
    """Kernels that begin with ``input.contiguous()``."""

    def scratch(args: tuple[Any, ...]) -> list[int]:
        return [_num_bytes(args[i]) for i in positions if not args[i].is_contiguous()]

    return scratch


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
    _aten.logsumexp.default: lambda args: [_num_bytes(args[0])],  # exp(x - max)
}
_CUDA: dict[Any, Callable[[tuple[Any, ...]], list[int]]] = {
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    _aten.native_layer_norm.default: _contiguous_copies(0),
    _aten.native_layer_norm_backward.default: _contiguous_copies(0, 1),
    _aten.native_group_norm.default: _contiguous_copies(0),
    _aten._softmax.default: _contiguous_copies(0),
    _aten._log_softmax.default: _contiguous_copies(0),
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
_MATRIX_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}
_LSTM = _aten.mkldnn_rnn_layer.default
_WORKSPACE = 3  # the output of _LSTM that the backward pass reads; fake tensors make it empty


class KernelScratch:
    """Scratch sizes by operation and arguments for one device.

    Attributes:
        measured: how many kernels were run to learn their scratch.
        skipped: how many were too large for that, or would not run on zeros.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.measured = 0
        self.skipped = 0

    def __call__(self, func: Any, args: Any, kwargs: Any) -> list[int]:
        """Bytes of each scratch block that ``func`` holds while it runs; empty for most operations."""
        formula = _ANY_DEVICE.get(func) or (_CUDA.get(func) if self._cuda else None)
        if formula is not None or self._cuda:
            return formula(args) if formula is not None else []
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
            if sum(_num_bytes(x) for x in leaves if isinstance(x, torch.Tensor)) > _MAX_MEASURED_BYTES:
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
            return ["Scratch inside attention and normalisation kernels follows their sources; cuDNN's is not counted."]
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
        workspace = _num_bytes(kept[_WORKSPACE]) if func is _LSTM else 0
        del kept  # after the log has closed: what is returned is not scratch
    level = peak = 0
    for size in log.sizes():
        level += size
        peak = max(peak, level)
    return _Learned(peak - level, workspace)
