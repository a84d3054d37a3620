"""Which line of the user's code is running: a bounded walk up the stack, each source file judged once."""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import lru_cache
from types import FrameType

import torch

import memadvise

_MAX_FRAMES = 80
_OPTIMIZERS = "/torch/optim/"
_OUTERMOST = "trace_step"  # who calls it is not part of the traced program
_OURS = os.path.dirname(os.path.abspath(memadvise.__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_STDLIB = tuple({os.path.abspath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib")})


@lru_cache(maxsize=4096)
def is_user_file(path: str) -> bool:
    """Whether a source file is the user's: not memadvise's, an installed package's or the standard library's."""
    if path.startswith("<"):
        return False
    path = os.path.abspath(path)
    return not ("site-packages" in path or "dist-packages" in path or path.startswith((_OURS, *_STDLIB)))


@lru_cache(maxsize=4096)
def _shown(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def user_line(*, below: str | None = None) -> str | None:
    """``file:line`` of the innermost frame that is the user's: not memadvise, not an installed package, not the
    standard library. None when there is none within a bounded depth, or when a frame of a file that contains
    ``below`` comes first.
    """
    frame = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        path = frame.f_code.co_filename
        if is_user_file(path):
            return f"{_shown(path)}:{frame.f_lineno}"
        if below is not None and below in path:
            return None
        if frame.f_back is None or (frame.f_code.co_name == _OUTERMOST and path.startswith(_OURS)):
            return None
        frame = frame.f_back
    return None


def reading_line() -> str | None:
    """Where a host read was asked for: the user's line or, below none of theirs, that of the library which asked.

    None for what torch's own optimizers read (their step count): it changes nothing.
    """
    line = user_line(below=_OPTIMIZERS)
    frame: FrameType | None = sys._getframe(1)
    while line is None and frame is not None:
        path = frame.f_code.co_filename
        if _OPTIMIZERS in path or (frame.f_code.co_name == _OUTERMOST and path.startswith(_OURS)):
            return None
        if "-packages" in path and not path.startswith((_TORCH, _OURS)):
            line = f"{_shown(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return line
