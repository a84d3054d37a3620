"""cuBLAS's workspaces: memory that each thread takes from the allocator at its first matrix product.

torch keeps one for every pair of handle and stream, handles belong to threads, and the autograd engine has a thread
of its own for each device (``aten/src/ATen/cuda/CublasHandlePool.cpp``): one step counts two, one for what the calling
thread multiplies and one for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch

from memadvise.memory.architecture import DeviceModel
from memadvise.units import format_bytes

_aten = torch.ops.aten
_NAMED = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "addbmm",
    "mv",
    "addmv",
    "dot",
    "vdot",
    "_addmm_activation",
    "_int_mm",
    "_scaled_mm",
)
_LT = ("addmm", "_addmm_activation", "_int_mm", "_scaled_mm")  # run by cuBLASLt: products with a bias, and narrow ones


def _overloads(names: tuple[str, ...]) -> set[Any]:
    return {getattr(getattr(_aten, name), overload) for name in names for overload in getattr(_aten, name).overloads()}


_PRODUCTS, _WITH_BIAS = _overloads(_NAMED), _overloads(_LT)
_NAMES = {False: "the calling thread", True: "autograd"}


class CublasWorkspaces:
    """Which product takes a workspace, and for how long."""

    def __init__(self, model: DeviceModel) -> None:
        self._model = model
        self._taken: dict[tuple[bool, str], int] = {}

    def kept(self, func: Any, *, in_engine: bool) -> list[tuple[str, int]]:
        """(name, bytes) of what this call takes for the rest of the process; empty for nearly every call."""
        model = self._model
        if not model.is_cuda or func not in _PRODUCTS or not model.keeps_cublas_workspaces:
            return []
        found = []
        thread = in_engine and torch._C._is_multithreading_enabled()
        for library, size in (("cuBLAS", model.cublas_workspace), ("cuBLASLt", model.cublaslt_workspace)):
            if size and (thread, library) not in self._taken and (library == "cuBLAS" or func in _WITH_BIAS):
                self._taken[thread, library] = size
                found.append((f"{library} workspace", size))
        return found

    def scratch(self, func: Any) -> list[int]:
        """Bytes that this call takes while it runs, where nothing is kept."""
        model = self._model
        if not model.is_cuda or func not in _PRODUCTS or model.keeps_cublas_workspaces:
            return []
        size = model.cublaslt_workspace if func in _WITH_BIAS else model.cublas_workspace
        return [size] if size else []

    def assumptions(self) -> list[str]:
        """What was counted, in a sentence."""
        model = self._model
        if not model.is_cuda:
            return []
        size = format_bytes(model.cublas_workspace or 0)
        if not model.keeps_cublas_workspaces:
            return [f"cuBLAS: a workspace of {size} while a product runs (--assume cublas_workspace=)."]
        if not self._taken:
            return []
        threads = " and ".join(_NAMES[thread] for thread in sorted({thread for thread, _ in self._taken}))
        total = format_bytes(sum(self._taken.values()))
        return [
            f"cuBLAS keeps a workspace of {size} for each thread that multiplies matrices ({threads}): {total} of the "
            "peak (--assume cublas_workspace=)."
        ]
