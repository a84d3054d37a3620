"""Weights in one byte: groups of integers with a scale and a zero point (the weights of Q-APOLLO, arXiv 2412.05270).

::

    w = (code - zero) * scale       code and zero: uint8, scale: bfloat16; one scale and zero a group

A group is 128 neighbours of a row (of the trailing axes that hold a group: a convolution's ``[in, kh, kw]``); the last
group of a row may be shorter, and a tensor of very short rows is one row. Bytes: 1 + 3 / 128 = 1.023 a weight.

:func:`quantize_weights` replaces parameters of a model by :class:`Int8Weight`, a tensor that says it is float32 (or
whatever it was), behaves so in the forward and backward pass, and gets an ordinary gradient. An operation makes the
floats it needs and drops them; autograd keeps the bytes. Every optimizer of memadvise steps such parameters: box by
box, in float32, rounded back at random (``weights: int8``, which is implied). Only boxes of rows that are no multiple
of a group, seen as one flat vector (MicroAdam), cannot be kept small.

State dicts hold Int8Weights; ``torch.load(weights_only=True)`` reads them once this module is imported. To resume, make
the weights int8 first (here, or by ``create_optimizer``) and then load: bytes go into bytes as they are. Floats load
too, rounded to the nearest, and into a model of floats go the floats that the bytes stand for.

Deviations from the official code, and why:

* The range of a group is extended to include 0. There, a group that does not straddle 0 is destroyed: its zero point is
  clamped, and weights from 1.0 to 1.1 come back as 0.1.
* The range is 254 steps, not 255, and the scale is rounded up to bfloat16: so no code is ever clamped, and random
  rounding is right on average for a group's largest weights too.
* The zero point is a byte (there: bfloat16, 1 + 4 / 128 bytes); it is an integer from 0 to 255 anyway.
* A scale is kept while the new weights need 240 to 255 of its steps. A new one moves every weight of the group off its
  grid, and rounding them all at random is noise that no gradient asked for; with lr = 0 nothing moves at all.

A weight that is NaN or infinite makes its whole group so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memadvise.errors import OptimizerError
from memadvise.names import canonical_name, matches
from memadvise.optim.int8_tensor import DTYPES, GROUP, Int8Weight

__all__ = ["Int8Weight", "dequantize_weights", "holdable", "quantize_weights"]

_Slots = list[tuple[nn.Module, str]]


def quantize_weights(model: nn.Module, match: str | Collection[str] = "**", *, group: int = GROUP) -> list[str]:
    """Hold matching matrices of ``model`` in int8; call it before an optimizer, hooks or a wrapper take parameters.

    Args:
        model: its parameters are replaced in place, one after the other; tied ones stay tied, frozen ones frozen.
        match: a glob on canonical names, or several globs or names. Vectors, scalars and integers are left alone.
        group: elements that share a scale.

    Returns:
        the (first) names of the parameters that were replaced; those in int8 already are not among them.

    Raises:
        OptimizerError: a pattern that matches nothing which can be held so, or a parameter that has hooks already.
    """
    turned = _chosen(model, [match] if isinstance(match, str) else list(match))
    for _, slots in turned:  # no other reference to them here: the floats go as soon as the bytes are there
        _turn(slots, lambda p: Int8Weight.from_float(p, group))
    return [name for name, _ in turned]


def dequantize_weights(model: nn.Module) -> list[str]:
    """Make the int8 parameters of ``model`` ordinary ones again, in place; their names."""
    turned = [(names[0], slots) for p, (names, slots) in _places(model).items() if isinstance(p, Int8Weight)]
    for _, slots in turned:
        _turn(slots, lambda p: p.dequantize())
    return [name for name, _ in turned]


def _chosen(model: nn.Module, patterns: list[str]) -> list[tuple[str, _Slots]]:
    """The first names and the places of the parameters to be held in int8."""
    places = _places(model)
    chosen: set[Tensor] = set()
    for pattern in patterns:
        found = [p for p, (names, _) in places.items() if any(pattern == n or matches(pattern, n) for n in names)]
        fit = [p for p in found if isinstance(p, Int8Weight) or holdable(p)]
        if not fit and pattern != "**":
            what = "no matrix of floats" if found else "no parameter"
            raise OptimizerError(f"quantize_weights: '{pattern}' matches {what} of the model")
        chosen.update(p for p in fit if not isinstance(p, Int8Weight))
    turned = []
    for p, (names, slots) in places.items():
        if p not in chosen:
            continue
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise OptimizerError(f"{names[0]} has hooks, which int8 weights would lose", hint="add hooks afterwards")
        turned.append((names[0], slots))
    return turned


def _places(model: nn.Module) -> dict[Tensor, tuple[list[str], _Slots]]:
    """Parameter -> its names, and the modules and attributes that hold it."""
    places: dict[Tensor, tuple[list[str], _Slots]] = {}
    for path, module in model.named_modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                names, slots = places.setdefault(p, ([], []))
                names.append(canonical_name(f"{path}.{attribute}" if path else attribute))
                slots.append((module, attribute))
    return places


def holdable(p: Tensor) -> bool:
    """Whether ``p`` can become an :class:`Int8Weight`: a matrix (or more axes) of ordinary floats, not empty."""
    wrapped: bool = is_traceable_wrapper_subclass(p)
    return not nn.parameter.is_lazy(p) and not wrapped and p.ndim >= 2 and p.dtype in DTYPES and p.numel() > 0


def _turn(slots: _Slots, change: Callable[[Tensor], Tensor]) -> None:
    """Put the changed parameter where the old one was."""
    module, attribute = slots[0]
    old = getattr(module, attribute)
    new = nn.Parameter(change(old.detach()), old.requires_grad)
    for module, attribute in slots:
        setattr(module, attribute, new)  # not in _parameters directly: recurrent layers keep a list of their own
