"""torch as it was: what a target's code replaces in torch while it is traced is told with its line and put back.

A target may patch torch for itself, and the trace then runs with the patch; the next trace, the probe and whoever
imported memadvise do not. What the trace itself hangs on has to be torch's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from memadvise.errors import Mark, TargetError
from memadvise.memory.callers import is_user_file

_MODULES = ("torch", "torch.functional", "torch.random", "torch.utils.checkpoint", "torch._tensor")
_PACKAGES = ("torch.nn", "torch.optim", "torch.autograd", "torch.amp", "torch.cuda")
_DOTTED = tuple(f"{name}." for name in _PACKAGES)
_NEEDED = (  # what the trace replaces for a while, hooks into or is kept right by
    (torch, "get_rng_state"),
    (torch, "set_rng_state"),
    (torch.autograd, "_engine_run_backward"),
    (torch.Tensor, "__deepcopy__"),
    (torch.Tensor, "detach"),
    (torch.Tensor, "untyped_storage"),
    (nn.Module, "__call__"),
    (nn.Module, "_apply"),
    (nn.Module, "_call_impl"),
    (nn.Module, "named_modules"),
    (nn.Module, "named_parameters"),
    (torch.optim.Optimizer, "profile_hook_step"),
)
_ABSENT = object()


class KeptTorch:
    """The functions, classes and methods of torch when this was made; see :meth:`replaced` and :meth:`restore`."""

    def __init__(self) -> None:
        self._before = [(owner, dict(vars(owner))) for owner in _owners()]

    def replaced(self) -> list[str]:
        """One sentence for everything in torch that is the user's by now, with the line of what is there instead."""
        return [
            f"{_place(new)} {'adds' if old is _ABSENT else 'replaces'} {_name(owner, name)}; the trace ran with it, "
            "and afterwards torch is as it was"
            for owner, name, old, new in self._changes()
        ]

    def restore(self) -> None:
        """Put back what the user's code replaced, take away what it added."""
        for owner, name, old, _ in self._changes():
            if old is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, old)

    def _changes(self) -> list[tuple[Any, str, Any, Any]]:
        """(owner, name, value before, value now); torch's own lazy parts and libraries' patches do not count."""
        return [
            (owner, name, before.get(name, _ABSENT), new)
            for owner, before in self._before
            for name, new in list(vars(owner).items())
            if before.get(name, _ABSENT) is not new and _place(new) is not None
        ]


@contextlib.contextmanager
def torch_kept() -> Iterator[KeptTorch]:
    """While open, torch may be patched by the target; afterwards it is as before.

    Raises:
        TargetError: what the trace itself needs of torch is not torch's own any more.
    """
    _check_needed()
    kept, settings = KeptTorch(), [(read, write, read()) for read, write in _settings()]
    try:
        yield kept
    finally:
        kept.restore()
        for read, write, value in settings:
            if read() != value:
                write(value)


def _settings() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """(reads, writes) for what a program sets for the whole of torch."""

    def attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        return lambda: getattr(owner, name, None), lambda value: setattr(owner, name, value)

    return [
        (
            lambda: getattr(torch.utils._device, "CURRENT_DEVICE", None),
            torch.set_default_device,
        ),  # None: nobody set one
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        (torch.get_num_threads, torch.set_num_threads),
        (
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        ),
        *(attribute(torch.backends.cudnn, name) for name in ("benchmark", "deterministic", "enabled")),
    ]


def _check_needed() -> None:
    for owner, name in _NEEDED:
        value = getattr(owner, name, None)
        place = _place(value)
        if place is not None or not callable(value):
            path, _, line = (place or "").rpartition(":")
            raise TargetError(
                f"{_name(owner, name)} is {'replaced' if callable(value) else f'set to {value!r}'} by the target, and "
                "the trace needs torch's own",
                where=Mark(path, int(line)) if place else None,
                hint="patch it in train_step and put it back there, or leave the patch out for memadvise",
            )


def _owners() -> Iterator[Any]:
    """The modules of torch that people patch, and the classes defined in them."""
    for name, module in sys.modules.copy().items():
        if module is None or not (name in _MODULES or name in _PACKAGES or name.startswith(_DOTTED)):
            continue
        yield module
        if name in ("torch", "torch.cuda") or name.startswith("torch.cuda."):
            continue  # thousands of attributes of tensor types that nobody uses
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__ == name:
                yield value


def _name(owner: Any, name: str) -> str:
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}.{name}"
    return f"{owner.__name__}.{name}"


def _place(value: Any) -> str | None:
    """``file:line`` of a function, method or class of the user's own; None for everything else."""
    while isinstance(value, functools.partial | staticmethod | classmethod | property):
        if isinstance(value, functools.partial):
            value = value.func
        else:
            value = value.fget if isinstance(value, property) else value.__func__
    if isinstance(value, type):
        module = sys.modules.get(value.__module__)
        path = getattr(module, "__file__", None)
        if path is None or not is_user_file(path):
            return None
        try:
            return f"{path}:{inspect.getsourcelines(value)[1]}"
        except (OSError, TypeError):
            return f"{path}:1"
    code = getattr(value, "__code__", None)
    if code is None or not is_user_file(code.co_filename):
        return None
    return f"{code.co_filename}:{code.co_firstlineno}"
