"""Where the autograd engine adds up gradients of one tensor: in place, unless a dispatch mode looks on.

``InputBuffer::accumulate`` (torch/csrc/autograd/input_buffer.cpp) writes into whichever of the two gradients nobody
else holds. Under a dispatch mode it makes a third tensor, so a trace would show one gradient too many at every
residual connection. What holds a tensor is told by reference counts, which are compared with those of a gradient that
is known to be held by the engine alone.
"""

from __future__ import annotations

import sys
import weakref
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_ADD = torch.ops.aten.add.Tensor
ADD_IN_PLACE = torch.ops.aten.add_.Tensor
References = tuple[int, int, int]
_ENGINE = "_engine_run_backward"
_BETWEEN = 8  # frames of torch's own between a mode and the engine


def accumulates(func: Any, args: Any, kwargs: Any, alone: References) -> tuple[Any, Any] | None:
    """The arguments of the addition in place that the engine makes instead; None if this is no such addition.

    To be called directly in a mode's ``__torch_dispatch__``, with what that gets and with
    :func:`held_by_the_engine_alone`.
    """
    if func is not _ADD or kwargs or len(args) != 2 or not _called_by_engine():
        return None
    left, right = args
    if not (isinstance(right, torch.Tensor) and left.shape == right.shape and left.dtype is right.dtype):
        return None
    if _counts(left) == alone and _is_dense(left):
        return left, right
    if _counts(right) == alone and _is_dense(right):
        return right, left
    return None


def _called_by_engine() -> bool:
    """Whether no Python code of a backward function lies between the engine and the running dispatch mode."""
    frame = sys._getframe(3)
    for _ in range(_BETWEEN):
        name, path = frame.f_code.co_name, frame.f_code.co_filename
        if name == _ENGINE:
            return True
        if not path.endswith(("_compile.py", "eval_frame.py")):
            return False
        if frame.f_back is None:  # a thread of the engine's own, as it has for every GPU
            return True
        frame = frame.f_back
    return False


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill their memory without gaps and overlaps, in whatever order of the dimensions."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True


def _counts(tensor: torch.Tensor) -> References:
    """References to a tensor from C++, to its memory, and from Python."""
    return (
        tensor._use_count(),  # type: ignore[attr-defined]
        torch._C._storage_Use_Count(tensor.untyped_storage()._cdata),  # type: ignore[attr-defined]
        sys.getrefcount(tensor),
    )


class _Watch(TorchDispatchMode):
    """Sees a tensor as the recorder does: by a weak reference to its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: References | None = None
        self._seen: list[weakref.ref[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ADD and torch._C._current_autograd_node() is not None:
            self.found = self._look(args)
        out = func(*args, **(kwargs or {}))
        self._seen.append(weakref.ref(out.untyped_storage(), lambda _: None))
        return out

    @staticmethod
    def _look(args: Any) -> References:
        left, _ = args
        return _counts(left)


@lru_cache(maxsize=1)
def held_by_the_engine_alone() -> References:
    """The references to a first gradient when a second one arrives, and nobody else holds it. Not to be called while
    a backward pass runs.
    """
    watch = _Watch()
    with _disable_current_modes(), torch.enable_grad(), watch:
        leaf = torch.ones(2, device="cpu", requires_grad=True)
        x = leaf * 2
        (x.sin() + x.cos()).sum().backward()
    assert watch.found is not None, "two gradients of one tensor are added"
    return watch.found
