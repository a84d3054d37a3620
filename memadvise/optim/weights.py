"""How new weights, computed in float32, are written back: the forms, and what each keeps beside the weights.

* ``nearest``: rounded to the parameter's dtype. For float32 and float64 that is exact; a bfloat16 weight of 1.0 ignores
  every update below 0.002.
* ``stochastic``: bfloat16, rounded up or down at random so that small updates arrive on average (arXiv 2010.06192).
* ``ecc8``, ``ecc16``: bfloat16 or float16, and one or two bytes a weight in the optimizer's state that say where
  between two neighbours the weight is: 24 or 32 bits together (arXiv 2602.23349; :mod:`memadvise.optim.weights_ecc`).
  The correction begins as 0, and belongs to a checkpoint as much as the weights do. float32 has nothing to correct.
* ``int8``: bytes in groups of 128 with a scale and a zero point, rounded at random: 1.023 bytes a weight, nothing
  beside them. The parameter is an :class:`~memadvise.optim.int8_tensor.Int8Weight`.

A form is opened on a parameter cut in boxes: one :class:`WeightPart` a box, which loads and stores float32 values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memadvise.optim import weights_ecc
from memadvise.optim.codecs.bf16 import to_bfloat16
from memadvise.optim.codecs.codec import Rows
from memadvise.optim.int8_groups import decode, encode_
from memadvise.optim.int8_tensor import Int8Weight
from memadvise.optim.method import Shape, StateSpec, Tensors, compute_dtype

if TYPE_CHECKING:
    from memadvise.optim.executors.cuts import Cuts


class WeightPart(ABC):
    """The weights of one box."""

    @abstractmethod
    def load(self, out: Tensor | None = None) -> Tensor:
        """Their values in float32 (or float64): the weights themselves where they are that already, else a copy."""

    @abstractmethod
    def store(self, values: Tensor, noise: Tensor | None) -> None:
        """Write values back; ``noise`` is uniform in [0, 1), of the box's shape, if the form asked for it.

        Values of 0-dim weights may be float64: torch lets the step's 0-dim scalars decide.
        """


class WeightForm(ABC):
    """One way of holding weights; ``specs`` is what it keeps in the optimizer's state."""

    name: ClassVar[str]
    noisy: ClassVar[bool] = False
    matrix_only: ClassVar[bool] = False  # vectors and scalars cannot be held so

    @abstractmethod
    def problem(self, p: Tensor) -> str | None:
        """Why ``p`` cannot be held in this form; None if it can."""

    def blocks(self, p: Tensor) -> tuple[Rows, int] | None:
        """Rows, and elements of a block in them, that no box may cut; None if any box will do."""
        return None

    def specs(self, shape: Shape) -> dict[str, StateSpec]:
        """State of a parameter of (viewed) ``shape``, cut in boxes like it."""
        return {}

    @abstractmethod
    def parts(self, p: Tensor, extra: Tensors, cuts: Cuts) -> Sequence[WeightPart]:
        """One part for each box; ``extra`` is the state that ``specs`` asked for."""


class _Direct(WeightPart):
    def __init__(self, p: Tensor) -> None:
        self.p = p

    def load(self, out: Tensor | None = None) -> Tensor:
        dtype = compute_dtype(self.p.dtype)
        return self.p if self.p.dtype == dtype else self.p.to(dtype) if out is None else out.copy_(self.p)

    def store(self, values: Tensor, noise: Tensor | None) -> None:
        if values is not self.p:
            self.p.copy_(values)


class Nearest(WeightForm):
    """Rounded to the parameter's dtype."""

    name = "nearest"

    def problem(self, p: Tensor) -> str | None:
        return None

    def parts(self, p: Tensor, extra: Tensors, cuts: Cuts) -> Sequence[WeightPart]:
        return [_Direct(part) for part in cuts.parts(p)]


class _Rounded(_Direct):
    def store(self, values: Tensor, noise: Tensor | None) -> None:
        self.p.copy_(to_bfloat16(values.to(torch.float32), noise))


class Stochastic(WeightForm):
    """bfloat16, rounded at random."""

    name = "stochastic"
    noisy = True

    def problem(self, p: Tensor) -> str | None:
        if p.dtype == torch.bfloat16:
            return None
        return f"weights: stochastic is for bfloat16 parameters, not {str(p.dtype).removeprefix('torch.')}"

    def parts(self, p: Tensor, extra: Tensors, cuts: Cuts) -> Sequence[WeightPart]:
        return [_Rounded(part) for part in cuts.parts(p)]


class _Corrected(WeightPart):
    def __init__(self, p: Tensor, correction: Tensor) -> None:
        self.p, self.correction = p, correction

    def load(self, out: Tensor | None = None) -> Tensor:
        w = weights_ecc.join(self.p, self.correction)
        return w if out is None else out.copy_(w)

    def store(self, values: Tensor, noise: Tensor | None) -> None:
        weights_ecc.split(values.to(torch.float32), self.p, self.correction, noise)


class ErrorCorrected(WeightForm):
    """bfloat16 or float16, and a correction in the state; see :mod:`memadvise.optim.weights_ecc`."""

    def problem(self, p: Tensor) -> str | None:
        if p.dtype in (torch.bfloat16, torch.float16):
            return None
        dtype = str(p.dtype).removeprefix("torch.")
        return f"weights: {self.name} corrects bfloat16 and float16 parameters; {dtype} has nothing to correct"

    def parts(self, p: Tensor, extra: Tensors, cuts: Cuts) -> Sequence[WeightPart]:
        pairs = zip(cuts.parts(p), cuts.parts(extra["correction"]), strict=True)
        return [_Corrected(*pair) for pair in pairs]


class Ecc8(ErrorCorrected):
    """One byte of correction, rounded at random."""

    name = "ecc8"
    noisy = True

    def specs(self, shape: Shape) -> dict[str, StateSpec]:
        return {"correction": StateSpec(shape, torch.int8, elementwise=True)}


class Ecc16(ErrorCorrected):
    """Two bytes of correction: nothing is lost."""

    name = "ecc16"

    def specs(self, shape: Shape) -> dict[str, StateSpec]:
        return {"correction": StateSpec(shape, torch.int16, elementwise=True)}


class _Int8Part(WeightPart):
    def __init__(self, w: Int8Weight, start: int, shape: Shape) -> None:
        self.w, self.shape, self.held = w, shape, w.region(start, start + math.prod(shape))

    def load(self, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(self.shape, dtype=compute_dtype(self.w.dtype), device=self.w.device)
        decode(*self.held, self.w.group, out.view(self.held[0].shape))
        return out

    def store(self, values: Tensor, noise: Tensor | None) -> None:
        noise = None if noise is None else noise.reshape(self.held[0].shape)
        encode_(values.reshape(self.held[0].shape), *self.held, self.w.group, noise)


class Int8(WeightForm):
    """Groups of integers with a scale and a zero point, rounded at random."""

    name = "int8"
    noisy = True
    matrix_only = True

    def problem(self, p: Tensor) -> str | None:
        if not isinstance(p, Int8Weight):
            return (
                "weights: int8 needs a parameter that is held so: call memadvise.optim.quantize_weights(model) before "
                "making the optimizer, or use create_optimizer(model, plan), which does"
            )
        return "it is a part of int8 weights, not a whole parameter" if p.views else None

    def blocks(self, p: Tensor) -> tuple[Rows, int] | None:
        assert isinstance(p, Int8Weight)
        return p.blocks

    def parts(self, p: Tensor, extra: Tensors, cuts: Cuts) -> Sequence[WeightPart]:
        assert isinstance(p, Int8Weight)
        torch.autograd.graph.increment_version(p)  # a backward pass that still needs the old weights has to say so
        return [_Int8Part(p, start, shape) for start, shape in zip(cuts.starts, cuts.shapes, strict=True)]


FORMS: dict[str, WeightForm] = {form.name: form for form in (Nearest(), Stochastic(), Ecc8(), Ecc16(), Int8())}
