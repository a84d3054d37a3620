"""In-place forms of some methods' ``stats``, ``update`` and move with nothing composed, for one box in cache.

Each must agree with the pure functions it stands for; a test compares them for every method. A method without a row
here runs its pure functions on boxes, which costs a few more passes over the cache and box-sized temporaries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memadvise.optim.method import Context, Hyper, Method, Part, Tensors, Visit
from memadvise.optim.methods.blockmean import BlockMeanAdam
from memadvise.optim.methods.projected import Projected

Apply = Callable[[Tensor, Tensor, Tensors, Tensors, Hyper, Any, Tensor], None]


def _decay(p: Tensor, h: Hyper) -> None:
    if h.weight_decay:
        p.mul_(h.decay)


def _adamw(p: Tensor, g: Tensor, state: Tensors, small: Tensors, h: Hyper, options: Any, temp: Tensor) -> None:
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m.lerp_(g, 1 - h.beta1)
    v.mul_(h.beta2).addcmul_(g, g, value=1 - h.beta2)
    torch.sqrt(v, out=temp).div_(small["bias2_sqrt"]).add_(h.eps)
    torch.div(m, temp, out=temp).mul_(small["step_size"])
    _decay(p, h)
    p.sub_(temp)


def _block_mean(p: Tensor, g: Tensor, state: Tensors, small: Tensors, h: Hyper, options: Any, temp: Tensor) -> None:
    m = state["exp_avg"].lerp_(g, 1 - h.beta1)
    _decay(p, h)
    p.addcmul_(m, small["scale"], value=-1)


def _lion(p: Tensor, g: Tensor, state: Tensors, small: Tensors, h: Hyper, options: Any, temp: Tensor) -> None:
    m = state["exp_avg"]
    torch.lerp(m, g, 1 - h.beta1, out=temp).sign_().mul_(h.lr)
    _decay(p, h)
    p.sub_(temp)
    m.lerp_(g, 1 - h.beta2)


def _sgd(p: Tensor, g: Tensor, state: Tensors, small: Tensors, h: Hyper, options: Any, temp: Tensor) -> None:
    update = state["momentum_buffer"].mul_(options.momentum).add_(g) if options.momentum else g
    _decay(p, h)
    torch.mul(update, h.lr, out=temp)
    p.sub_(temp)


def _apollo(p: Tensor, g: Tensor, state: Tensors, small: Tensors, h: Hyper, options: Any, temp: Tensor) -> None:
    if "scale" not in small:  # nothing to project
        return _adamw(p, g, state, small, h, options, temp)
    _decay(p, h)
    p.addcmul_(g, small["scale"], value=-1)


def _galore(p: Tensor, g: Tensor, state: Tensors, small: Tensors, h: Hyper, options: Any, temp: Tensor) -> None:
    if "left" not in small:
        return _adamw(p, g, state, small, h, options, temp)
    _decay(p, h)
    p.sub_(torch.matmul(small["left"], small["right"].mT, out=temp))


APPLY: dict[str, Apply] = {
    "adamw": _adamw,
    "slimadam": _block_mean,
    "adam_mini": _block_mean,
    "lion": _lion,
    "sgd": _sgd,
    "apollo": _apollo,
    "apollo_mini": _apollo,
    "galore": _galore,
}


def prepare(method: Method) -> Callable[[Visit, Tensors, Context], tuple[Tensors, Tensors]]:
    """``method.prepare``, or a form of it that changes state in place."""
    return method.prepare_in_place if isinstance(method, Projected) else method.prepare


def stats(method: Method, part: Part, ctx: Context, round_: Any, temp: Tensor) -> Tensors:
    """``method.stats`` with its box-sized temporary in ``temp``."""
    if isinstance(method, BlockMeanAdam):
        return {"sum_squares": method.partition(tuple(part.g.shape), ctx.options).sum_squares(part.g, out=temp)}
    return method.stats(part, ctx, round_)
