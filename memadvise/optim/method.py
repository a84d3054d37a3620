"""The contract of a method: a state spec and pure functions of plain tensor math.

A method knows nothing of devices, chunks, dtypes of parameters, param_groups or files, and does nothing in place.
The engine calls, per parameter and step::

    scalars = method.scalars(step, h)               bias corrections; vectorised over many parameters' steps
    sums    = method.stats(g, ...)                  over boxes (row chunks, shards): results are SUMS and just add up
    small, state = method.finish(sums, ...)         factor-sized work, once a round
    p, state     = method.apply(p, g, small, ...)   per box, element-wise or broadcast

A method with several passes over the gradient (a randomised factorisation, say) has several rounds: what ``finish``
returns as ``small`` reaches ``stats`` of the next round. All tensors a method sees are float32, or float64 for float64
parameters. State is of two kinds: element-wise tensors have the parameter's shape and change in ``apply``, the others
are factor-sized and change in ``finish``.
"""

from __future__ import annotations

import contextlib
import contextvars
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Shape = tuple[int, ...]
Box = tuple[slice, ...]
Tensors = dict[str, Tensor]

_assumed_device: contextvars.ContextVar[str | None] = contextvars.ContextVar("assumed_device", default=None)


def device_type(tensor: Tensor) -> str:
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
    """One state tensor: ``shape``, ``dtype``; its bytes are ``numel * itemsize``, known before allocation.

    ``elementwise``: it has the parameter's shape, is cut like it and changes in ``apply``.
    """

    shape: Shape
    dtype: torch.dtype = torch.float32
    elementwise: bool = False

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


STEP = StateSpec(())  # as in torch.optim.AdamW: a 0-dim float32 tensor, 4 bytes


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic: float32 whatever the parameter's dtype, float64 for float64.

    An EMA in bfloat16 freezes: with beta2 = 0.999 a step is below half a unit in the last place.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Hyper:
    """What a parameter group says this step; ``lr`` may be a 0-dim tensor and is never read on the host."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    @property
    def decay(self) -> float | Tensor:
        """The factor of decoupled weight decay, ``1 - lr * weight_decay``; exactly 1 when lr is 0."""
        return 1 - self.lr * self.weight_decay


class OptionProblem(ValueError):
    """An option of a method that is wrong in itself or does not fit a shape; the registry adds name and place."""

    def __init__(self, option: str | None, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.option = option
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Options:
    """Base of a method's options: frozen, validated in ``__post_init__`` with :class:`OptionProblem`."""


def broadcast_part(tensor: Tensor, box: Box) -> Tensor:
    """The part of ``tensor`` that meets ``box``: axes of size 1, and tensors of another rank, are taken whole."""
    if tensor.ndim != len(box):
        return tensor
    return tensor[tuple(part if size > 1 else slice(None) for part, size in zip(box, tensor.shape, strict=True))]


def is_int(value: Any) -> bool:
    """An int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


class Method(ABC):
    """One update rule. Stateless; ``options`` is always an instance of ``options_type``."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    options_type: ClassVar[type[Options]] = Options
    options_help: ClassVar[dict[str, str]] = {}
    bytes_help: ClassVar[str]
    default_lr: ClassVar[float] = 1e-3
    default_betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    default_weight_decay: ClassVar[float] = 0.01
    lr_factor: ClassVar[float] = 1.0
    matrix_only: ClassVar[bool] = False  # as a default for a whole model, 0-D and 1-D tensors keep dense AdamW state

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        return self  # stateless: the copy of an optimizer uses the same method

    def check(self, shape: Shape, options: Any) -> None:  # noqa: B027 - nothing to check is a valid answer
        """Raise :class:`OptionProblem` if ``options`` do not fit a parameter of ``shape``."""

    @abstractmethod
    def spec(self, shape: Shape, options: Any, dtype: torch.dtype) -> dict[str, StateSpec]:
        """The state of a parameter of ``shape``, statistics in ``dtype``; in the order it is created."""

    def scalars(self, step: Tensor, h: Hyper) -> Tensors:
        """0-dim quantities of one step, element-wise in ``step`` (float64, 1, 2, ...), which may be a vector."""
        return {}

    def rounds(self, options: Any) -> int:
        """How many passes of ``stats`` and ``finish`` a step takes before ``apply``."""
        return 0

    def sums_spec(self, shape: Shape, options: Any, round_: int) -> dict[str, Shape]:
        """The shapes of what ``stats`` sums to over a whole parameter."""
        return {}

    def reduced_axes(self, shape: Shape, options: Any) -> tuple[int, ...] | None:
        """A box that holds these axes whole is independent of the others; None: all boxes depend on each other."""
        return ()

    def stats(self, g: Tensor, options: Any, *, small: Tensors, round_: int) -> Tensors:
        """Sums over the elements of one box ``g``. Sums of boxes (and of shards) add up."""
        return {}

    def finish(
        self, sums: Tensors, state: Tensors, small: Tensors, h: Hyper, shape: Shape, options: Any, round_: int
    ) -> tuple[Tensors, Tensors]:
        """Factor-sized work: what ``apply`` (or the next round) needs, and the new factor-sized state."""
        return small, {}

    @abstractmethod
    def apply(
        self, p: Tensor, g: Tensor, state: Tensors, small: Tensors, h: Hyper, options: Any
    ) -> tuple[Tensor, Tensors]:
        """The new parameter and the new element-wise state of one box."""

    def take(self, key: str, tensor: Tensor, box: Box) -> Tensor:
        """The part of a factor-sized ``tensor`` that belongs to ``box``; by default it broadcasts with the box."""
        return broadcast_part(tensor, box)

    def second_moment(self, v: Tensor, options: Any) -> Tensor | None:
        """What this method would hold in place of the dense second moment ``v``, expanded; None if it holds none."""
        return None
