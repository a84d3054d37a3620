"""The contract of a method: a state spec and three pure functions of plain tensor math.

A method knows nothing of devices, chunks, param_groups or files. The engine calls, per parameter::

    sums  = method.stats(g, ...)      over row chunks (or shards): results are SUMS and just add up
    small = method.finish(sums, ...)  factor-sized work, once
    p, m  = method.apply(p, g, ...)   per chunk, element-wise or broadcast
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_assumed_device: contextvars.ContextVar[str | None] = contextvars.ContextVar("assumed_device", default=None)


def device_type(tensor: torch.Tensor) -> str:
    """``tensor.device.type``, or the device a trace pretends to run on (fake CPU tensors with CUDA semantics)."""
    return _assumed_device.get() or tensor.device.type


@contextlib.contextmanager
def assume_device(kind: str | None) -> Iterator[None]:
    """Let the engine behave as on ``kind`` ("cuda", "cpu") whatever the tensors say; used by the memory trace."""
    token = _assumed_device.set(kind)
    try:
        yield
    finally:
        _assumed_device.reset(token)


@dataclass(frozen=True)
class StateSpec:
    """One state tensor: ``shape``, ``dtype``; its bytes are ``numel * itemsize``, known before allocation."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()
