"""Kernels that exist on CUDA only, for steps on real CPU tensors: outputs of the same shapes, unseen by the recorder.

Attention and softmax give their real results, for the numbers that routing and masks depend on. The gradient of
attention is left at zero, and so is what any other such kernel gives: it decides nothing within two steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_MASK_AT = {  # position of the mask among the arguments
    _aten._scaled_dot_product_flash_attention.default: None,
    _aten._scaled_dot_product_efficient_attention.default: 3,
    _aten._scaled_dot_product_cudnn_attention.default: 3,
}
_SOFTMAX = {_aten._softmax.default, _aten._log_softmax.default}
_SOFTMAX_BACKWARD = {_aten._softmax_backward_data.default, _aten._log_softmax_backward_data.default}


class CudaOnCpu(TorchDispatchMode):
    """The dispatch mode that stands in for them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MASK_AT:
            out = _zeros(func, args, kwargs)
            out[0].copy_(_attention(func, args, kwargs))
            return out
        if func in _SOFTMAX and args[2]:  # half precision in, fp32 out
            return func(args[0].float(), args[1], False)
        if func in _SOFTMAX_BACKWARD and args[3] is not args[1].dtype:
            return func(*args[:3], args[1].dtype).to(args[3])
        try:
            return func(*args, **kwargs)
        except NotImplementedError:
            return _zeros(func, args, kwargs)


def _zeros(func: Any, args: Any, kwargs: Any) -> Any:
    """Results of the shapes that the fake kernel says, filled with zeros."""
    with FakeTensorMode() as mode:
        args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
        fakes = func(*args, **kwargs)
    return tree_map_only(
        torch.Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu").zero_(), fakes
    )


def _attention(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """The output of attention without its dropout, which changes no shape."""
    query, key, value = args[:3]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    given = {argument.name: x for argument, x in zip(func._schema.arguments, args, strict=False)} | kwargs
    at = _MASK_AT[func]
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key,
        value,
        0.0,
        given.get("is_causal", False),
        attn_mask=args[at] if at is not None else None,
        scale=given.get("scale"),
    )[0]
