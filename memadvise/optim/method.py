"""The contract of a method: a state spec and pure functions of plain tensor math.

A method knows nothing of devices, chunks, codecs, param_groups or files, and does nothing in place. Per parameter and
step the engine calls::

    scalars    = method.scalars(step, h, options)    what depends on the step alone: bias corrections
    small, new = method.prepare(visit, state, ctx)   factor-sized work; ``visit`` shows it the gradient, box by box
    u, state   = method.update(part, ctx)            per box, element-wise or broadcast; the engine then moves p by -u

``visit(round_, small, shapes)`` calls ``method.stats`` on every box (row chunks, shards) and returns the total: results
are SUMS and just add up. Most methods leave ``prepare`` alone and give ``stats`` and ``finish`` for a fixed number of
rounds; one whose passes depend on what it finds (an adaptive rank, say) writes its own loop.

All tensors a method sees are float32, or float64 for float64 parameters. State is of two kinds: element-wise tensors
have the (viewed) parameter's shape and change in ``update``, the others are factor-sized and change in ``prepare``.
"""

from __future__ import annotations

import contextlib
import contextvars
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memadvise.optim.noise import key_of

Shape = tuple[int, ...]
Box = tuple[slice, ...]
Tensors = dict[str, Tensor]
Round = int | str
Visit = Callable[[Round, Tensors, dict[str, Shape]], Tensors]

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


def read(tensor: Tensor, otherwise: float) -> float:
    """The number in ``tensor``; ``otherwise`` where there is none to be read (a trace's fake tensor, "meta").

    On a GPU this waits for the device: only for decisions that cannot be made there, and not at every step.
    """
    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        return otherwise
    return tensor.item()


@dataclass(frozen=True)
class Runs:
    """How a factor-sized tensor is cut with its parameter: ``entries`` of its ``axis`` for every ``length`` neighbours
    of the view's first axis. The last run may be shorter and have fewer; boxes hold whole runs.
    """

    length: int
    entries: int = 1
    axis: int = 0


@dataclass(frozen=True)
class StateSpec:
    """One state tensor: ``shape``, ``dtype``; its bytes are ``numel * itemsize``, known before allocation.

    ``elementwise``: it has the parameter's (viewed) shape, is cut like it and changes in ``update``.
    ``moment``: "first" or "second" where a codec may hold it in fewer bits. ``host``: a number that steers the
    computation and lives on the CPU, like the step. ``runs``: it holds something for every so many elements.
    """

    shape: Shape
    dtype: torch.dtype = torch.float32
    elementwise: bool = False
    moment: str | None = None
    host: bool = False
    runs: Runs | None = None

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


STEP = StateSpec((), host=True)  # as in torch.optim.AdamW: a 0-dim float32 tensor, 4 bytes


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


@dataclass(frozen=True)
class Context:
    """What a method may know of the parameter and the moment, beside tensors.

    Attributes:
        h: the hyper-parameters of its group.
        options: its own options.
        shape: the (viewed) shape of the parameter, or of the box that is stepped for itself.
        scalars: what :meth:`Method.scalars` gave, 0-dim tensors.
        key: a hash of the seed and the parameter's name, for :mod:`memadvise.optim.noise`.
        step: 1, 2, ... on the host, if the method has a "step" in its spec, else 0; 1 in a trace.
        start: the number of the box's first element within the parameter, row-major.
        coded: whether a moment is held in fewer bits, so that it may not be what the gradients made it.
    """

    h: Hyper
    options: Any
    shape: Shape
    scalars: Tensors
    key: int = 0
    step: int = 0
    start: int = 0
    coded: bool = False

    def key_for(self, *parts: int | str) -> int:
        """A key of its own for each purpose (and epoch)."""
        return key_of(self.key, *parts)


class Part:
    """One box: its gradient, what ``prepare`` gave cut to it, and lazily its weights and decoded element-wise state."""

    def __init__(
        self, g: Tensor, small: Tensors, box: Box, load_p: Callable[[], Tensor], load_state: Callable[[], Tensors]
    ) -> None:
        self.g, self.small, self.box = g, small, box
        self._load_p, self._load_state = load_p, load_state

    @cached_property
    def p(self) -> Tensor:
        """The weights before the step; not to be changed."""
        return self._load_p()

    @cached_property
    def state(self) -> Tensors:
        """The element-wise state before the step; not to be changed."""
        return self._load_state()


def broadcast_part(tensor: Tensor, box: Box) -> Tensor:
    """The part of ``tensor`` that meets ``box``: axes of size 1, and tensors of another rank, are taken whole."""
    if tensor.ndim != len(box):
        return tensor
    return tensor[tuple(part if size > 1 else slice(None) for part, size in zip(box, tensor.shape, strict=True))]


def is_int(value: Any) -> bool:
    """An int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite int or float that is not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


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
    default_eps: ClassVar[float] = 1e-8
    default_weight_decay: ClassVar[float] = 0.01
    lr_factor: ClassVar[float] = 1.0
    matrix_only: ClassVar[bool] = False  # as a default for a whole model, 0-D and 1-D tensors keep dense AdamW state
    slow: ClassVar[bool] = False  # tens of times AdamW's step: probed only on request
    hidden_only: ClassVar[bool] = False  # its paper leaves embedding tables and output heads to AdamW
    sharded: ClassVar[bool] = True  # whether its functions work on DTensors as they stand

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        return self  # stateless: the copy of an optimizer uses the same method

    def check(self, shape: Shape, options: Any) -> None:  # noqa: B027 - nothing to check is a valid answer
        """Raise :class:`OptionProblem` if ``options`` do not fit a parameter of ``shape`` (its own, not the view)."""

    def check_composition(self, options: Any, compose: Any) -> None:  # noqa: B027 - most go with everything
        """Raise :class:`OptionProblem` if this method is unsound with ``compose`` (a ``compose.Compose``)."""

    def view(self, shape: Shape, options: Any) -> Shape:
        """The shape in which the method sees a parameter of ``shape``: a convolution as a matrix, say."""
        return shape

    @abstractmethod
    def spec(self, shape: Shape, options: Any, dtype: torch.dtype) -> dict[str, StateSpec]:
        """The state of a parameter of (viewed) ``shape``, statistics in ``dtype``; in the order it is created."""

    def scalars(self, step: Tensor, h: Hyper, options: Any) -> Tensors:
        """0-dim quantities of one step, element-wise in ``step`` (float64, 1, 2, ...), which may be a vector."""
        return {}

    def for_vectors(self, options: dict[str, Any]) -> dict[str, Any] | None:
        """Its own options for 0-D and 1-D tensors where a whole model gets ``options`` and it is ``matrix_only``; None
        for dense AdamW.
        """
        return None

    # ------------------------------------------------------------ factor-sized work

    def reduced_axes(self, shape: Shape, options: Any) -> tuple[int, ...] | None:
        """A box that holds these axes whole is independent of the others; None: all boxes depend on each other."""
        return ()

    def traceable(self, shape: Shape, options: Any) -> bool:
        """Whether a step can be compiled: nothing is decided on the host, and ``ctx.step`` and ``ctx.key`` not used."""
        return False

    def groups_rows(self, shape: Shape, options: Any) -> bool:
        """Whether rows are told apart by their number, so that it is a constant of a compiled step."""
        return False

    def whole_axes(self, shape: Shape, options: Any) -> int:
        """How many trailing axes no box may cut, whatever their size."""
        return 0

    def rounds(self, options: Any) -> int:
        """How many passes of ``stats`` and ``finish`` a step takes before ``update``."""
        return 0

    def visits(self, shape: Shape, options: Any) -> int:
        """How often ``prepare`` asks for sums, where that is known: :meth:`traceable` methods."""
        return self.rounds(options)

    def sums_spec(self, shape: Shape, options: Any, round_: int) -> dict[str, Shape]:
        """The shapes of what ``stats`` sums to over a whole parameter."""
        return {}

    def stats(self, part: Part, ctx: Context, round_: Any) -> Tensors:
        """Sums over the elements of one box. Sums of boxes (and of shards) add up."""
        return {}

    def finish(
        self, sums: Tensors, state: Tensors, small: Tensors, ctx: Context, round_: int
    ) -> tuple[Tensors, Tensors]:
        """Factor-sized work: what ``update`` (or the next round) needs, and the new factor-sized state."""
        return small, {}

    def prepare(self, visit: Visit, state: Tensors, ctx: Context) -> tuple[Tensors, Tensors]:
        """What ``update`` needs beside the box, and the new factor-sized state; ``state`` holds the old, decoded."""
        small, changed = dict(ctx.scalars), dict[str, Tensor]()
        for round_ in range(self.rounds(ctx.options)):
            sums = visit(round_, small, self.sums_spec(ctx.shape, ctx.options, round_))
            small, new = self.finish(sums, {**state, **changed}, small, ctx, round_)
            changed.update(new)
        return small, changed

    def take(self, key: str, tensor: Tensor, box: Box) -> Tensor:
        """The part of a factor-sized ``tensor`` that belongs to ``box``, a view; by default it broadcasts with it."""
        return broadcast_part(tensor, box)

    def scratch_bytes(self, shape: Shape, options: Any) -> int:
        """Upper bound of what ``prepare`` allocates at once, beside box-sized tensors."""
        spec = self.sums_spec(shape, options, 0) if self.rounds(options) else {}
        return 6 * 4 * sum(torch.Size(s).numel() for s in spec.values())

    def scratch_bytes_on(self, device: str, shape: Shape, options: Any) -> int:
        """:meth:`scratch_bytes` on a kind of device, where it makes a difference: few launches, or little memory."""
        return self.scratch_bytes(shape, options)

    # ------------------------------------------------------------ the update

    @abstractmethod
    def update(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        """What is subtracted from the (decayed) weights of one box, and its new element-wise state."""

    def direction(self, part: Part, ctx: Context) -> Tensor:
        """A tensor with the signs of the update; a method may know them without all of it."""
        return self.update(part, ctx)[0]

    def momentum(self, options: Any) -> bool:
        """Whether the update follows a first moment, so that it can disagree with the gradient's sign."""
        return True

    def decays(self, shape: Shape, options: Any) -> str:
        """When weight decay happens: "before" the update (torch), "after" it, or "never" for this shape."""
        return "before"

    def second_moment(self, v: Tensor, options: Any) -> Tensor | None:
        """What this method would hold in place of the dense second moment ``v``, expanded; None if it holds none."""
        return None
