"""State of one setting made into that of another, where a plan changes in mid-run and the state has an answer.

::

    optimizer = create_optimizer(model, "smaller.yaml", lr=1e-3)
    optimizer.load_state_dict(torch.load("adamw.pt")["optimizer"], convert=True)

What can be converted, parameter by parameter, and what it is worth:

* **adamw to slimadam or adam_mini** (also from torch.optim.AdamW): v is averaged over the new blocks. Exact: a mean of
  averages is the average of the means, this is the v that the new method would have from the same gradients.
* **a moment from float32 to a codec** (int8, int4, bf16, ...): rounded once, to the nearest code.
* **a moment from a codec to float32, or to another codec**: decoded; what the codec lost is not found again.
* **slimadam or adam_mini to adamw**: every element of a block gets the block's v. That is not the v which AdamW would
  have had: it begins as if all gradients of a block had been alike, and forgets that at the rate of beta2.
* **slimadam and adam_mini to each other** where their blocks are the same: nothing changes.
* **what leaves the state as it is**: caution, rounding, nearest or stochastic weights; of a method, the options in
  :data:`FREE` (how an update is sized or clipped, averaging rates); the seed where only rounding draws numbers.

The first moment stays what it was, but for its codec. Everything else is refused with the parameter's name: means over
other blocks cannot be had from means, momentum of SGD or Lion is another quantity than Adam's, projected and factored
moments cannot be unfolded, other seeds or kinds of projection mean other projections. It has to be asked for, since
training then goes on with other numbers than it would have had; and nothing is loaded unless all of it can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from memadvise.errors import OptimizerError
from memadvise.optim import engine
from memadvise.optim.engine import Resolved
from memadvise.optim.method import Tensors
from memadvise.optim.methods.adam_mini import AdamMini
from memadvise.optim.methods.adamw import AdamW
from memadvise.optim.methods.blockmean import Blocks
from memadvise.optim.methods.slimadam import SlimAdam
from memadvise.optim.recipe import CORRECTION, Recipe
from memadvise.plan.schema import Setting

_ADAMS = (AdamW, SlimAdam, AdamMini)
_SECOND = "exp_avg_sq"
POSSIBLE = "only adamw, slimadam and adam_mini convert to each other, and moments to and from fewer bits"

# Options that say how state is used or how fast it is averaged, not what it means: where the specs are equal too, the
# state is the same. What is not listed is refused: the default is safe for a method that comes later.
FREE: Mapping[str, frozenset[str]] = {
    "adafactor": frozenset({"step_size", "momentum", "clip", "beta2_decay", "eps1", "eps2"}),
    "came": frozenset({"beta3", "correct_instability", "clip", "eps1", "eps2"}),
    "micro_adam": frozenset({"alpha", "bias_correction"}),
    "adapprox": frozenset({
        "clip", "guidance", "guidance_max", "error_threshold", "adapt_every", "increment", "power_iterations",
        "oversampling",
    }),
    "apollo": frozenset({"scale", "limiter", "limiter_floor"}),
    "apollo_mini": frozenset({"scale", "limiter", "limiter_floor"}),
    "galore": frozenset({"scale"}),
}  # fmt: skip
# Their state does not depend on the seed: random numbers only round.
SEEDLESS = frozenset({"adamw", "slimadam", "adam_mini", "lion", "sgd", "adafactor", "came", "micro_adam"})


@dataclass(frozen=True)
class Conversion:
    """The way from the state of ``old`` to that of ``new``; ``summary`` says what happens to it."""

    old: Resolved
    new: Resolved
    summary: str

    def run(self, state: Mapping[str, Any]) -> Tensors:
        """The new state, in new tensors where it differs. ``state`` is checked to be that of ``old``."""
        old, new = self.old.recipe, self.new.recipe
        logical = {name: _decoded(old, name, state) for name in old.logical}
        if _SECOND in logical and type(old.method) in _ADAMS:
            logical[_SECOND] = _second(logical[_SECOND], old, new)
        stored: Tensors = {}
        for name, spec in new.logical.items():
            stored.update(_encoded(new, name, logical[name].to(spec.dtype)))
        for name, spec in new.specs.items():
            if name.startswith(CORRECTION):
                stored[name] = state[name]
            elif name not in stored:  # a step, that only random numbers want: they may begin anywhere
                stored[name] = torch.as_tensor(state.get(name, 0.0), dtype=spec.dtype)
        return stored


def find(key: str, new: Resolved, p: Tensor) -> Conversion | str:
    """How state that was made under the setting ``key`` becomes state for ``new``, or why it does not."""
    try:
        old = engine.resolve(new.name, p, setting_of(key))
    except OptimizerError as error:
        return f"{key} does not fit it ({error.message.removeprefix(f'{new.name}: ')})"
    if engine.choose_executor(new, p, None) == "eager":  # a wrapper of other tensors
        return f"it is a {type(p).__name__}: convert the state before the parameters are sharded"
    reason = _refused(old.recipe, new.recipe)
    return reason or Conversion(old, new, _summary(old.recipe, new.recipe))


def _refused(old: Recipe, new: Recipe) -> str | None:
    seedless = {old.method.name, new.method.name} <= SEEDLESS
    if old.compose.seed != new.compose.seed and not seedless:
        return f"its random numbers had seed {old.compose.seed}, and would have seed {new.compose.seed}"
    for names, specs in ((old, new), (new, old)):
        if any(name.startswith(CORRECTION) and specs.specs.get(name) != spec for name, spec in names.specs.items()):
            return f"weights: {old.compose.weights} and weights: {new.compose.weights} keep other corrections"
    if type(old.method) is type(new.method):
        differing = {
            f.name for f in fields(old.options) if getattr(old.options, f.name) != getattr(new.options, f.name)
        }
        if differing <= FREE.get(old.method.name, frozenset()):
            return None if old.logical == new.logical else "its state has another form"
    if type(old.method) not in _ADAMS or type(new.method) not in _ADAMS:
        same = old.method.name == new.method.name
        return f"the options of {old.method.name} say what its state means" if same else "they keep other quantities"
    if getattr(old.options, "compat", None) != getattr(new.options, "compat", None):
        return "only one of them follows the official code"
    before, after = _blocks(old), _blocks(new)
    if before is not None and after is not None and before != after:
        return "means over other blocks cannot be had from its means"
    return None


def _summary(old: Recipe, new: Recipe) -> str:
    changes = []
    before, after = _blocks(old), _blocks(new)
    if before != after and type(new.method) in _ADAMS:
        mean = "its second moment is averaged over blocks, exactly"
        changes.append(mean if before is None else "each element gets the second moment of its block")
    for name in new.logical:
        codec = new.coded[name].codec.name if name in new.coded else None
        if codec != (old.coded[name].codec.name if name in old.coded else None):
            changes.append(f"{name} is held in {codec}" if codec else f"{name} is held in full")
    return " and ".join(changes) or "its state stays as it is"


def _blocks(recipe: Recipe) -> Blocks | None:
    """The blocks that share a second moment; None where every element has its own."""
    method = recipe.method
    return method.partition(recipe.view, recipe.options) if isinstance(method, SlimAdam | AdamMini) else None


def _second(v: Tensor, old: Recipe, new: Recipe) -> Tensor:
    before, after, shape = _blocks(old), _blocks(new), new.view
    if before == after:
        return v
    if after is not None:
        v = v.to(torch.float64)
        return after.pool(v.sum(after.axes, keepdim=True) if after.axes else v, shape)
    assert before is not None
    return before.expand(v).expand(shape)


def _decoded(recipe: Recipe, name: str, state: Mapping[str, Any]) -> Tensor:
    """The logical state ``name``, a number as a tensor."""
    coded = recipe.coded.get(name)
    if coded is None:
        return torch.as_tensor(state[name]).detach()
    stored = {suffix: state[held].detach() for suffix, held in coded.names.items()}
    return coded.codec.decode(stored, coded.rows.length, signed=coded.signed).view(recipe.logical[name].shape)


def _encoded(recipe: Recipe, name: str, value: Tensor) -> Tensors:
    coded = recipe.coded.get(name)
    if coded is None:
        return {name: value}
    values = value.reshape(coded.rows.count, coded.rows.length).to(torch.float32)
    codes = coded.codec.encode(values, None, signed=coded.signed)
    return {coded.names[suffix]: code for suffix, code in codes.items()}


def stored(resolved: Resolved, logical: Mapping[str, Tensor]) -> Tensors:
    """Logical state as it is stored: encoded where a codec holds it. New tensors."""
    found: Tensors = {}
    for name, value in logical.items():
        found.update(_encoded(resolved.recipe, name, value.clone()))
    return found


# ---------------------------------------------------------------- settings as a state dict names them


def setting_of(key: str) -> Setting:
    """The setting that :attr:`Setting.key` has written: ``slimadam(axes=[1])``."""
    method, bracket, rest = key.partition("(")
    if not bracket:
        return Setting(key)
    pairs = (item.partition("=") for item in _split(rest.removesuffix(")")))
    return Setting(method, {name: _value(text) for name, _, text in pairs})


def _split(text: str) -> list[str]:
    """At the commas that no bracket holds."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    return [item.strip() for item in items if item.strip()]


def _value(text: str) -> Any:
    if text.startswith("["):
        return [_value(item) for item in _split(text[1:-1])]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False, "None": None}.get(text, text)
