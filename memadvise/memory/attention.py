"""Attention as CUDA runs it, on fake CPU tensors: which kernel, and what it saves.

The choice follows torch's own (``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``): an order of kernels, each
with its conditions, and the first whose conditions hold. cuDNN comes first on Hopper and on the B200 and its kin
from torch 2.11 on, else the order is flash, memory-efficient, math.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from memadvise.memory.architecture import DeviceModel, device_model

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten
# Numbers of SDPBackend; "overrideable" has no kernel on CUDA.
_KERNELS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
_TORCHS_ORDER = ["flash", "efficient", "math", "cudnn"]
_CUDNN_FIRST = ["cudnn", "flash", "efficient", "math"]


@dataclass(frozen=True)
class _Call:
    """The arguments that decide, of shapes (batch, heads, length, head_dim)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout_p: float
    is_causal: bool
    enable_gqa: bool

    @property
    def dense(self) -> bool:
        q, k, v = self.query, self.key, self.value
        return (
            q.ndim == k.ndim == v.ndim == 4
            and q.shape[0] == k.shape[0] == v.shape[0]
            and q.shape[2] > 0
            and k.shape[2] > 0
            and all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (q, k, v))
            and (self.mask is None or self.mask.stride(-1) == 1)
        )

    @property
    def half(self) -> bool:
        return self.query.dtype in _HALF

    @property
    def requires_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.query, self.key, self.value))

    def heads_fit(self, *, grouped: bool, same_key_value: bool = True) -> bool:
        """Equal numbers of heads, or groups of queries for a kernel that takes them."""
        q, k, v = (t.shape[1] for t in (self.query, self.key, self.value))
        if not (grouped and self.enable_gqa):
            return q == k == v
        return (k == v or not same_key_value) and q % k == 0 and q % v == 0

    def mask_fits(self) -> bool:
        """``check_attn_mask_shape``: two or four dimensions that expand to (batch, heads, length, length)."""
        if self.mask is None:
            return True
        shape = (*self.query.shape[:3], self.key.shape[2])
        return self.mask.ndim in (2, 4) and all(
            size in (1, whole) for size, whole in zip(reversed(self.mask.shape), reversed(shape), strict=False)
        )


def choose_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
    enable_gqa: bool,
    dropout_p: float = 0.0,
    model: DeviceModel | None = None,
) -> str:
    """``"cudnn"``, ``"flash"``, ``"efficient"`` or ``"math"``; ``torch.nn.attention.sdpa_kernel`` is honoured.

    The architecture and the torch version of ``model`` decide; its ``attention`` goes before every order.
    """
    model = model or device_model("cuda")
    call = _Call(query, key, value, mask, dropout_p, is_causal, enable_gqa)
    for kernel in _order(model):
        if kernel == "math":
            if torch.backends.cuda.math_sdp_enabled():
                return "math"
        elif _CAN_USE[kernel](call, model):
            return kernel
    return "math"  # torch raises here: no kernel that is enabled can run


def _order(model: DeviceModel) -> list[str]:
    ask = getattr(torch._C, "_get_sdp_priority_order", None)
    order = [_KERNELS[number] for number in ask() if number in _KERNELS] if ask is not None else _TORCHS_ORDER
    if order == _TORCHS_ORDER and model.prefers_cudnn_attention:
        order = _CUDNN_FIRST
    if model.attention == "math":
        return []
    return order if model.attention == "auto" else [model.attention, *order]


def _can_use_cudnn(call: _Call, model: DeviceModel) -> bool:
    capability, head_dim, value_dim = model.architecture.capability, call.query.shape[-1], call.value.shape[-1]
    if not (
        torch.backends.cuda.cudnn_sdp_enabled()
        and capability >= (8, 0)
        and call.dense
        and call.half
        and call.mask_fits()
        and call.heads_fit(grouped=True, same_key_value=False)
        and (call.dropout_p * 16).is_integer()
        and head_dim % 8 == value_dim % 8 == 0
        and call.key.shape[2] != 1
        and not (call.dropout_p and call.query.shape[2] == 1)
    ):
        return False
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return False
    if max(head_dim, value_dim) <= 128:
        return True
    large = capability == (9, 0) or capability[0] == 10
    whole = model.torch_version >= (2, 14) and head_dim == value_dim == 256  # cudnn-frontend 1.24
    return large and ((head_dim, value_dim) == (192, 128) or whole)


def _can_use_flash(call: _Call, model: DeviceModel) -> bool:
    capability, head_dim = model.architecture.capability, call.query.shape[-1]
    small_shared_memory = capability in ((8, 6), (8, 9)) or capability[0] == 12
    if small_shared_memory and call.requires_grad and not (head_dim <= 192 or (head_dim > 224 and not call.dropout_p)):
        return False
    return (
        torch.backends.cuda.flash_sdp_enabled()
        and capability >= (8, 0)
        and call.dense
        and call.half
        and call.mask is None
        and head_dim <= 256
        and head_dim == call.key.shape[-1] == call.value.shape[-1]
        and call.heads_fit(grouped=True)
        and not (call.is_causal and call.query.shape[2] != call.key.shape[2])
    )


def _can_use_efficient(call: _Call, model: DeviceModel) -> bool:
    capability, head_dim = model.architecture.capability, call.query.shape[-1]
    if capability >= (8, 0):
        alignment = 8 if call.half else 4
    else:
        alignment = 8 if call.half else 1
    return (
        torch.backends.cuda.mem_efficient_sdp_enabled()
        and call.dense
        and call.query.dtype in (torch.float16, torch.float32, *([torch.bfloat16] if capability >= (8, 0) else []))
        and call.heads_fit(grouped=model.efficient_attention_groups)
        and head_dim == call.key.shape[-1]
        and head_dim % alignment == call.value.shape[-1] % alignment == 0
    )


_CAN_USE = {"cudnn": _can_use_cudnn, "flash": _can_use_flash, "efficient": _can_use_efficient}


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
    model: DeviceModel | None = None,
    used: Counter[str] | None = None,
) -> torch.Tensor:
    """``F.scaled_dot_product_attention`` with the tensors that CUDA would allocate; counts kernels in ``used``."""
    kernel = choose_kernel(
        query, key, value, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, dropout_p=dropout_p, model=model
    )
    if used is not None:
        used[kernel] += 1
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        zero = torch.zeros((), dtype=query.dtype)
        attn_mask = torch.where(attn_mask.logical_not(), -math.inf, zero)
    differentiable = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if kernel == "cudnn":
        return _aten._scaled_dot_product_cudnn_attention(
            query, key, value, attn_mask, differentiable, dropout_p, is_causal, False, scale=scale
        )[0]
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
        return _aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, differentiable, dropout_p, is_causal, scale=scale
        )[0]
    return _aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
