"""What executors share: one parameter's work in a step, its coded state, and the move itself."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memadvise.optim import noise
from memadvise.optim.codecs.codec import Rows
from memadvise.optim.executors.cuts import Cuts
from memadvise.optim.method import Context, Hyper, Shape, Tensors, compute_dtype
from memadvise.optim.recipe import CORRECTION, Coded, Recipe
from memadvise.optim.tracing import in_kernel
from memadvise.optim.weights import WeightPart

_CODED_AT_ONCE = 128 * 1024  # elements of a factor-sized moment that are decoded or encoded at once


class Memo:
    """What an executor remembers of a parameter from step to step; a copy of the optimizer begins anew."""

    def __init__(self) -> None:
        self.executors: dict[Any, str] = {}  # chosen
        self.plans: dict[Any, Any] = {}  # of compiled steps

    def __reduce__(self) -> Any:
        return Memo, ()


@dataclass(frozen=True)
class Segments:
    """Several tensors side by side as one: ``ids`` tells of each element which tensor it is of, ``sizes`` how many
    elements each tensor has (in float32).
    """

    ids: Tensor
    sizes: Tensor


@dataclass
class Work:
    """One parameter in one step, in its viewed shape. ``state`` is changed in place; ``step`` is on the host.
    ``segments``: of several parameters that are stepped as one.
    """

    p: Tensor
    g: Tensor
    state: Tensors
    recipe: Recipe
    scalars: Tensors = field(default_factory=dict)
    key: int = 0
    step: int = 0
    memo: Memo = field(default_factory=Memo)
    segments: Segments | None = None

    @property
    def shape(self) -> Shape:
        return self.recipe.view

    @property
    def moment(self) -> tuple[int, ...]:
        """The same for works of one step whose scalars are the same tensors: those of one method and step count."""
        return tuple(map(id, self.scalars.values()))

    def context(self, h: Hyper) -> Context:
        coded = bool(self.recipe.coded)
        return Context(h, self.recipe.options, self.shape, self.scalars, self.key, self.step, coded=coded)

    def factors(self) -> Tensors:
        """The factor-sized state, decoded."""
        return {name: self._factor(name) for name in self.recipe.factors}

    def _factor(self, name: str) -> Tensor:
        coded = self.recipe.coded.get(name)
        if coded is None:
            return self.state[name]
        spec = self.recipe.logical[name]
        decoded = torch.empty(spec.shape, dtype=spec.dtype, device=self.p.device)
        rows = decoded.view(coded.rows.count, coded.rows.length)
        for first, last, start, stop in pieces(coded):  # decoding takes several times what is decoded
            stored = self._stored(coded, first, last, start, stop)
            rows[first:last, start:stop].copy_(coded.codec.decode(stored, stop - start, signed=coded.signed))
        return decoded

    def _stored(self, coded: Coded, *piece: int) -> Tensors:
        """Views of what is held for a piece of a coded tensor."""
        return {suffix: coded.codec.part(suffix, self.state[held], *piece) for suffix, held in coded.names.items()}

    def store_factors(self, new: Tensors) -> None:
        """Write new factor-sized state, encoded where it is held so."""
        for name, value in new.items():
            coded = self.recipe.coded.get(name)
            if coded is None:
                store(self.state[name], value)
                continue
            rows = value.reshape(coded.rows.count, coded.rows.length)
            for first, last, start, stop in pieces(coded):
                targets = self._stored(coded, first, last, start, stop)
                values = rows[first:last, start:stop]
                encode(coded, values, self.noise_key(name), first * coded.rows.length + start, targets)

    def noise_key(self, name: str) -> int | None:
        """Of the random numbers with which the moment ``name`` is rounded; None: to the nearest."""
        stochastic = self.recipe.compose.rounding == "stochastic"
        return noise.key_of(self.key, name, self.step) if stochastic else None

    def weight_key(self) -> int | None:
        """Of the random numbers with which weights are rounded."""
        return noise.key_of(self.key, "weights", self.step) if self.recipe.form.noisy else None

    def weight_parts(self, cuts: Cuts) -> Sequence[WeightPart]:
        extra = {n.removeprefix(CORRECTION): t for n, t in self.state.items() if n.startswith(CORRECTION)}
        return self.recipe.form.parts(self.p, extra, cuts)

    def weight_noise(self, start: int, like: Tensor) -> Tensor | None:
        return noise_like(self.weight_key(), start, like)


def kind_of(work: Work, h: Hyper) -> Hashable:
    """Works of the same kind allocate alike."""
    tensors = [work.p, work.g, *work.state.values(), *work.scalars.values()]
    layout = tuple((t.dtype, t.shape, t.stride(), t.device) for t in tensors)
    segments = 0 if work.segments is None else len(work.segments.sizes)
    return work.recipe, type(work.p), layout, segments, work.step, tuple(map(type, vars(h).values()))


def noise_like(key: noise.Key | None, start: int, like: Tensor) -> Tensor | None:
    """Uniform numbers in [0, 1) of the shape of ``like``, whose first element has the number ``start``."""
    return None if key is None else noise.uniform(key, start, like.numel(), like.device).view(like.shape)


def composed_bytes(recipe: Recipe) -> int:
    """Bytes an element that a step allocates for what a method is composed with, at most: decoded moments for its whole
    length, and what caution, codecs and the form of the weights need in their turns.
    """
    compose, itemsize = recipe.compose, compute_dtype(recipe.dtype).itemsize
    caution = 6 * itemsize if compose.cautious or compose.cautious_decay else 0
    form = 40 if compose.weights != "nearest" else 0
    moments = [recipe.coded[name] for name in recipe.elementwise if name in recipe.coded]
    decoded = sum(itemsize + (4 if itemsize > 4 else 0) for _ in moments)
    return decoded + max([caution, form, *(coded.codec.scratch() for coded in moments)])


def pieces(coded: Coded) -> Iterator[tuple[int, int, int, int]]:
    """A coded tensor in pieces of bounded size: first and last row, and first and last element of these rows. They are
    whole rows, or whole blocks of one that is too long.
    """
    count, length, block = coded.rows.count, coded.rows.length, max(coded.codec.block, 1)
    step = max(_CODED_AT_ONCE // max(length, 1), 1)
    width = length if length <= _CODED_AT_ONCE else max(_CODED_AT_ONCE // block, 1) * block
    for first in range(0, count, step):
        for start in range(0, length, width):
            yield first, min(first + step, count), start, min(start + width, length)


def coded_factor_bytes(recipe: Recipe) -> int:
    """Bytes that a step allocates for factor-sized moments held in fewer bits, at most: all of them decoded, and one
    piece encoded.
    """
    itemsize, factors = compute_dtype(recipe.dtype).itemsize, [recipe.coded.get(name) for name in recipe.factors]
    sizes = [(coded, coded.rows.count * coded.rows.length) for coded in factors if coded is not None]
    piece = max((min(size, _CODED_AT_ONCE) * (coded.codec.scratch() + itemsize) for coded, size in sizes), default=0)
    return itemsize * sum(size for _, size in sizes) + piece


def store(target: Tensor, value: Tensor) -> None:
    """``target`` <- ``value``; a DTensor keeps its placements, whatever those of what it computed."""
    placements = getattr(target, "placements", None)
    if placements is not None:
        value = value.redistribute(placements=placements)  # type: ignore[attr-defined]
    target.copy_(value)


def encode(coded: Coded, values: Tensor, key: noise.Key | None, start: int, targets: Tensors) -> None:
    """Encode ``values`` ([rows, length]; ``start``: the number of its first element) into ``targets``."""
    values = values.to(torch.float32)
    uniform = noise_like(key, start, values)
    for suffix, codes in coded.codec.encode(values, uniform, signed=coded.signed).items():
        targets[suffix].copy_(codes)


class CodedParts:
    """A coded element-wise moment, box by box. Boxes lie in whole rows, or in one row at multiples of a block."""

    def __init__(self, work: Work, name: str, cuts: Cuts) -> None:
        self.work, self.name, self.cuts, self.coded = work, name, cuts, work.recipe.coded[name]

    def _views(self, i: int) -> tuple[Tensors, int]:
        """The stored tensors' parts, and the length of their rows."""
        coded, start = self.coded, self.cuts.starts[i]
        length, stop = coded.rows.length, start + math.prod(self.cuts.shapes[i])
        row, offset = divmod(start, length)
        whole = offset == 0 and stop % length == 0
        rows = (row, stop // length, 0, length) if whole else (row, row + 1, offset, stop - row * length)
        views = {suffix: coded.codec.part(suffix, self.work.state[held], *rows) for suffix, held in coded.names.items()}
        return views, rows[3] - rows[2]

    def load(self, i: int) -> Tensor:
        """The decoded values of box ``i``."""
        views, length = self._views(i)
        decoded = self.coded.codec.decode(views, length, signed=self.coded.signed)
        return decoded.view(self.cuts.shapes[i]).to(self.work.recipe.logical[self.name].dtype)

    def store(self, i: int, values: Tensor) -> None:
        """Encode new values of box ``i``."""
        views, length = self._views(i)
        key = self.work.noise_key(self.name)
        encode(self.coded, values.reshape(-1, length), key, self.cuts.starts[i], views)


def granule(shape: Shape, blocks: Sequence[tuple[Rows, int]]) -> int:
    """Every so many entries of the first axis, all ``blocks`` (rows, elements of a block in them) begin anew."""
    inner = math.prod(shape[1:])
    units = [rows.length if rows.count > 1 else max(block, 1) for rows, block in blocks]
    return math.lcm(inner, *units) // inner if inner else 1


def aligned(rows: Rows, block: int, cuts: Cuts) -> bool:
    """Whether every box lies in whole rows, or in one row from the beginning of a block to the end of one."""
    length = rows.length
    for start, shape in zip(cuts.starts, cuts.shapes, strict=True):
        stop = start + math.prod(shape)
        if start % length == 0 and stop % length == 0:
            continue
        inside = start // length == (stop - 1) // length
        if not inside or (block and start % length % block) or (block and stop % length and stop % length % block):
            return False
    return True


# ---------------------------------------------------------------- caution and the move itself


def agreeing(u: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Whether update and gradient agree in sign, and whether both are not zero, coordinate by coordinate."""
    rise, fall, up, down = u > 0, u < 0, g > 0, g < 0  # of signs, not products: those underflow
    return (rise & up) | (fall & down), (rise | fall) & (up | down)


def agreement(u: Tensor, g: Tensor) -> Tensor:
    """How many coordinates :func:`agreeing` says it of, of both kinds, in u's dtype."""
    agree, support = agreeing(u, g)
    if in_kernel():  # sums of floats are several times as fast there as counts, and exact: few terms meet in each
        return torch.stack([agree.to(u.dtype).sum(), support.to(u.dtype).sum()])
    return torch.stack([agree.sum(), support.sum()]).to(u.dtype)


def caution_scale(mode: str, sums: Tensor, numel: int | Tensor) -> Tensor:
    """The factor that makes up for dropped coordinates (arXiv 2411.16085; modes in :class:`Compose`): of one tensor, or
    of as many as ``sums`` has columns and ``numel`` entries.
    """
    agree, support = sums.unbind()
    if mode == "support":
        return support / agree.clamp(min=1.0)
    if mode == "paper":
        return numel / (agree + 1.0)
    count = numel.clamp(min=1) if isinstance(numel, Tensor) else max(numel, 1)
    return 1.0 / (agree / count).clamp(min=1e-3)


def moved(p: Tensor, g: Tensor, u: Tensor, scale: Tensor | None, h: Hyper, recipe: Recipe) -> Tensor:
    """The weights after the update ``u`` and decay, with caution where ``scale`` is given. A new tensor."""
    if scale is None:
        step = u
    else:  # a NaN has no sign, and should be seen
        kept = ((u > 0) & (g > 0)) | ((u < 0) & (g < 0)) | u.isnan()
        step = torch.where(kept, u * scale.to(u.dtype), 0.0)
    when = recipe.method.decays(recipe.view, recipe.options)
    if not h.weight_decay or when == "never":
        return p - step
    if recipe.compose.cautious_decay:  # with the raw update and the old weights
        return p - torch.where(u.sign() * p.sign() >= 0, p * (h.lr * h.weight_decay), 0.0) - step
    return (p - step) * h.decay if when == "after" else p * h.decay - step
