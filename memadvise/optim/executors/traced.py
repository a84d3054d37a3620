"""A whole step of one parameter as a function of tensors: what is traced and compiled.

Nothing here runs in a step. The tensors come by name: weights, gradient and stored state of the parameter, and what
changes from step to step: the learning rate, the scalars of the step, keys of random numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from memadvise.optim import noise
from memadvise.optim.executors.cuts import Cuts
from memadvise.optim.executors.work import agreement, caution_scale, encode, moved, noise_like
from memadvise.optim.method import Context, Hyper, Part, Round, Shape, Tensors, compute_dtype
from memadvise.optim.recipe import Coded, Recipe
from memadvise.optim.weights import WeightPart

WEIGHTS, GRADIENT, LR, SIGNS = "p", "g", "lr", "signs"
AGREEMENT, MOVE = "agreement", "move"
_WIDEST = 4096  # elements of a block

Pass = int | str  # a visit by its number, AGREEMENT or MOVE


@dataclass(frozen=True)
class Program:
    """What is compiled: a recipe, and the constants of its parameter group (betas, eps, weight decay)."""

    recipe: Recipe
    constants: tuple[float, float, float, float]

    @property
    def key(self) -> Any:
        """Programs with the same do the same, whatever the number of rows."""
        recipe = self.recipe
        when = recipe.method.decays(recipe.view, recipe.options)
        return recipe.method.name, recipe.options, recipe.compose, recipe.dtype, when, self.constants

    def function(self, what: Pass, shared: Sequence[str], own: Sequence[str], count: int) -> Callable[..., Any]:
        """A pass over ``count`` parameters: a function of the ``shared`` tensors and of each one's ``own``. It returns
        the sums of a visit, those of caution, or nothing where it makes the step.
        """

        def traced(*tensors: Tensor) -> tuple[Tensor, ...]:
            found: list[Tensor] = []
            common, rest = tensors[: len(shared)], tensors[len(shared) :]
            for i in range(count):
                mine = rest[i * len(own) : (i + 1) * len(own)]
                one = _Whole(self, dict(zip([*shared, *own], [*common, *mine], strict=True)))
                if isinstance(what, int):
                    found.extend(one.sums(what))
                elif what == AGREEMENT:
                    found.append(one.agreement())
                else:
                    one.move()
            return tuple(found)

        return traced


def _held_once(small: Tensor) -> Tensor:
    """``small``, computed once before the loop over the parameter: inductor would compute it anew for every element.

    To it this is a view, and what is viewed is held in memory.
    """
    small = small.contiguous()  # as it lies in memory in fact: an expanded axis would be taken at its word
    return small if small.ndim == 0 else small.as_strided(small.shape, small.stride())


class _Enough(Exception):
    """The sums that were wanted are there."""

    def __init__(self, sums: Tensors) -> None:
        super().__init__()
        self.sums = sums


class _Whole:
    """A whole parameter in a kernel that is being traced.

    Where state or weights are held in blocks of neighbours, the update sees everything as rows of one block: finding a
    block's largest value and writing its codes are then the same loop, and what lies between never leaves the cache.
    """

    def __init__(self, program: Program, tensors: Tensors) -> None:
        recipe = self.recipe = program.recipe
        self.tensors = tensors
        self.width = block_width(recipe) or 0
        seen = tuple(tensors[GRADIENT].shape)
        self.shape: Shape = seen
        if self.width and recipe.method.visits(recipe.view, recipe.options):
            # the rows that sums are of; blocks come from outside, as a kernel that made them would write twice
            self.shape = (seen[0] // (math.prod(recipe.view[1:]) // self.width), *recipe.view[1:])
        beta1, beta2, eps, weight_decay = program.constants
        self.h = Hyper(tensors[LR], beta1, beta2, eps, weight_decay)
        scalars = {name.removeprefix("scalar."): t for name, t in tensors.items() if name.startswith("scalar.")}
        self.ctx = Context(self.h, recipe.options, self.shape, scalars, coded=bool(recipe.coded))

    # ------------------------------------------------------------ what the kernel is given, as the method sees it

    def _key(self, name: str) -> noise.Key | None:
        low = self.tensors.get(f"key.{name}.low")
        return None if low is None else (low, self.tensors[f"key.{name}.high"])

    def _stored(self, coded: Coded, elementwise: bool) -> tuple[Tensors, int]:
        """What is held of a coded tensor, and the length of its rows."""
        length = self.width if elementwise and self.width else coded.rows.length
        return {suffix: self.tensors[f"state.{name}"] for suffix, name in coded.names.items()}, length

    def _held(self, name: str) -> Tensor:
        """A logical state tensor, decoded where it is held in fewer bits; by blocks where it is cut so."""
        coded, spec = self.recipe.coded.get(name), self.recipe.logical[name]
        if coded is None:
            return self.tensors[f"state.{name}"]
        decoded = coded.codec.decode(*self._stored(coded, spec.elementwise), signed=coded.signed).to(spec.dtype)
        if spec.elementwise:
            return decoded if self.width else decoded.view(self.shape)
        return decoded.view(spec.shape)

    def _weights(self, shape: Shape) -> WeightPart:
        return self.recipe.form.parts(self.tensors[WEIGHTS], {}, Cuts.whole(shape))[0]

    def _part(self, small: Tensors, *, cut: bool = False) -> tuple[Part, WeightPart]:
        """The parameter in its own shape, or with ``cut`` by blocks where there are any."""
        g = self.tensors[GRADIENT].to(compute_dtype(self.recipe.dtype))
        weights = self._weights(tuple(g.shape))
        by_blocks = bool(cut and self.width)
        small = {name: _held_once(t) for name, t in small.items()}
        if by_blocks:  # after that: of what is spread over blocks nothing should be held
            small = {name: self._over_blocks(t, self.width) for name, t in small.items()}
        shape = tuple(g.shape) if by_blocks else self.shape

        def state() -> Tensors:
            return {name: self._held(name).view(shape) for name in self.recipe.elementwise}

        boxes = Cuts.whole(shape).boxes
        return Part(g.view(shape), small, boxes[0], lambda: weights.load().view(shape), state), weights

    def _over_blocks(self, small: Tensor, width: int) -> Tensor:
        """A tensor that broadcasts with the parameter, for the parameter as rows of ``width``."""
        if small.ndim == 0:
            return small
        if math.prod(small.shape[1:]) == 1:
            per_row = math.prod(self.shape[1:]) // width
            return small.reshape(-1, 1).expand(self.shape[0], per_row).reshape(-1, 1)
        return small.expand(self.shape).reshape(-1, width)

    # ------------------------------------------------------------ what it does

    def _prepare(self, until: int | None = None) -> tuple[Tensors, Tensors]:
        """The method's, with the sums of earlier kernels; ends with :class:`_Enough` at visit ``until``."""
        method, numbers = self.recipe.method, itertools.count()

        def visit(round_: Round, small: Tensors, shapes: dict[str, Shape]) -> Tensors:
            number = next(numbers)
            known = [t for name, t in self.tensors.items() if name.startswith(f"sums.{number}.")]
            if known and number != until:
                return dict(zip(shapes, known, strict=True))
            sums = method.stats(self._part(small)[0], self.ctx, round_)
            if number == until:
                raise _Enough({name: sums[name] for name in shapes})
            return sums

        return method.prepare(visit, {name: self._held(name) for name in self.recipe.factors}, self.ctx)

    def sums(self, number: int) -> tuple[Tensor, ...]:
        try:
            self._prepare(number)
        except _Enough as enough:
            return tuple(enough.sums.values())
        raise AssertionError(f"{self.recipe.method.name} has fewer than {number + 1} visits")

    def agreement(self) -> Tensor:
        part, _ = self._part(self._prepare()[0], cut=True)
        return agreement(self.recipe.method.direction(part, self.ctx), part.g)

    def move(self) -> None:
        recipe = self.recipe
        small, new = self._prepare()
        part, weights = self._part(small, cut=True)
        u, changed = recipe.method.update(part, self.ctx)
        signs, scale = self.tensors.get(SIGNS), None
        if signs is not None:
            scale = caution_scale(str(recipe.compose.cautious), signs, part.g.numel())
        p = moved(part.p, part.g, u, scale, self.h, recipe)
        for name, value in {**new, **changed}.items():
            coded = recipe.coded.get(name)
            if coded is None:
                self.tensors[f"state.{name}"].copy_(value)
                continue
            stored, length = self._stored(coded, name in changed)
            encode(coded, value.reshape(-1, length), self._key(name), 0, stored)
        weights.store(p, noise_like(self._key(WEIGHTS), 0, p))


def block_width(recipe: Recipe) -> int | None:
    """The elements of a block that all blocks divide; 0 where there are none, None where rows end within one."""
    coded = [recipe.coded[name] for name in recipe.elementwise if name in recipe.coded]
    blocks = [(c.rows, c.codec.block) for c in coded if c.codec.block]
    if not blocks:
        return 0
    width = math.lcm(*(block for _, block in blocks))
    row = math.prod(recipe.view[1:])
    fits = all(rows.length % width == 0 for rows, _ in blocks) and row % width == 0
    return width if fits and width <= _WIDEST else None
