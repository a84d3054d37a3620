"""What a program reads back from tensors while nothing is computed: real values where they are known, else a policy.

Integer and boolean tensors that derive from the batch or from constants alone carry their real values beside the
fake tensor; masks, ids and lengths are a few kilobytes. A read (``.item()``, ``if x.any()``) or a shape that
depends on values is answered from them. Everything else is answered by a fixed policy, and listed with its line:
``x.all()`` is True, other booleans are False, numbers are 1. Every read is told with its line, known or guessed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from memadvise.errors import TargetError, TargetRaised
from memadvise.memory.callers import reading_line, user_line
from memadvise.memory.kernels import FAKE_KERNELS

_MAX_ELEMENTS = 1 << 20
_MAX_VALUES = 3
_ATTRIBUTE, _IS_ALL = "_memadvise_value", "_memadvise_is_all"
_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_READ = _aten._local_scalar_dense.default
_UNSCALE = _aten._amp_foreach_non_finite_check_and_unscale_.default
_FACTORIES = {
    op: True
    for packet in (_aten.arange, _aten.zeros, _aten.ones, _aten.full, _aten.scalar_tensor, _aten.tril_indices)
    for op in (getattr(packet, name) for name in packet.overloads())
    if not op._schema.is_mutable
}
_SHAPE_FROM_VALUES = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.bincount.default,
    _aten.repeat_interleave.Tensor,
}


class NotOnFakes(TargetError):
    """The step does something that fake tensors cannot go on from (exit 2)."""


class AfterGuess(TargetRaised):
    """The user's code raised, after it had read a value that was only guessed."""


class _Value:
    """A real tensor, and whether it is still true; views of one memory share the flag."""

    __slots__ = ("tensor", "valid")

    def __init__(self, tensor: torch.Tensor, valid: list[bool]) -> None:
        self.tensor = tensor
        self.valid = valid


def attach_value(fake: torch.Tensor, real: torch.Tensor) -> None:
    """Let ``fake`` carry the values of ``real`` if they are integers or booleans and few enough to compute with."""
    if not real.dtype.is_floating_point and not real.dtype.is_complex and real.numel() <= _MAX_ELEMENTS:
        setattr(fake, _ATTRIBUTE, _Value(real, [True]))


def _value(x: Any) -> _Value | None:
    value = getattr(x, _ATTRIBUTE, None) if type(x) is FakeTensor else None
    return value if value is not None and value.valid[0] else None


class HostValues(TorchDispatchMode):
    """The dispatch mode that keeps the values and answers the reads; it lies directly above the fake mode.

    Attributes:
        guesses: one sentence per line of code that read a value nobody knows here.
        known: what lines of code read that follows from the batch and constants, line -> the first few values.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self.guesses: dict[str, None] = {}
        self.known: dict[str, dict[str, None]] = {}
        self._fake_mode = fake_mode
        self._mutates: dict[Any, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        first = args[0] if args else None
        if type(first) is list or type(first) is tuple:
            first = first[0] if first else None
        if type(first) is FakeTensor:
            if func is _READ:
                return self._read(first)
            if func is _aten.equal.default:
                return self._equal(*args)
            if func is _aten.index.Tensor:
                args = (args[0], [i for index in args[1] for i in self._nonzero(index)], *args[2:])
            elif func in _SHAPE_FROM_VALUES:
                return self._dynamic(func, args, kwargs)
            elif func in FAKE_KERNELS:
                return FAKE_KERNELS[func](*args, **kwargs)
            if _value(first) is not None:
                return self._follow(func, first, args, kwargs)
        elif first is None or not isinstance(first, torch.Tensor):
            if func in _FACTORIES:
                out = func(*args, **kwargs)
                if not out.is_floating_point() and out.numel() <= _MAX_ELEMENTS:
                    self._attach(out, self._real(func, args, kwargs), None)
                return out
        elif func is _aten.lift_fresh.default and not first.is_floating_point():
            out = func(*args, **kwargs)  # a constant of the program, as in torch.tensor([1, 2])
            attach_value(out, first)
            return out
        try:
            out = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise _unknown_shape(func) from error
        if func is _aten.all.default and type(out) is FakeTensor:
            setattr(out, _IS_ALL, True)
        elif func is _UNSCALE:  # gradients are taken to be finite: a GradScaler makes its step
            self._attach(args[1], self._real(torch.zeros, (args[1].shape,), {}), None)
        return out

    # ------------------------------------------------------------ values

    def _follow(self, func: Any, first: FakeTensor, args: Any, kwargs: Any) -> Any:
        """Run an operation on fake tensors, and on the real values when all of them are known."""
        mutates = self._mutates.get(func)
        if mutates is None:
            mutates = self._mutates[func] = func._schema.is_mutable
        out = func(*args, **kwargs)
        outs = out if isinstance(out, list | tuple) else (out,)
        small = all(isinstance(o, torch.Tensor) and _worth(o) for o in outs)
        values = self._known(args, kwargs) if small or mutates else None
        value = _value(first)
        if values is None:
            if mutates and value is not None:
                value.valid[0] = False
        elif small or mutates:
            real = self._real(func, *values)
            if not mutates:
                for o, r in zip(outs, real if isinstance(real, list | tuple) else (real,), strict=True):
                    self._attach(o, r, value)
        if func is _aten.all.default:
            setattr(out, _IS_ALL, True)
        return out

    def _attach(self, fake: Any, real: Any, source: _Value | None) -> None:
        shares = source is not None and _address(real) == _address(source.tensor)
        setattr(fake, _ATTRIBUTE, _Value(real, source.valid if source is not None and shares else [True]))

    def _known(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The arguments with every fake tensor replaced by its values; None when one of them is unknown."""
        missing = False

        def real(x: Any) -> Any:
            nonlocal missing
            if isinstance(x, list | tuple):
                return type(x)(real(i) for i in x)
            if not isinstance(x, torch.Tensor):
                return x
            value = _value(x)
            if value is not None:
                return value.tensor
            if type(x) is FakeTensor:
                missing = True
            return x

        values = tuple(real(x) for x in args), {key: real(x) for key, x in kwargs.items()}
        return None if missing else values

    @staticmethod
    def _real(func: Any, args: Any, kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    # ------------------------------------------------------------ reads

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """An error of the program's own that comes after a guess may come of it: it becomes an :class:`AfterGuess`."""
        try:
            yield
        except TargetRaised as error:
            if not self.guesses:
                raise
            raise AfterGuess(error.message, where=error.where, hint=error.hint) from error.__cause__

    def guessed_reads(self) -> list[str]:
        """One sentence for every line that read what only a computation could tell."""
        return list(self.guesses)

    def known_reads(self) -> list[str]:
        """One sentence for every line whose reads were answered with true values."""
        return [
            f"Host read: {line} reads {', '.join(values)}, known from the batch and constants."
            for line, values in self.known.items()
        ]

    def _guess(self, what: str) -> None:
        line = reading_line()
        if line is not None:
            self.guesses[f"{line} reads {what}"] = None

    def _know(self, what: Any) -> Any:
        line = reading_line()
        if line is not None:
            values = self.known.setdefault(line, {})
            if len(values) < _MAX_VALUES:
                values[str(what)] = None
            else:
                values["..."] = None
        return what

    def _read(self, x: FakeTensor) -> Any:
        value = _value(x)
        if value is not None:
            return self._know(self._real(_READ, (value.tensor,), {}))
        if x.constant is not None:
            return self._know(self._real(_READ, (x.constant,), {}))
        if x.dtype is torch.bool:
            answer = hasattr(x, _IS_ALL)
            self._guess(f"a truth value that depends on computed numbers; assumed {answer}")
            return answer
        self._guess("a number that depends on computed numbers; assumed 1")
        return 1.0 if x.is_floating_point() else 1

    def _equal(self, left: Any, right: Any) -> bool:
        values = self._known((left, right), {})
        if values is not None:
            return bool(self._know(self._real(_aten.equal.default, values[0], {})))
        self._guess("whether two computed tensors are equal; assumed False")
        return False

    def _nonzero(self, index: Any) -> list[Any]:
        """An index of ``x[index]``: a boolean mask with known values becomes the positions that it selects."""
        if type(index) is not FakeTensor or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        positions = self._dynamic(_aten.nonzero.default, (index,), {})
        return list(positions.unbind(1))

    def _dynamic(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation whose output shape depends on values."""
        if func is _aten.masked_select.default:
            mask = _value(args[1])
            if mask is not None:
                with unset_fake_temporarily():
                    count = int(mask.tensor.expand(torch.broadcast_shapes(mask.tensor.shape, args[0].shape)).sum())
                return args[0].new_empty((count,))
        values = self._known(args, kwargs)
        if values is None:
            raise _unknown_shape(func)
        real = self._real(func, *values)
        self._know(f"a shape ({func})")
        with unset_fake_temporarily():
            reals = real if isinstance(real, list | tuple) else (real,)
        fakes = [self._fake_mode.from_tensor(r) for r in reals]
        for fake, r in zip(fakes, reals, strict=True):
            attach_value(fake, r)
        return fakes[0] if isinstance(real, torch.Tensor) else tuple(fakes)


def _unknown_shape(func: Any) -> NotOnFakes:
    return NotOnFakes(
        f"{user_line() or 'the step'} calls {func}, whose result has a shape that depends on computed numbers; "
        "without computing them the memory of the step is not known",
        hint="use an operation of fixed shape (torch.where, masked_fill), or measure on the real machine",
    )


def _worth(x: torch.Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex() and x.numel() <= _MAX_ELEMENTS


def _address(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata
