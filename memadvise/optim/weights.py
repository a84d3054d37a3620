"""How new weights, computed in float32, are written back: the forms, and what each keeps beside the weights.

* ``nearest``: rounded to the parameter's dtype. For float32 and float64 that is exact; a bfloat16 weight of 1.0 ignores
  every update below 0.002.
* ``stochastic``: bfloat16, rounded up or down at random so that small updates arrive on average (arXiv 2010.06192).

A form is opened on a parameter cut in boxes: one :class:`WeightPart` a box, which loads and stores float32 values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memadvise.optim.codecs.bf16 import to_bfloat16
from memadvise.optim.method import Shape, StateSpec, Tensors, compute_dtype

if TYPE_CHECKING:
    from memadvise.optim.executors.work import Cuts


class WeightPart(ABC):
    """The weights of one box."""

    @abstractmethod
    def load(self, out: Tensor | None = None) -> Tensor:
        """Their values in float32 (or float64): the weights themselves where they are that already, else a copy."""

    @abstractmethod
    def store(self, values: Tensor, noise: Tensor | None) -> None:
        """Write values back; ``noise`` is uniform in [0, 1), of the box's shape, if the form asked for it."""


class WeightForm(ABC):
    """One way of holding weights; ``specs`` is what it keeps in the optimizer's state."""

    name: ClassVar[str]
    noisy: ClassVar[bool] = False

    @abstractmethod
    def problem(self, p: Tensor) -> str | None:
        """Why ``p`` cannot be held in this form; None if it can."""

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
        self.p.copy_(to_bfloat16(values, noise))


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


FORMS: dict[str, WeightForm] = {form.name: form for form in (Nearest(), Stochastic())}
