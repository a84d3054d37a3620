"""Scratch memory that kernels take from the allocator without the dispatcher seeing it.

CUDA: formulas from the kernels' sources. CPU: what oneDNN takes depends on the processor, so the kernels known to
take some are run once per shape on zeros, alone, and the allocator is watched; large ones are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from memadvise.memory.allocator_log import allocator_log

_aten = torch.ops.aten
_MAX_MEASURED_BYTES = 1 << 27


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


class KernelScratch:
    """Scratch sizes by operation and arguments for one device.

    Attributes:
        measured: how many kernels were run to learn their scratch.
        skipped: how many were too large for that.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.measured = 0
        self.skipped = 0

    def __call__(self, func: Any, args: Any, kwargs: Any) -> list[int]:
        """Bytes of each scratch block that ``func`` holds while it runs; empty for most operations."""
        if self._cuda:
            formula = _CUDA.get(func)
            return formula(args) if formula is not None else []
        return self._measure(func, args, kwargs or {}) if func in _MEASURED_ON_CPU else []

    def _measure(self, func: Any, args: Any, kwargs: Any) -> list[int]:
        leaves = tree_flatten((args, kwargs))[0]
        if sum(_num_bytes(x) for x in leaves if isinstance(x, torch.Tensor)) > _MAX_MEASURED_BYTES:
            self.skipped += 1
            return []
        key = (func, *(_signature(x) for x in leaves))
        size = _learned.get(key)
        if size is None:
            self.measured += 1
            size = _learned[key] = _run_alone(func, args, kwargs)
        return [size] if size else []

    def assumptions(self) -> list[str]:
        """How the numbers came about, one sentence each."""
        if self._cuda:
            return ["Scratch inside attention and normalisation kernels follows their sources; cuDNN's is not counted."]
        said = ["Sizes are exact bytes as on the CPU; scratch inside convolution, normalisation and attention kernels "
                "is what those kernels take on this machine."]  # fmt: skip
        if self.skipped:
            said.append(f"Scratch of {self.skipped} kernels is not counted: they are too large to be tried alone.")
        return said


_learned: dict[Any, int] = {}  # a property of this machine and this torch: kept for the life of the process


def _signature(x: Any) -> Any:
    return (x.dtype, tuple(x.shape), x.stride()) if isinstance(x, torch.Tensor) else repr(x)


def _run_alone(func: Any, args: Any, kwargs: Any) -> int:
    """The most that the allocator holds while ``func`` runs, beyond what it returns."""

    def real(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu").zero_()

    with _disable_current_modes(), torch.no_grad():
        real_args, real_kwargs = tree_map(real, (args, kwargs))
        with allocator_log() as log:
            kept = func(*real_args, **real_kwargs)
        del kept  # after the log has closed: what is returned is not scratch
    level = peak = 0
    for size in log.sizes():
        level += size
        peak = max(peak, level)
    return peak - level
