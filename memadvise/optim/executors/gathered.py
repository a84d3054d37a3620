"""Small tensors of element-wise methods, stepped as one: norms and biases cost more calls than arithmetic.

They are copied side by side, stepped by chunked as a single tensor, and copied back: a dozen operations for a hundred
tensors instead of a dozen each. The result is that of stepping them one by one, bit for bit. The copies take at most
:data:`TOGETHER` elements at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from memadvise.optim.executors import chunked
from memadvise.optim.executors.work import Segments, Work
from memadvise.optim.method import Hyper, device_type
from memadvise.optim.recipe import Recipe, make_recipe

SMALL = 1 << 14  # elements of one tensor
TOGETHER = {"cpu": 1 << 16, "cuda": 1 << 20}  # and of all of them


def step(works: Sequence[Work], h: Hyper) -> list[Work]:
    """One step of those that can be gathered; the others are returned."""
    alike: dict[Any, list[Work]] = {}
    rest: list[Work] = []
    for work in works:
        if _small(work):
            recipe = work.recipe
            key = (recipe.method.name, recipe.options, recipe.compose, work.p.dtype, work.p.device, work.moment)
            alike.setdefault(key, []).append(work)
        else:
            rest.append(work)
    for members in alike.values():
        for some in _portions(members, TOGETHER.get(device_type(members[0].p), 0)):
            if len(some) == 1:
                rest += some
            else:
                _step_together(some, h)
    return rest


def _small(work: Work) -> bool:
    recipe, p = work.recipe, work.p
    if p.numel() > SMALL or not can_gather(recipe):
        return False
    return all(t.is_contiguous() for t in (p, work.g, *(work.state[name] for name in recipe.elementwise)))


def can_gather(recipe: Recipe) -> bool:
    """Whether neither shape nor place of a value matters, and nothing is random. Caution counts for each tensor."""
    method, options, view, compose = recipe.method, recipe.options, recipe.view, recipe.compose
    if recipe.coded or compose.weights != "nearest" or recipe.factors:
        return False
    flat = (math.prod(view),)
    same = method.decays(view, options) == method.decays(flat, options) and method.view(flat, options) == flat
    return same and method.traceable(view, options) and not method.visits(view, options)


def _portions(works: list[Work], limit: int) -> Iterator[list[Work]]:
    some: list[Work] = []
    count = 0
    for work in works:
        if some and count + work.p.numel() > limit:
            yield some
            some, count = [], 0
        some.append(work)
        count += work.p.numel()
    if some:
        yield some


def _step_together(works: list[Work], h: Hyper) -> None:
    first = works[0]
    recipe, names = first.recipe, first.recipe.elementwise
    sizes = [work.p.numel() for work in works]
    p, g = _side_by_side([work.p for work in works]), _side_by_side([work.g for work in works])
    state = {name: _side_by_side([work.state[name] for work in works]) for name in names}
    flat = make_recipe(recipe.method, recipe.options, (sum(sizes),), recipe.dtype, recipe.compose)
    segments = _segments(tuple(sizes), p.device) if recipe.compose.cautious else None
    chunked.step([Work(p, g, state, flat, first.scalars, step=first.step, segments=segments)], h)
    _back(p, [work.p for work in works], sizes)
    for name in names:
        _back(state[name], [work.state[name] for work in works], sizes)


def _segments(sizes: tuple[int, ...], device: torch.device) -> Segments:
    fakes = detect_fake_mode() is not None  # a trace: not to be kept
    return _made_segments(sizes, device) if fakes else _kept_segments(sizes, device)


def _made_segments(sizes: tuple[int, ...], device: torch.device) -> Segments:
    # Piece by piece: a list of sizes would be copied to the device, and waited for.
    ids = torch.cat([torch.full((size,), i, dtype=torch.int32, device=device) for i, size in enumerate(sizes)])
    counts = torch.zeros(len(sizes), device=device).index_add_(0, ids, torch.ones(sum(sizes), device=device))
    return Segments(ids, counts)


@lru_cache(maxsize=16)
def _kept_segments(sizes: tuple[int, ...], device: torch.device) -> Segments:
    return _made_segments(sizes, device)


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _back(flat: Tensor, targets: list[Tensor], sizes: list[int]) -> None:
    torch._foreach_copy_([t.detach().view(-1) for t in targets], list(flat.split(sizes)))
