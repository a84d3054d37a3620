"""The oracle: a method's pure functions as they stand, whole tensors, nothing in place until the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from memadvise.optim.executors.cuts import Cuts
from memadvise.optim.executors.work import (
    CodedParts,
    Work,
    agreement,
    caution_scale,
    coded_factor_bytes,
    composed_bytes,
    moved,
    store,
)
from memadvise.optim.method import Hyper, Part, Round, Shape, Tensors, compute_dtype
from memadvise.optim.recipe import Recipe
from memadvise.optim.weights import Nearest


def step(works: Sequence[Work], h: Hyper) -> None:
    """One step of every parameter, one after the other."""
    for work in works:
        _step_one(work, h)


def _step_one(work: Work, h: Hyper) -> None:
    recipe, ctx = work.recipe, work.context(h)
    cuts = Cuts(work.shape, max(math.prod(work.shape), 1))
    (weights,) = work.weight_parts(cuts)
    p = weights.load()
    g = work.g.to(p.dtype)
    coded = {name: CodedParts(work, name, cuts) for name in recipe.elementwise if name in recipe.coded}
    state = {name: coded[name].load(0) if name in coded else work.state[name] for name in recipe.elementwise}

    def part(small: Tensors) -> Part:
        return Part(g, small, cuts.boxes[0], lambda: p, lambda: state)

    def visit(round_: Round, small: Tensors, shapes: dict[str, Shape]) -> Tensors:
        return recipe.method.stats(part(small), ctx, round_)

    small, factors = recipe.method.prepare(visit, work.factors(), ctx)
    u, changed = recipe.method.update(part(small), ctx)
    mode = recipe.compose.cautious
    scale = None
    if mode:
        signs = agreement(recipe.method.direction(part(small), ctx), g)
        scale = caution_scale(str(mode), signs, math.prod(work.shape))
    new = moved(p, g, u, scale, h, recipe)
    work.store_factors(factors)
    if isinstance(recipe.form, Nearest):
        store(work.p, new)
    else:
        weights.store(new, work.weight_noise(0, new))
    for name, value in changed.items():
        if name in coded:
            coded[name].store(0, value)
        else:
            store(work.state[name], value)


def scratch_bytes(recipe: Recipe) -> int:
    """An upper bound of the temporaries of one step: copies of p and g, and those of the expressions of a method."""
    numel = math.prod(recipe.view)
    temporaries = 8 * compute_dtype(recipe.dtype).itemsize + composed_bytes(recipe)
    factors = recipe.method.scratch_bytes(recipe.view, recipe.options) + coded_factor_bytes(recipe)
    return temporaries * numel + factors
