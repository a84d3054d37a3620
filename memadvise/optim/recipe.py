"""What was decided for one parameter, resolved to tensors: method, options, codecs, form of the weights, state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from memadvise.optim.codecs.codec import Codec, Rows, rows_of
from memadvise.optim.codecs.table import CODECS
from memadvise.optim.compose import PLAIN, Compose
from memadvise.optim.method import STEP, Method, Shape, StateSpec, compute_dtype
from memadvise.optim.weights import FORMS, WeightForm

CORRECTION = "weight_"  # prefix of the state that a form of weights keeps


@dataclass(frozen=True)
class Coded:
    """How one moment is held: ``names`` maps the codec's suffixes to state tensors."""

    codec: Codec
    rows: Rows
    signed: bool
    names: dict[str, str]


@dataclass(frozen=True, eq=False)
class Recipe:
    """Everything an executor needs to know beside the tensors.

    ``logical`` is the state as the method sees it, ``specs`` as it is stored; ``coded`` leads from one to the other.
    """

    method: Method
    options: Any
    compose: Compose
    view: Shape
    dtype: torch.dtype
    logical: dict[str, StateSpec]
    specs: dict[str, StateSpec]
    coded: dict[str, Coded]
    blocks: tuple[Rows, int] | None = None  # of the weights, where they are held in blocks

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self  # it never changes

    @cached_property
    def form(self) -> WeightForm:
        """How the weights are written back."""
        return FORMS[self.compose.weights]

    @property
    def state_bytes(self) -> int:
        """The exact bytes of the stored state."""
        return sum(spec.num_bytes for spec in self.specs.values())

    @cached_property
    def elementwise(self) -> tuple[str, ...]:
        """The names of the logical state that is cut like the parameter."""
        return tuple(name for name, spec in self.logical.items() if spec.elementwise)

    @cached_property
    def factors(self) -> tuple[str, ...]:
        """The names of the factor-sized logical state, without the step."""
        return tuple(name for name, spec in self.logical.items() if not spec.elementwise and name != "step")


@lru_cache(maxsize=8192)
def make_recipe(
    method: Method,
    options: Any,
    shape: Shape,
    dtype: torch.dtype,
    compose: Compose = PLAIN,
    blocks: tuple[Rows, int] | None = None,
) -> Recipe:
    """The recipe for a parameter of ``shape`` and ``dtype`` (its own), its weights perhaps held in ``blocks``."""
    view = tuple(method.view(shape, options))
    logical = method.spec(view, options, compute_dtype(dtype))
    specs: dict[str, StateSpec] = {}
    coded: dict[str, Coded] = {}
    for name, spec in logical.items():
        codec = CODECS.get(compose.codecs.get(spec.moment or "", ""))
        if codec is None or not math.prod(spec.shape):
            specs[name] = spec
            continue
        rows = rows_of(spec.shape, codec.block)
        signed = spec.moment == "first"
        held = codec.specs(rows, signed=signed)
        coded[name] = Coded(codec, rows, signed, {suffix: name + suffix for suffix in held})
        specs.update({name + suffix: value for suffix, value in held.items()})
    form = FORMS[compose.weights]
    specs.update({CORRECTION + name: spec for name, spec in form.specs(view).items()})
    noisy = form.noisy or (coded and compose.rounding == "stochastic")
    if noisy and "step" not in specs:  # random numbers depend on the step
        specs = {"step": STEP, **specs}
    return Recipe(method, options, compose, view, dtype, logical, specs, coded, blocks)
