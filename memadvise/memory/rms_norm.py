"""``F.rms_norm`` as CUDA runs it since torch 2.9, on fake CPU tensors: one kernel, which keeps a factor for each row.

On the CPU the operation is composed of others, which keep several tensors of the input's size
(``aten/src/ATen/native/layer_norm.cpp``).
"""

from __future__ import annotations

from typing import Any

import torch

from memadvise.memory.architecture import DeviceModel

_aten = torch.ops.aten


def fuses(model: DeviceModel) -> bool:
    """Whether the device, and the torch that runs here, have the kernel."""
    return model.torch_version >= (2, 9) and hasattr(_aten, "_fused_rms_norm_backward")


def cuda_rms_norm(
    x: torch.Tensor, normalized_shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """The fused kernel; composed where weight and input differ in dtype, as on CUDA."""
    if weight is not None and weight.dtype is not x.dtype:
        composed: torch.Tensor = _aten.rms_norm.default.decompose(x, normalized_shape, weight, eps)
        return composed
    fused: torch.Tensor = _FusedRMSNorm.apply(x, normalized_shape, weight, eps)  # type: ignore[no-untyped-call]
    return fused


class _FusedRMSNorm(torch.autograd.Function):
    """torch's own two operations, below autograd, which would decompose them for the CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: list[int], weight: torch.Tensor | None, eps: float | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            out, factor = _aten._fused_rms_norm(x, shape, weight, eps)
        ctx.save_for_backward(x, weight, factor)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight, factor = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        dx, dweight = _aten._fused_rms_norm_backward(gradients[0], x, ctx.shape, factor, weight, wanted)
        return dx, None, dweight, None
