"""Workspaces of cuDNN's convolutions, which is closed: what it was measured to take, as a rule.

Its fast kernels want channels last. Of tensors that are laid out otherwise they make copies: input, weight and output
(or their gradients) once more, in one block. Gradients of weights are summed over parts of the batch in slices of the
weight's size. In 700 cases (forward and backward, windows of 1 to 16, 1 to 1,280 channels, float32, float16 and
bfloat16, both layouts) on an H200 with cuDNN 9.19 and torch's default heuristics that is exact for most windows larger
than 1 x 1, and the rest mostly takes up to 16 MiB more. Depthwise convolutions are torch's own. The gradient of the
bias is a sum of torch's, inside the same operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memadvise.memory import reductions
from memadvise.memory.architecture import DeviceModel

_aten = torch.ops.aten
_MIB = 2**20
_FEW_CHANNELS, _LARGE_KERNEL = 8, 7  # images have their own kernels, which copy for large windows only
_LEAST_PIXELS = 28 * 28  # of an output whose few input channels are copied for the gradient of the weight
_SLICES = 15  # of a small weight
_ALL_SLICES = {torch.float32: 9 * _MIB}  # of a larger one
_ALL_NARROW_SLICES = 4 * _MIB


def forward(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """``aten.convolution``: ``(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``."""
    x, weight, transposed = args[0], args[1], args[6]
    if model.cudnn_workspace is not None:
        return [model.cudnn_workspace] if model.cudnn_workspace else []
    if _depthwise(x, weight, args[8]):
        return []
    y = math.prod(_output(x, weight, *args[3:9])) * x.itemsize
    size = _data_workspace(x, weight, y) if transposed else _image_workspace(x, weight, y)
    return [size] if size else []


def backward(args: tuple[Any, ...], kwargs: dict[str, Any], model: DeviceModel) -> list[int]:
    """``aten.convolution_backward``: ``(gradient, x, weight, bias_sizes, ..., groups, output_mask)``.

    The gradient of the input comes first, then that of the weight, then that of the bias: the largest counts, beyond
    the results.
    """
    gradient, x, weight, wanted = args[0], args[1], args[2], args[10]
    summed = reductions.scratch(gradient, [0, *range(2, gradient.ndim)], model) if wanted[2] else []
    if model.cudnn_workspace is not None:
        size = model.cudnn_workspace
    elif _depthwise(x, weight, args[9]):
        size = 0
    else:
        first = _data_workspace(x, weight, _bytes(gradient)) - _bytes(weight) if wanted[0] else 0
        size = max(first, _weight_workspace(x, weight, gradient) if wanted[1] else 0)
    if sum(summed) > size:
        return summed
    return [size] if size > 0 else []


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _depthwise(x: Tensor, weight: Tensor, groups: int) -> bool:
    return groups > 1 and groups == x.shape[1] and weight.shape[1] == 1


def _channels_last(*tensors: Tensor) -> bool:
    """Whether torch hands them over so: one of them lies so in memory."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return any(
        t.ndim in formats and not t.is_contiguous() and t.is_contiguous(memory_format=formats[t.ndim]) for t in tensors
    )


def _window(weight: Tensor) -> int:
    return max(weight.shape[2:], default=1)


def _image_workspace(x: Tensor, weight: Tensor, y: int) -> int:
    """Of the output."""
    if x.shape[1] < _FEW_CHANNELS and _window(weight) < _LARGE_KERNEL:
        return 0
    return _data_workspace(x, weight, y)


def _data_workspace(x: Tensor, weight: Tensor, y: int) -> int:
    """Of the gradient of the input."""
    if _channels_last(x, weight) or _window(weight) == 1:
        return 0
    return _bytes(x) + _bytes(weight) + y


def _weight_workspace(x: Tensor, weight: Tensor, gradient: Tensor) -> int:
    """Of the gradient of the weight."""
    size, y = _bytes(x), _bytes(gradient)
    if _channels_last(x, weight):
        return 0
    if _window(weight) == 1:  # one float32 slice for each image, or copies
        return min(x.shape[0] * 4 * weight.numel(), size + _bytes(weight) + y + 8 * _MIB)
    if x.shape[1] < _FEW_CHANNELS:
        large = math.prod(gradient.shape[2:]) >= _LEAST_PIXELS or _window(weight) >= _LARGE_KERNEL
        return size + _bytes(weight) + y if large else 0
    slices = min(_SLICES * _bytes(weight), _ALL_SLICES.get(x.dtype, _ALL_NARROW_SLICES))
    return size + y + max(_bytes(weight), slices)


def _output(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool, output_padding: Sequence[int], groups: int,
) -> list[int]:  # fmt: skip
    """The shape of the output."""

    def along(axis: int) -> int:
        step, pad, spread = (values[axis % len(values)] for values in (stride, padding, dilation))
        reach = spread * (weight.shape[2 + axis] - 1)
        if transposed:
            extra = output_padding[axis % len(output_padding)]
            return int((x.shape[2 + axis] - 1) * step - 2 * pad + reach + extra + 1)
        return int((x.shape[2 + axis] + 2 * pad - reach - 1) // step + 1)

    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return [x.shape[0], channels, *(along(axis) for axis in range(x.ndim - 2))]


FORMULAS = {_aten.convolution.default: forward, _aten.convolution_backward.default: backward}
