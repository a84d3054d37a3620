"""State whose parameters were in other groups, as after a change of a plan's learning-rate factors: put by name.

A group keeps what its parameters had (learning rate, betas, decay, what schedulers wrote): the learning rates are those
for a factor of 1, times the group's own ``lr_factor``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from memadvise.errors import OptimizerError
from memadvise.names import canonical_name

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # what optimizers and schedulers of torch write
_OWN = ("params", "param_names", "lr_factor")


def differs(state_dict: dict[str, Any], names: Sequence[Sequence[str]]) -> bool:
    """Whether the state is of the parameters ``names`` (group by group), and in other groups or another order."""
    saved = _names(state_dict)
    if saved is None or saved == [list(group) for group in names]:
        return False
    return sorted(name for group in saved for name in group) == sorted(name for group in names for name in group)


def regrouped(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], names: Sequence[Sequence[str]]) -> Any:
    """``state_dict`` as one of ``groups``, whose parameters are called ``names``; for one that :func:`differs`.

    Raises:
        OptimizerError: parameters of one group had something else than each other, such as their weight decay.
    """
    of: dict[str, tuple[dict[str, Any], Any]] = {}
    for saved, members in zip(state_dict["param_groups"], _names(state_dict) or (), strict=True):
        of.update({name: (saved, index) for name, index in zip(members, saved["params"], strict=True)})
    made: list[dict[str, Any]] = []
    numbers: dict[Any, int] = {}  # as saved -> as it is now
    for group, own_names in zip(groups, names, strict=True):
        first = len(numbers)
        numbers.update({of[name][1]: first + place for place, name in enumerate(own_names)})
        entry = _entries(own_names, of)
        factor = group.get("lr_factor", 1)
        entry.update({key: entry[key] * factor for key in _RATES if key in entry and factor != 1})
        own = {"lr_factor": factor} if "lr_factor" in group else {}
        own["params"] = list(range(first, len(numbers)))
        if "param_names" in group:
            own["param_names"] = list(group["param_names"])
        made.append({**entry, **own})
    state = {numbers[index]: value for index, value in state_dict["state"].items() if index in numbers}
    rest: dict[str, Any] = {}
    if "memadvise" in state_dict:
        ours = state_dict["memadvise"]
        rest["memadvise"] = {**ours, "settings": {numbers[i]: key for i, key in ours["settings"].items()}}
    return {**state_dict, "state": state, "param_groups": made, **rest}


def _names(state_dict: dict[str, Any]) -> list[list[str]] | None:
    """The canonical names, group by group; None where they were not saved."""
    groups = state_dict["param_groups"]
    if any(len(group.get("param_names") or ()) != len(group["params"]) for group in groups):
        return None
    return [[canonical_name(name) for name in group["param_names"]] for group in groups]


def _entries(members: Sequence[str], of: dict[str, tuple[dict[str, Any], Any]]) -> dict[str, Any]:
    """What the groups of ``members`` have in common, rates for a factor of 1."""
    found: dict[str, Any] = {}
    for name in members:
        saved, factor = of[name][0], of[name][0].get("lr_factor", 1)
        entry = {key: value for key, value in saved.items() if key not in _OWN}
        entry.update({key: entry[key] / factor for key in _RATES if key in entry and factor != 1})
        found = found or entry
        for key in entry.keys() | found.keys():
            if not _equal(entry.get(key), found.get(key)):
                raise OptimizerError(
                    f"{name} and {members[0]}, which are one group now, had different {key}: "
                    f"{entry.get(key)!r} and {found.get(key)!r}",
                    hint="pass param_groups as they were in the run of this checkpoint",
                )
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and math.isclose(one.item(), other.item())
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other)
    return bool(one == other)
