"""Fake tensors on the device "cuda" in a CPU build of torch, forward and backward: the oracle of the CUDA semantics.

torch keeps one guard object for each device type in an exported table, and asks it from everywhere. A CPU build has
none for CUDA, so the first backward pass aborts the process. :func:`enable` puts an object there whose virtual methods
all return 0; torch then takes it for a build with no devices and installs its own no-op guard in its place. Two answers
of the CUDA hooks are replaced in a copy of their table of virtual methods, so that autograd finds an accelerator.

This holds for one version of torch on Linux, and the process must end with ``os._exit``: for tests only.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch

TORCH = (2, 13)
_CUDA = 1  # c10::DeviceType
_POINTER = ctypes.sizeof(ctypes.c_void_p)
_IS_BUILT, _HAS_PRIMARY_CONTEXT = 2, 4  # places among the hooks' virtual methods
_kept: list[Any] = []  # what C++ points to now


def unsupported() -> str | None:
    """Why there is no oracle here; None if there is one."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return "needs Linux on 64 bits"
    if version != TORCH:
        return f"knows the tables of torch {TORCH[0]}.{TORCH[1]} only"
    return "a CUDA build has guards of its own" if torch.version.cuda or torch.version.hip else None


def enable() -> None:
    """Make "cuda" a device for fake tensors, in this process and for good."""
    reason = unsupported()
    if reason is not None:
        raise RuntimeError(reason)
    _install_guard(_library("libc10"))
    _answer_for_hooks(_library("libtorch_cpu"))
    found = torch.accelerator.current_accelerator()
    if found is None or found.type != "cuda":
        raise RuntimeError(f"torch finds the accelerator {found}")


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"{name}.so"))


def _install_guard(c10: ctypes.CDLL) -> None:
    table = (ctypes.c_void_p * 22).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    zero = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(lambda this: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
    guard = (ctypes.c_void_p * 2)(ctypes.addressof(methods), 0)
    _kept.extend((zero, methods, guard))
    table[_CUDA] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()
    if table[_CUDA] == ctypes.addressof(guard):
        raise RuntimeError("torch kept the empty guard")


def _answer_for_hooks(torch_cpu: ctypes.CDLL) -> None:
    get_hooks = torch_cpu._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(get_hooks())
    before = 2 * _POINTER  # offset to the top and type information stand before the methods
    assert hooks.value is not None
    methods = (ctypes.c_void_p * 128).from_buffer_copy((ctypes.c_void_p * 128).from_address(hooks.value - before))
    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda this: True)
    no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda this, index: False)
    methods[2 + _IS_BUILT] = ctypes.cast(yes, ctypes.c_void_p).value
    methods[2 + _HAS_PRIMARY_CONTEXT] = ctypes.cast(no, ctypes.c_void_p).value
    _kept.extend((yes, no, methods))
    hooks.value = ctypes.addressof(methods) + before
