"""Why tensors are fake: in a memory trace, which never computes, or in a kernel being traced, which will run.

What a trace follows takes its time: hundreds of operations for one parameter. Parameters of one kind allocate alike, so
one of them is followed and the others are told to have done the same (:func:`alike`).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Hashable, Iterator

from torch._guards import detect_fake_mode

Repeat = Callable[[Hashable, Callable[[], None]], None]

_repeat: list[Repeat] = []  # of the trace that runs; the engine of autograd may step in a thread of its own
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


@contextlib.contextmanager
def repeating(repeat: Repeat) -> Iterator[None]:
    """While a trace records: ``repeat`` is given what :func:`alike` is."""
    _repeat.append(repeat)
    try:
        yield
    finally:
        _repeat.pop()


def alike(key: Callable[[], Hashable], run: Callable[[], None]) -> None:
    """Run something that changes tensors in place. In a trace, which follows memory alone, it may be left out where
    something of the same ``key`` was run before in the same step and kept nothing of what it made.
    """
    if _repeat and valueless():
        _repeat[-1](key(), run)
    else:
        run()
