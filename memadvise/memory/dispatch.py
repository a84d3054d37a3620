"""Kernels of the dispatcher that are replaced for a while, and are gone without a trace afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def kernels_replaced(key: str) -> Iterator[Callable[..., None]]:
    """Yield ``replace(name, kernel)`` for operators of aten under a dispatch key; on closing, all are as before.

    Python's dispatcher, in which AOTAutograd traces, remembers for every operator which kernel a key leads to. A
    memory of a kernel that is gone would lead a later ``torch.compile`` past the operator's derivative, in silence.
    """
    library = torch.library.Library("aten", "IMPL", key)
    replaced: set[Any] = set()

    def replace(name: str, kernel: Any) -> None:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        replaced.add(operator)
        library.impl(name, kernel)
        operator._dispatch_cache.clear()

    try:
        yield replace
    finally:
        library._destroy()
        for operator in replaced:
            operator._dispatch_cache.clear()
