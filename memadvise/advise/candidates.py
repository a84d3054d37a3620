"""What may be done to a parameter, and which parameters are one decision.

Hard rules first (their evidence: arXiv 2503.01843 and 2406.16793, and the SNR of shipped GPT-2 runs): no mean over the
token axis of an embedding or output head, no whole-tensor mean on them; vectors and tiny tensors stay dense, their
state is negligible; nothing that is another candidate under a second name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from memadvise.ledger import Parameter
from memadvise.names import shared_patterns
from memadvise.plan.schema import Setting

DENSE = Setting("adamw")
TINY_NUMEL = 4096  # below this many elements, state is kept dense (the cut-off of bitsandbytes and torchao, too)
TOKEN_ROLES = frozenset({"token_embedding", "position_embedding", "tied_embedding", "head"})
HEAD_ROLES = frozenset({"attention_query", "attention_key"})
FAN_OUT_ROLES = frozenset({"attention_value", "attention_output", "mlp_up", "mlp_gate", "mlp_down"})


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


def candidate_settings(parameter: Parameter) -> tuple[Setting, ...]:
    """Every setting the advisor may choose for one parameter; the first is dense AdamW.

    Lion and SGD are yardsticks of the probe: another algorithm with another learning rate, so they are never chosen
    unless the user pins them.
    """
    if len(parameter.shape) < 2 or parameter.numel < TINY_NUMEL:
        return (DENSE,)
    axes_sets: list[tuple[int, ...]]
    if parameter.role in TOKEN_ROLES:
        # One value per token (or position): the mean over everything but the token axis.
        token_axis = parameter.fan_out[0] if parameter.fan_out else 0
        axes_sets = [tuple(a for a in range(len(parameter.shape)) if a != token_axis)]
    elif not parameter.fan_in or not parameter.fan_out:
        # Not known what the axes mean (stacked experts, say): only the finest mean there is, over the last axis.
        axes_sets = [(len(parameter.shape) - 1,)]
    else:
        every = tuple(range(len(parameter.shape)))
        axes_sets = [parameter.fan_in, parameter.fan_out, every]
        if len(parameter.fan_in) > 1:  # convolution: one value per kernel is finer than one per output channel
            axes_sets.append(parameter.fan_in[1:])
    settings = [Setting("slimadam", {"axes": list(axes)}) for axes in dict.fromkeys(axes_sets)]
    return (DENSE, *settings, *_head_settings(parameter))


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
    """The setting the papers recommend for a role, for parameters that could not be measured.

    SlimAdam's rule table (2503.01843) where it has the role, one value an output row (Adam-mini, 2406.16793) elsewhere.
    """
    candidates = candidate_settings(parameter)
    if len(candidates) == 1:
        return DENSE
    if parameter.role in FAN_OUT_ROLES and parameter.fan_out:
        return Setting("slimadam", {"axes": list(parameter.fan_out)})
    return candidates[1]
