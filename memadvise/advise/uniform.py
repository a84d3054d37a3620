"""One method for the whole model: what the probe trains beside AdamW, and what a plan has to be better than."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from memadvise.advise.candidates import candidate_settings, static_prior
from memadvise.advise.rules import DENSE, TOKEN_ROLES
from memadvise.ledger import Parameter
from memadvise.names import glob_escape
from memadvise.optim.registry import fitted, list_methods, method_info, problems_of
from memadvise.plan.schema import Plan, Rule, Setting

# As somebody would use one method for a whole model.
WHOLE_MODEL: tuple[Setting, ...] = (
    Setting("adamw", {"first_moment": "int8", "second_moment": "int8"}),
    Setting("adamw", {"first_moment": "int4", "second_moment": "int4"}),
    Setting("slimadam", {"axes": [1]}),
    Setting("slimadam", {"axes": [0]}),
    Setting("slimadam", {"axes": [1], "first_moment": "int8"}),
    Setting("slimadam", {"axes": [1], "first_moment": "int4"}),
    Setting("adam_mini", {"partition": "row"}),
    Setting("adafactor", {"momentum": 0.9}),
    Setting("adafactor", {"momentum": 0.9, "first_moment": "int8"}),
    Setting("adafactor", {"momentum": 0.9, "first_moment": "int4"}),
    Setting("adafactor"),
    Setting("lion"),
    Setting("lion", {"first_moment": "int8"}),
    Setting("apollo", {"rank": 8}),
    Setting("apollo_mini"),
    Setting("galore", {"rank": 8}),
    Setting("micro_adam"),
)


def uniform(parameters: Iterable[Parameter], setting: Setting) -> dict[str, Setting]:
    """``setting`` for every trainable parameter that it fits; AdamW for the others, and for embeddings and heads where
    the method's papers leave them to it.
    """
    return {p.name: as_applied(p, setting) or DENSE for p in parameters if p.trainable}


def as_applied(parameter: Parameter, setting: Setting) -> Setting | None:
    """``setting`` as it is applied to one parameter; None where it is not."""
    chosen = fitted(setting, parameter.shape)
    left_out = method_info(setting.method).method.hidden_only and parameter.role in TOKEN_ROLES
    return None if left_out or problems_of(chosen, parameter.shape, name="") else chosen


def probe_methods(parameters: tuple[Parameter, ...], names: tuple[str, ...] | None = None) -> dict[str, Plan]:
    """AdamW and the methods called ``names`` once, applied to the whole model as their papers would apply them.

    None: every bundled method but those whose step takes tens of times AdamW's.
    """
    trainable = [p for p in parameters if p.trainable]

    def plan(choose: Callable[[Parameter], Setting]) -> Plan:
        chosen = [(glob_escape(p.name), choose(p)) for p in trainable]
        return Plan(rules=tuple(Rule(name, setting.method, dict(setting.options)) for name, setting in chosen))

    def adam_mini(parameter: Parameter) -> Setting:
        settings = candidate_settings(parameter)
        heads = [s for s in settings if s.method == "adam_mini"]
        if len(settings) == 1 or heads:
            return heads[0] if heads else DENSE
        axis = parameter.fan_out[0] if parameter.fan_out and len(parameter.shape) == 2 else 0
        return Setting("adam_mini", {"partition": "row", **({"axis": axis} if axis else {})})

    def defaults(name: str) -> Callable[[Parameter], Setting]:
        return lambda parameter: as_applied(parameter, Setting(name)) or DENSE

    special = {"slimadam": static_prior, "adam_mini": adam_mini}
    if names is None:
        names = tuple(name for name in list_methods() if not method_info(name).method.slow)
    chosen = [name for name in list_methods() if name in ("adamw", *names)]
    return {name: plan(special.get(name) or defaults(name)) for name in chosen}
