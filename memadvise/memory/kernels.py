"""Operations whose real kernel allocates otherwise than torch's fake one says, and composites that do so when traced.

Composites written in C++ avoid writing in place wherever a dispatch mode looks on, so that tensor subclasses stay
whole ("composite compliance"); a real step writes in place. Here they are put back as they run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from memadvise.memory.dispatch import kernels_replaced

_aten = torch.ops.aten


def _grouped_mm(
    left: torch.Tensor,
    right: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The output of ``_grouped_mm`` for every dtype, its rows padded to 16 bytes (ATen/native/GroupedMMUtils.h).

    torch's fake kernel refuses all but bfloat16, which the real ones do not.
    """
    rows, columns = left.shape[-2], right.shape[-1]
    dtype = out_dtype or left.dtype
    alignment = 16 // dtype.itemsize
    padded = -(-columns // alignment) * alignment
    if (left.ndim == 2) != (right.ndim == 2):
        return left.new_empty_strided((rows, columns), (padded, 1), dtype=dtype)
    groups = left.shape[0] if left.ndim == 3 else offs.shape[0] if offs is not None else 1
    return left.new_empty_strided((groups, rows, columns), (rows * padded, padded, 1), dtype=dtype)


# What replaces torch's fake kernels; not every torch has every operator.
FAKE_KERNELS: dict[Any, Callable[..., Any]] = {
    getattr(_aten, name).default: kernel for name, kernel in (("_grouped_mm", _grouped_mm),) if hasattr(_aten, name)
}


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if bias is not None and x.ndim > 2 and not x.is_contiguous():
        return torch.matmul(x, weight.t()).add_(bias)  # traced, it would be "add"
    return _aten.linear.default.decompose(x, weight, bias)


@contextlib.contextmanager
def composites_as_they_run() -> Iterator[None]:
    """While open, composite operations write in place where they do without a dispatch mode."""
    with kernels_replaced("AutogradCPU") as replace:
        replace("linear", _linear)
        yield
