"""Scratch memory that CUDA kernels take from the allocator without the dispatcher seeing it, from their sources.

Each function gets the arguments of the operation and the device, and gives the bytes of every block that is alive
together with the outputs while the operation runs. File names are those below ``aten/src/ATen/native`` in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from memadvise.memory import cudnn_convolution, reductions
from memadvise.memory.architecture import DeviceModel

_aten = torch.ops.aten
_FP32 = 4
Formula = Callable[[tuple[Any, ...], dict[str, Any], DeviceModel], list[int]]


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements."""
    return tensor.numel() * tensor.element_size()


def _contiguous_copies(*positions: int) -> Formula:
    """Kernels that begin with ``input.contiguous()``."""

    def scratch(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
        return [num_bytes(args[i]) for i in positions if not args[i].is_contiguous()]

    return scratch


def _row_major_copy(gradient: torch.Tensor) -> list[int]:
    """Attention kernels want gradients contiguous as (batch, length, heads, head_dim)."""
    return [] if gradient.transpose(1, 2).is_contiguous() else [num_bytes(gradient)]


# ---------------------------------------------------------------- attention


def _flash_backward(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """FlashAttention-2 (flash_attn/flash_api.cpp, mha_bwd): fp32 accumulator of dq, row sums, and dk, dv per query head
    when queries are grouped.
    """
    query, key = args[1], args[2]
    batch, heads, length, head_dim = query.shape
    rows = -(-length // 128) * 128
    columns = -(-head_dim // 32) * 32 if head_dim <= 192 else 256
    scratch = [_FP32 * batch * rows * heads * columns, _FP32 * batch * heads * rows]
    return scratch + _per_query_head(query, key) + _row_major_copy(args[0])


def _cudnn_backward(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """cudnn-frontend's sdpa_backward: fp32 accumulator of dq and row sums, in one block.

    What the engine itself adds is not known; with grouped queries dk, dv per query head are assumed, as in flash.
    """
    query, key = args[1], args[2]
    batch, heads, length, head_dim = query.shape
    copies = [num_bytes(args[0])] if args[0].stride(-1) != 1 else []
    return [_FP32 * batch * heads * length * (head_dim + 1)] + _per_query_head(query, key) + copies


def _per_query_head(query: torch.Tensor, key: torch.Tensor) -> list[int]:
    batch, heads, _, head_dim = query.shape
    if key.shape[1] == heads:
        return []
    return [query.element_size() * batch * key.shape[2] * heads * head_dim] * 2


def _efficient_backward(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """transformers/cuda/attention_backward.cu and mem_eff_attention/kernel_backward.h.

    Row sums, and fp32 accumulators of dq by tiles, and of dk and dv where they do not fit in registers (head_dim above
    128). fp32: ``(grad * out).sum(-1)`` outside the kernel, before it.
    """
    query, key, value = args[1], args[2], args[3]
    batch, heads, length, head_dim = query.shape
    keys, widest = key.shape[2], max(head_dim, value.shape[-1])
    rows = _FP32 * batch * heads * length
    scratch = _row_major_copy(args[0]) + _per_query_head(query, key)
    tile_rows, tile_columns = (128, 64) if 64 < widest <= 128 else (64, 64)
    tiles = -(-length // tile_rows) * -(-head_dim // tile_columns)
    elements = tiles * (tile_rows * tile_columns + 4)
    if widest > 128:
        splits = max(1, min(-(-keys // tile_columns), 200 // (batch * heads)))
        elements += sum(
            splits * tile_columns * -(-width // tile_rows) * tile_rows for width in (head_dim, value.shape[-1])
        )
    accumulators = _FP32 * batch * heads * -(-elements // 4) * 4
    if query.dtype is torch.float32 and accumulators < rows * value.shape[-1]:
        return [*scratch, rows, rows * value.shape[-1]]  # both at once never are
    return [*scratch, rows, accumulators]


# ---------------------------------------------------------------- normalisation


def _layer_norm_backward(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """cuda/layer_norm_kernel.cu: partial sums of the weight's and bias's gradients for many short rows."""
    gradient, x, weight, bias, wanted = args[0], args[1], args[5], args[6], args[7]
    count = sum(tensor is not None and needed for tensor, needed in zip((weight, bias), wanted[1:], strict=True))
    return _contiguous_copies(0, 1)((gradient, x), {}, model) + _partial_sums(x, weight, count, args[2], model)


def _rms_norm_backward(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """The same kernel without a bias."""
    gradient, x, weight, wanted = args[0], args[1], args[4], args[5]
    count = int(weight is not None and wanted[1])
    return _contiguous_copies(0, 1)((gradient, x), {}, model) + _partial_sums(x, weight, count, args[2], model)


def _partial_sums(x: torch.Tensor, weight: Any, count: int, shape: Any, model: DeviceModel) -> list[int]:
    width = math.prod(shape)
    rows = x.numel() // max(1, width)
    if not count or rows <= 64 * 1024 or width // 32 >= model.architecture.num_sms // 2:
        return []
    blocks = min(32 * 1024 // -(-width // 32), -(-rows // 32))
    return [blocks * width * weight.element_size()] * count


def _group_norm(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """cuda/group_norm_kernel.cu: scale and shift of every channel, fp32."""
    batch, channels = args[3], args[4]
    return _contiguous_copies(0)(args, {}, model) + [_FP32 * batch * channels] * 2


def _group_norm_backward(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """The same file: two sums and a factor for every channel, two factors for every group, fp32."""
    batch, channels, groups = args[5], args[6], args[8]
    return (
        _contiguous_copies(0, 1)(args, {}, model)
        + [_FP32 * batch * channels] * 3
        + [_FP32 * batch * groups] * 2
    )  # fmt: skip


def _softmax_backward(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """cuda/SoftMax.cu: the gradient times the output, before the kernel."""
    return _contiguous_copies(0, 1)(args, kwargs, model) + [num_bytes(args[0])]


# ---------------------------------------------------------------- indexing and sorting


def _embedding_backward(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """cuda/Embedding.cu and EmbeddingBackwardKernel.cu: indices sorted, then sums by segments, in fp32."""
    gradient, indices, num_weights, _, by_frequency = args[:5]
    count, width = indices.numel(), gradient.shape[-1]
    scratch = _contiguous_copies(0)(args, {}, model)
    if count <= 3072 and not by_frequency:
        return scratch
    segments = min(count, num_weights)
    partial = count // 10 + segments
    itemsize = indices.element_size()
    accumulator = 8 if gradient.dtype is torch.float64 else _FP32
    return [
        *scratch,
        *[count * itemsize] * (3 if by_frequency else 2),
        *[segments * itemsize] * 3,
        partial * itemsize,
        partial * width * accumulator,
    ]


def _index_put(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """cuda/Indexing.cu, index_put_with_sort_kernel: indices made linear and sorted, and the values expanded."""
    x, indices, values = args[:3]
    accumulate = len(args) > 3 and args[3]
    given = [index for index in indices if index is not None]
    if not (accumulate or torch.are_deterministic_algorithms_enabled()) or not given:
        return []
    if any(index.dtype in (torch.bool, torch.uint8) for index in given):
        return []  # how many elements are meant depends on the values
    shape = torch.broadcast_shapes(*(index.shape for index in given))
    count = math.prod(shape)
    whole = [size for size, index in zip(x.shape, [*indices, *[None] * x.ndim], strict=False) if index is None]
    expanded = count * math.prod(whole)
    scratch = [8 * count] * 4 + [_sorted_pairs(count, 8, 8)]
    if values.numel() < expanded or not values.is_contiguous():
        scratch.append(expanded * x.element_size())
    if not x.is_contiguous():
        scratch.append(num_bytes(x))
    return scratch


def _sorted_pairs(count: int, key_bytes: int, value_bytes: int) -> int:
    """Second buffers of CUB's radix sort; its histograms are small."""
    return count * (key_bytes + value_bytes)


def _sort(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """cuda/Sort.cpp and SortStable.cu: rows above 4096 are sorted by CUB, in one of three ways."""
    x, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else -1)
    if x.ndim == 0 or x.numel() == 0 or x.shape[dim] <= 4096:
        return []
    length, itemsize, total = x.shape[dim], x.element_size(), x.numel()
    rows = total // length
    scratch = [] if x.stride(dim) == 1 and x.is_contiguous() else [num_bytes(x)]
    if rows == 1 or length >= 1_000_000:
        return [*scratch, 8 * length, _sorted_pairs(length, itemsize, 8)]
    if rows < 128:
        return [*scratch, 8 * total, 8 * total, itemsize * total, _sorted_pairs(total, itemsize, 8)]
    return [*scratch, 8 * total, _sorted_pairs(total, itemsize, 8)]


# ---------------------------------------------------------------- products, norms


def _needs_copy(matrix: torch.Tensor) -> bool:
    """cuda/Blas.cpp: cuBLAS reads rows or columns with a stride; anything else is copied."""
    rows, columns = matrix.shape[-2:]
    by_row = matrix.stride(-1) == 1 and matrix.stride(-2) >= max(1, columns)
    by_column = matrix.stride(-2) == 1 and matrix.stride(-1) >= max(1, rows)
    return not (by_row or by_column or rows == 1 or columns == 1)


def _product(first: int) -> Formula:
    def scratch(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
        return [num_bytes(matrix) for matrix in args[first : first + 2] if _needs_copy(matrix)]

    return scratch


def _foreach_norm(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """cuda/ForeachReduceOp.cu: a partial result for every 65536 elements of the largest tensor, for all of them."""
    tensors = args[0]
    chunks = max((-(-t.numel() // 65536) for t in tensors), default=0)
    return [_FP32 * len(tensors) * chunks] if chunks else []


FORMULAS: dict[Any, Formula] = {
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    _aten.native_layer_norm.default: _contiguous_copies(0),
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten.native_group_norm.default: _group_norm,
    _aten.native_group_norm_backward.default: _group_norm_backward,
    _aten._softmax.default: _contiguous_copies(0),
    _aten._log_softmax.default: _contiguous_copies(0),
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten._log_softmax_backward_data.default: _contiguous_copies(0, 1),
    _aten.embedding_dense_backward.default: _embedding_backward,
    _aten.index_put_.default: _index_put,
    _aten.index_put.default: _index_put,
    _aten._index_put_impl_.default: _index_put,
    _aten.sort.default: _sort,
    _aten.sort.stable: _sort,
    _aten.mm.default: _product(0),
    _aten.bmm.default: _product(0),
    _aten.addmm.default: _product(1),
    _aten.baddbmm.default: _product(1),
    _aten._foreach_norm.Scalar: _foreach_norm,
    **cudnn_convolution.FORMULAS,
    **reductions.FORMULAS,
}
if hasattr(_aten, "_fused_rms_norm_backward"):  # from torch 2.9 on
    FORMULAS[_aten._fused_rms_norm_backward.default] = _rms_norm_backward
    FORMULAS[_aten._fused_rms_norm.default] = _contiguous_copies(0)
