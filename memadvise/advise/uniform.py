"""Every method on the whole model, as its paper would apply it: what the probe trains beside AdamW."""

from __future__ import annotations

from collections.abc import Callable

from memadvise.advise.candidates import candidate_settings, static_prior
from memadvise.advise.rules import DENSE, TOKEN_ROLES
from memadvise.ledger import Parameter
from memadvise.names import glob_escape
from memadvise.optim.registry import fitted, list_methods, method_info, problems_of
from memadvise.plan.schema import Plan, Rule, Setting


def probe_methods(parameters: tuple[Parameter, ...], names: tuple[str, ...] | None = None) -> dict[str, Plan]:
    """AdamW and the methods called ``names`` once, applied to the whole model as their papers would apply them.

    None: every bundled method but those whose step takes tens of times AdamW's.
    """
    trainable = [p for p in parameters if p.trainable]

    def uniform(choose: Callable[[Parameter], Setting]) -> Plan:
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
        def choose(parameter: Parameter) -> Setting:
            setting = fitted(Setting(name), parameter.shape)
            left_out = method_info(name).method.hidden_only and parameter.role in TOKEN_ROLES
            return DENSE if left_out or problems_of(setting, parameter.shape, name="") else setting

        return choose

    special = {"slimadam": static_prior, "adam_mini": adam_mini}
    if names is None:
        names = tuple(name for name in list_methods() if not method_info(name).method.slow)
    chosen = [name for name in list_methods() if name in ("adamw", *names)]
    return {name: uniform(special.get(name) or defaults(name)) for name in chosen}
