"""Why tensors are fake: in a memory trace, which never computes, or in a kernel being traced, which will run."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from torch._guards import detect_fake_mode

_kernel: contextvars.ContextVar[bool] = contextvars.ContextVar("kernel", default=False)


@contextlib.contextmanager
def kernel_tracing() -> Iterator[None]:
    """While a kernel is traced."""
    token = _kernel.set(True)
    try:
        yield
    finally:
        _kernel.reset(token)


def in_kernel() -> bool:
    """Whether a kernel is being traced: constants must be true, Python numbers become constants."""
    return _kernel.get()


def valueless() -> bool:
    """Whether tensors have no values here, and never will: a memory trace."""
    return not _kernel.get() and detect_fake_mode() is not None
