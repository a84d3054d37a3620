"""State for a shadow that starts in mid-training: AdamW's live moments, compressed once.

For means, codecs and heads that is what :mod:`memadvise.optim.convert` does with a checkpoint. Factored and low-rank
second moments are functions of a matrix of squares: one step of their own on ``sqrt(v)``, with beta2 = 0, leaves what
they hold of ``v``. Lion takes the first moment as it is. Other methods keep quantities that no moment of AdamW tells
(projections, windows of sparse gradients): they start empty, as they would if training changed to them here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memadvise.optim import convert, engine
from memadvise.optim.convert import Conversion
from memadvise.optim.method import Hyper, Tensors
from memadvise.plan.schema import Setting

_BY_ONE_STEP = frozenset({"adafactor", "adapprox"})
_ADAMW = Setting("adamw")


@torch.no_grad()
def warm_state(
    resolved: engine.Resolved, like: Tensor, moment: tuple[Tensor, Tensor, int], betas: tuple[float, float]
) -> Tensors | None:
    """What a setting would hold after AdamW's training so far; None where that cannot be had from AdamW's moments.

    Args:
        resolved: the setting on the watched part of a tensor.
        like: that part's shape, dtype and device.
        moment: exp_avg, exp_avg_sq and step, of that part.
        betas: with which AdamW averaged them.
    """
    m, v, step = moment
    way = convert.find(_ADAMW.key, resolved, like)
    if isinstance(way, Conversion):
        held = way.run({"step": torch.tensor(float(step)), "exp_avg": m, "exp_avg_sq": v})
        return {name: tensor.clone() for name, tensor in held.items()}
    method = resolved.recipe.method.name
    if method in _BY_ONE_STEP:
        return _by_one_step(resolved, like, moment, betas)
    if method == "lion":
        return convert.stored(resolved, {"exp_avg": m})
    return None


def _by_one_step(
    resolved: engine.Resolved, like: Tensor, moment: tuple[Tensor, Tensor, int], betas: tuple[float, float]
) -> Tensors:
    """Second moment from one step on ``sqrt(v)``; the first is AdamW's, or its update where updates are averaged."""
    m, v, step = moment
    options = resolved.recipe.options
    corrects_bias = getattr(options, "adam", False)
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    state = engine.new_state(resolved, like, "chunked")
    g = (v if corrects_bias else v_hat).sqrt()
    engine.run([(resolved, torch.zeros_like(like), g, state)], Hyper(1.0, 0.0, 0.0, 1e-30, 0.0), "chunked")
    if "step" in state:
        state["step"].fill_(step)
    if "exp_avg" in resolved.recipe.logical:
        first = m if corrects_bias else m_hat / v_hat.sqrt().clamp(min=1e-30)
        state.update(convert.stored(resolved, {"exp_avg": first}))
    return state
