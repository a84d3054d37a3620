"""Hard rules: what is never chosen for a tensor, whatever a score says, each with its evidence.

Scores do not see these harms (an output head under APOLLO looked better than AdamW for 60 steps and ended worse), so
they are rules. Each can be set aside by hand, for one pattern (``--pin``) or as a whole (``--allow RULE``); the plan
and the report then say so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from memadvise.errors import UsageError
from memadvise.ledger import Parameter
from memadvise.optim.registry import method_info, state_bytes, weight_bytes
from memadvise.plan.schema import Setting

DENSE = Setting("adamw")
TINY_NUMEL = 4096  # below this many elements, state is kept dense (the cut-off of bitsandbytes and torchao, too)
TOKEN_ROLES = frozenset({"token_embedding", "position_embedding", "tied_embedding", "head"})
CODECS_8BIT = frozenset({"int8", "dynamic8", "bf16"})  # what loses less than can be measured
MOMENTS = ("first_moment", "second_moment")


@dataclass(frozen=True)
class HardRule:
    """One prohibition: ``forbids`` says whether it covers a setting of a parameter."""

    name: str
    text: str
    evidence: str
    forbids: Callable[[Parameter, Setting], bool]


def codecs_of(setting: Setting) -> dict[str, str]:
    """``first_moment`` and ``second_moment`` of a setting, where a codec holds them."""
    return {m: str(setting.options[m]) for m in MOMENTS if setting.options.get(m, "full") != "full"}


def is_vector(parameter: Parameter) -> bool:
    """At most one side is longer than 1: there are no rows and columns to speak of."""
    return sum(size > 1 for size in parameter.shape) < 2


def is_unknown(parameter: Parameter) -> bool:
    """A tensor whose use or whose axes' meaning nothing proves."""
    return parameter.role == "unknown" or not parameter.fan_in or not parameter.fan_out


def token_axis(parameter: Parameter) -> int:
    """The axis of a table or head that counts tokens (positions, classes)."""
    return parameter.fan_out[0] if parameter.fan_out else 0


def averaged_axes(parameter: Parameter, setting: Setting) -> tuple[int, ...]:
    """The axes along which ``setting`` keeps one second moment; blocks of several entries count as averaged."""
    options: dict[str, Any] = setting.options
    every = tuple(range(len(parameter.shape)))
    if setting.method == "slimadam":
        return tuple(options.get("axes", (1,)))
    if setting.method == "adam_mini":
        partition, axis = options.get("partition", "row"), options.get("axis", 0)
        if partition == "column":
            return (axis,)
        if partition == "row" and not any(segment[2] for segment in options.get("segments", ())):
            return tuple(a for a in every if a != axis)
        return every
    if options.get("store") == "mean":
        return tuple(options.get("axes", every))
    return ()


def _projects(parameter: Parameter, setting: Setting) -> bool:
    hidden_only = method_info(setting.method).method.hidden_only
    return hidden_only and (parameter.role in TOKEN_ROLES or is_vector(parameter))


def _averages_tokens(parameter: Parameter, setting: Setting) -> bool:
    return parameter.role in TOKEN_ROLES and token_axis(parameter) in averaged_axes(parameter, setting)


def _feeds_back(parameter: Parameter, setting: Setting) -> bool:
    return setting.method == "micro_adam" and parameter.role in TOKEN_ROLES


def _compresses_little(parameter: Parameter, setting: Setting) -> bool:
    compressed = setting.method != DENSE.method or bool(codecs_of(setting))
    return compressed and (is_vector(parameter) or parameter.numel < TINY_NUMEL)


def _does_nothing(parameter: Parameter, setting: Setting) -> bool:
    """As many bytes as dense AdamW or more; a setting of AdamW that is about something else is not meant."""
    if setting.method == DENSE.method and not codecs_of(setting):
        return False
    import torch

    shape, dtype = parameter.shape, getattr(torch, parameter.dtype)
    weights = weight_bytes(DENSE, shape, dtype) - weight_bytes(setting, shape, dtype)
    return state_bytes(DENSE, shape, dtype) - state_bytes(setting, shape, dtype) + weights <= 0


def _is_bold(parameter: Parameter, setting: Setting) -> bool:
    """For a tensor that is not known: anything but AdamW in 8 bits and means over the last axis."""
    if not is_unknown(parameter) or parameter.role in TOKEN_ROLES:
        return False
    if not set(codecs_of(setting).values()) <= CODECS_8BIT:
        return True
    last = (len(parameter.shape) - 1,)
    return setting.method != DENSE.method and averaged_axes(parameter, setting) != last


RULES = (
    HardRule(
        "projection",
        "no gradient projection (APOLLO, APOLLO-Mini, GaLore) on embeddings, output heads and 1-D tensors",
        "an output head under APOLLO cost 0.12 to 0.17 nats in 7 of 7 plans of a small GPT, all other 77 plans at most "
        "0.07; both papers leave these tensors to AdamW (arXiv 2412.05270, 2403.03507)",
        _projects,
    ),
    HardRule(
        "vocabulary-mean",
        "no mean over the vocabulary axis, and none over the whole tensor, on embeddings and output heads",
        "the mean over tokens of an output head cost 0.03 to 0.04 nats on both seeds of a small GPT, the most of all "
        "means; one value a token cost 0.003 to 0.009; SlimAdam and Adam-mini find the same (arXiv 2503.01843, "
        "2406.16793)",
        _averages_tokens,
    ),
    HardRule(
        "error-feedback",
        "no MicroAdam on embeddings and output heads",
        "rows of rare tokens get a gradient too seldom for its error feedback to drain",
        _feeds_back,
    ),
    HardRule(
        "tiny",
        "vectors, and tensors of fewer than 4096 elements, keep their state in full",
        "together they are well below 1 % of the state of the models measured, and a mean of few elements saves "
        "nothing; bitsandbytes and torchao have the same cut-off",
        _compresses_little,
    ),
    HardRule(
        "no-op",
        "no method that would save nothing",
        "its state for that shape is as large as AdamW's: factors of a matrix with a side of 1, GaLore of a rank near "
        "the smaller side",
        _does_nothing,
    ),
    HardRule(
        "unknown",
        "tensors of unknown use: 8-bit state and means over the last axis only",
        "what the axes mean is not known, so a mean may run over tokens, and a projection may meet a head; one value a "
        "row of the last axis is the finest mean there is",
        _is_bold,
    ),
)  # fmt: skip
BY_NAME = {rule.name: rule for rule in RULES}


def check_names(names: Iterable[str]) -> frozenset[str]:
    """Raises UsageError for a name that is no rule's."""
    for name in names:
        if name not in BY_NAME:
            raise UsageError(f"there is no hard rule '{name}'", hint=f"the rules: {', '.join(BY_NAME)}")
    return frozenset(names)


def broken_rules(parameter: Parameter, setting: Setting, allowed: Collection[str] = ()) -> tuple[HardRule, ...]:
    """The rules that forbid ``setting`` for ``parameter``, without the ``allowed`` ones; it must fit the shape."""
    return tuple(rule for rule in RULES if rule.name not in allowed and rule.forbids(parameter, setting))
