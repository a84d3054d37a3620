"""Attention as CUDA runs it, on fake CPU tensors: which kernel, and what it saves.

The choice follows torch's own (``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``) on devices of compute
capability 8.0 and later: flash, else memory-efficient, else math.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
import torch.nn.functional as F

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


def choose_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
    enable_gqa: bool,
) -> str:
    """``"flash"``, ``"efficient"`` or ``"math"`` for query, key and value of shape (batch, heads, length, head_dim).

    ``torch.nn.attention.sdpa_kernel`` is honoured. cuDNN attention, which torch prefers on some devices for half
    precision, keeps the same tensors as flash and is not told apart.
    """
    backends = torch.backends.cuda
    head_dim = query.shape[-1]
    same_heads = query.ndim == 4 and query.shape[-3] == key.shape[-3] == value.shape[-3]
    grouped = enable_gqa and query.ndim == 4 and query.shape[-3] % key.shape[-3] == 0
    dense = query.ndim == key.ndim == value.ndim == 4 and query.shape[-2] > 0 and key.shape[-2] > 0
    if (
        (backends.flash_sdp_enabled() or (backends.cudnn_sdp_enabled() and not backends.math_sdp_enabled()))
        and dense
        and query.dtype in _HALF
        and mask is None
        and head_dim <= 256
        and head_dim == key.shape[-1] == value.shape[-1]
        and (same_heads or grouped)
        and not (is_causal and query.shape[-2] != key.shape[-2])
    ):
        return "flash"
    alignment = 8 if query.dtype in _HALF else 4
    if (
        backends.mem_efficient_sdp_enabled()
        and dense
        and same_heads  # this kernel has no grouped queries
        and query.dtype in (*_HALF, torch.float32)
        and head_dim == key.shape[-1]
        and head_dim % alignment == 0
        and value.shape[-1] % alignment == 0
    ):
        return "efficient"
    return "math"


def cuda_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    used: Counter[str] | None = None,
) -> torch.Tensor:
    """``F.scaled_dot_product_attention`` with the tensors that CUDA would allocate; counts kernels in ``used``."""
    kernel = choose_kernel(query, key, value, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)
    if used is not None:
        used[kernel] += 1
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        zero = torch.zeros((), dtype=query.dtype)
        attn_mask = torch.where(attn_mask.logical_not(), -math.inf, zero)
    if kernel == "flash":
        head_dim = query.shape[-1]
        if scale is None:
            scale = 1 / math.sqrt(head_dim)
        if head_dim % 8:
            query, key, value = (F.pad(t, (0, 8 - head_dim % 8)) for t in (query, key, value))
        out = _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :head_dim] if out.shape[-1] != head_dim else out
    if kernel == "efficient":
        if attn_mask is not None:
            length = attn_mask.shape[-1]
            if length % 16:  # the kernel needs aligned rows: pad, then look at the unpadded part
                attn_mask = F.pad(attn_mask, (0, 16 - length % 16))[..., :length]
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        differentiable = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        return _aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, differentiable, dropout_p, is_causal, scale=scale
        )[0]
    return _aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
