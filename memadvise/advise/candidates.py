"""What may be done to a parameter, how sure we are of it, and which parameters are one decision.

Tier 1 keeps the first moment as AdamW has it (in fewer bits at most) and shrinks or approximates the second. Tier 2
drops the momentum, signs it or projects it. A score of one tier says nothing about the other: on 77 swaps in a small
GPT the update error had a rank correlation of 0.7 with the harm in tier 1 and a negative one across both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache

from memadvise.advise.rules import (
    CODECS_8BIT,
    TOKEN_ROLES,
    broken_rules,
    codecs_of,
    is_vector,
    token_axis,
)
from memadvise.advise.rules import DENSE as DENSE  # of the public names here
from memadvise.ledger import Parameter
from memadvise.names import shared_patterns
from memadvise.optim.registry import problems_of
from memadvise.plan.schema import Setting

HEAD_ROLES = frozenset({"attention_query", "attention_key"})
FAN_OUT_ROLES = frozenset({"attention_value", "attention_output", "mlp_up", "mlp_gate", "mlp_down"})
TIER_ONE_METHODS = frozenset({"adamw", "slimadam", "adam_mini", "adapprox", "came"})
_FIRST_MOMENT = ("int8", "int4")  # what the first moment beside a reduced second one may be held in
_LOW_RANK = {"rank": 4, "adam": True, "refresh_every": 4, "warm_start": True}


class Confidence(IntEnum):
    """How sure it is that a plan trains like AdamW; lower is surer."""

    HIGH = 0
    FAIRLY_HIGH = 1
    MEDIUM = 2
    LOW = 3

    @property
    def words(self) -> str:
        return self.name.lower().replace("_", " ")

    @property
    def lowered(self) -> Confidence:
        return Confidence(min(self + 1, Confidence.LOW))


CONFIDENCE_MEANS = {
    Confidence.HIGH: "full or 8-bit moments only: no loss was ever measured",
    Confidence.FAIRLY_HIGH: "4-bit moments, factored second moments or one value a row, with momentum: losses stayed "
    "near the seed noise where they were measured",
    Confidence.MEDIUM: "coarser second moments, or reduced ones beside 4-bit state, with momentum: the ranking is "
    "measured, the size of the loss is not",
    Confidence.LOW: "tensors without (or with signed) momentum: how they act together is not predictable, verify it",
}


@dataclass(frozen=True)
class Group:
    """Parameters of equal role, shape and structure: one decision; ``patterns`` stand for their names."""

    role: str
    shape: tuple[int, ...]
    members: tuple[Parameter, ...]
    patterns: tuple[str, ...]
    settings: tuple[Setting, ...]

    @property
    def label(self) -> str:
        return ", ".join(self.patterns)


# ---------------------------------------------------------------- what a setting is


def tier(setting: Setting) -> int:
    """1: the momentum is AdamW's, perhaps in fewer bits; 2: dropped, signed or projected."""
    keeps = setting.method in TIER_ONE_METHODS and setting.options.get("momentum", True)
    factored = setting.method == "adafactor" and setting.options.get("momentum", 0) > 0
    stored = setting.method == "rmsprop" and setting.options.get("momentum", 0) > 0
    return 1 if keeps or factored or stored else 2


def kind(parameter: Parameter, setting: Setting) -> str:
    """What a setting does, in words that fit a tensor of any shape and layout: ``mean(fan_in), m int8``."""
    codecs = "".join(f", {name} {codec}" for name, codec in _short_codecs(setting))
    return f"{base_kind(parameter, setting)}{codecs}"


def _short_codecs(setting: Setting) -> list[tuple[str, str]]:
    return [("m" if moment == "first_moment" else "v", codec) for moment, codec in codecs_of(setting).items()]


def base_kind(parameter: Parameter, setting: Setting) -> str:
    """:func:`kind` without the codecs."""
    if setting.method == "slimadam":
        axes = tuple(sorted(setting.options.get("axes", (1,))))
        if axes == tuple(range(len(parameter.shape))):
            return "mean(all)"
        if axes == _row_axes(parameter):
            return "mean(fan_in)"
        named = {parameter.fan_out: "mean(fan_out)", parameter.fan_in[1:]: "mean(kernel)"}
        return named.get(axes, f"mean{axes}")
    if setting.method == "adam_mini":
        return f"mean({setting.options.get('partition', 'row')}s)"
    if setting.method == "adafactor":
        return "factored" if tier(setting) == 1 else "factored, no momentum"
    return "low-rank" if setting.method == "adapprox" else setting.method


def _row_axes(parameter: Parameter) -> tuple[int, ...]:
    """What is averaged for one value an output row: a token of a table, a row of the last axis if nothing is known."""
    every = range(len(parameter.shape))
    if parameter.role in TOKEN_ROLES:
        return tuple(a for a in every if a != token_axis(parameter))
    if not parameter.fan_in or not parameter.fan_out:
        return (len(parameter.shape) - 1,)
    return parameter.fan_in


def confidence(parameter: Parameter, setting: Setting) -> Confidence:
    """How sure one setting of one tensor is, where its effect was measured; a broken hard rule makes it low."""
    if tier(setting) == 2 or any(rule.name != "no-op" for rule in broken_rules(parameter, setting)):
        return Confidence.LOW
    base, eight_bits = base_kind(parameter, setting), set(codecs_of(setting).values()) <= CODECS_8BIT
    if base == "adamw":
        return Confidence.HIGH if eight_bits else Confidence.FAIRLY_HIGH
    if not eight_bits:
        return Confidence.MEDIUM
    return Confidence.FAIRLY_HIGH if base in ("factored", "mean(fan_in)", "mean(kernel)") else Confidence.MEDIUM


def parts_of(setting: Setting) -> tuple[Setting, Setting] | None:
    """A reduced second moment beside a first moment in fewer bits, as the two things done; None for anything else.

    The errors of the two are independent, so in a quadratic metric they add up.
    """
    codec = setting.options.get("first_moment", "full")
    rest = {name: value for name, value in setting.options.items() if name != "first_moment"}
    if codec == "full" or setting.method == DENSE.method:
        return None
    return Setting(setting.method, rest), Setting(DENSE.method, {"first_moment": codec})


# ---------------------------------------------------------------- candidates


def candidate_settings(parameter: Parameter, allowed: Collection[str] = ()) -> tuple[Setting, ...]:
    """Every setting the advisor may choose for one parameter; the first is dense AdamW.

    Args:
        parameter: its role, axes and heads decide.
        allowed: names of hard rules that the user set aside.
    """
    unnamed = replace(parameter, name="", module="", aliases=())
    return _candidates(unnamed, frozenset(allowed))


def probe_settings(parameter: Parameter) -> tuple[Setting, ...]:
    """The candidates worth measuring: without combinations whose two parts are measured (:func:`parts_of`)."""
    settings = candidate_settings(parameter)
    known = {s.key for s in settings}
    return tuple(s for s in settings if (parts := parts_of(s)) is None or not {p.key for p in parts} <= known)


@lru_cache(maxsize=4096)
def _candidates(parameter: Parameter, allowed: frozenset[str]) -> tuple[Setting, ...]:
    raw = {s.key: s for s in (DENSE, *_coded(), *_second_moments(parameter), *_tier_two(parameter))}
    return tuple(
        s
        for s in raw.values()
        if not problems_of(s, parameter.shape, name="") and not broken_rules(parameter, s, allowed)
    )


def _coded() -> list[Setting]:
    """AdamW with moments in fewer bits: both, or the first alone (the second part of :func:`parts_of`)."""
    both = [{"first_moment": codec, "second_moment": codec} for codec in ("int8", "dynamic8", "int4")]
    single = [{"first_moment": "int8"}, {"first_moment": "int4"}, {"second_moment": "int8"}]
    return [Setting(DENSE.method, dict(options)) for options in (*both, *single)]


def _second_moments(parameter: Parameter) -> list[Setting]:
    """Means, blocks, factors and low rank, each beside a first moment in full and in fewer bits."""
    reduced = [Setting("slimadam", {"axes": list(axes)}) for axes in _axes_sets(parameter)]
    reduced += _head_settings(parameter)
    reduced += [Setting("adafactor", {"momentum": 0.9}), Setting("adapprox", dict(_LOW_RANK))]
    return [
        Setting(s.method, {**s.options, **({"first_moment": codec} if codec else {})})
        for s in reduced
        for codec in (None, *_FIRST_MOMENT)
    ]


def _axes_sets(parameter: Parameter) -> list[tuple[int, ...]]:
    every = tuple(range(len(parameter.shape)))
    if not every:
        return []
    if parameter.role in TOKEN_ROLES:
        return list(dict.fromkeys([_row_axes(parameter), (token_axis(parameter),), every]))
    if not parameter.fan_in or not parameter.fan_out:
        return [_row_axes(parameter)]
    axes_sets = [parameter.fan_in, parameter.fan_out, every]
    if len(parameter.fan_in) > 1:  # convolution: one value per kernel is finer than one per output channel
        axes_sets.append(parameter.fan_in[1:])
    return list(dict.fromkeys(axes_sets))


def _head_settings(parameter: Parameter) -> list[Setting]:
    """Adam-mini per attention head, for what produces queries and keys (2406.16793, Algorithm 3)."""
    axis = {"axis": parameter.fan_out[0]} if parameter.fan_out and parameter.fan_out[0] != 0 else {}
    heads = parameter.heads
    if parameter.role in HEAD_ROLES and heads and parameter.shape[parameter.fan_out[0]] % heads == 0:
        return [Setting("adam_mini", {"partition": "head", "heads": heads, **axis})]
    if parameter.role == "attention_qkv" and parameter.segments and all(s.heads for s in parameter.segments):
        # Queries and keys by head, values by output row (heads 0).
        segments = [[s.start, s.stop, 0 if s.role == "attention_value" else s.heads] for s in parameter.segments]
        return [Setting("adam_mini", {"partition": "head", "segments": segments, **axis})]
    return []


def _tier_two(parameter: Parameter) -> list[Setting]:
    """One setting a method. APOLLO's rank is that at which it holds less than 4-bit state; its scale keeps the size
    of the paper's update, which has a rank of a quarter of the smaller side.
    """
    if is_vector(parameter):
        return []
    view = parameter.shape if len(parameter.shape) <= 3 else (parameter.shape[0], parameter.numel // parameter.shape[0])
    smaller = min(view[-2:])
    rank = min(max(8, smaller // 32), smaller)
    apollo = {"rank": rank, "scale": max(1.0, smaller / (4 * rank))}
    plain = ("apollo_mini", "adafactor", "lion", "micro_adam", "galore")
    return [Setting("apollo", apollo), *(Setting(name) for name in plain)]


# ---------------------------------------------------------------- groups


def make_groups(
    parameters: Iterable[Parameter],
    settings_of: Callable[[Parameter], tuple[Setting, ...]] = candidate_settings,
) -> tuple[Group, ...]:
    """Pool trainable parameters that are to be decided together, in order of first appearance."""
    pools: dict[tuple[object, ...], list[Parameter]] = {}
    for parameter in parameters:
        if parameter.trainable:
            settings = tuple(s.key for s in settings_of(parameter))
            pools.setdefault((parameter.role, parameter.shape, parameter.dtype, settings), []).append(parameter)
    return tuple(
        Group(
            role=members[0].role,
            shape=members[0].shape,
            members=tuple(members),
            patterns=tuple(shared_patterns(m.name for m in members)),
            settings=settings_of(members[0]),
        )
        for members in pools.values()
    )


def static_prior(parameter: Parameter) -> Setting:
    """The mean the papers recommend for a role, for parameters that could not be measured.

    SlimAdam's rule table (2503.01843) where it has the role, one value an output row (Adam-mini, 2406.16793) elsewhere.
    """
    known = {s.key: s for s in candidate_settings(parameter)}
    axes = parameter.fan_out if parameter.role in FAN_OUT_ROLES and parameter.fan_out else _row_axes(parameter)
    return known.get(Setting("slimadam", {"axes": list(axes)}).key, DENSE)
