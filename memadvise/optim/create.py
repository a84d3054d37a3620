"""From a plan to an optimizer: which rule decides for which parameter, and everything that can be wrong with that."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memadvise.errors import Mark, MemadviseError, OptimizerError, PlanError
from memadvise.names import canonical_name, matches, repeat_pattern
from memadvise.optim import holding, release
from memadvise.optim.int8_weights import Int8Weight, holdable, quantize_weights
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import fitted, method_info, problems_of
from memadvise.optim.weights import FORMS, Int8, Nearest
from memadvise.plan.schema import ModelShape, Plan, Rule, Setting, Switches

_SHOWN = 4


def create_optimizer(
    model: nn.Module,
    plan: str | Path | Plan | Setting,
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    executor: str | None = None,
    param_groups: Iterable[Any] | None = None,
    switches: Switches | None = None,
) -> MemadviseOptimizer | release.ReleasedOptimizer:
    """The optimizer that executes ``plan`` on the trainable parameters of ``model``.

    Parameters for which the plan says ``weights: int8`` are replaced in the model (:func:`quantize_weights`), which
    must happen before groups, hooks or a checkpoint's weights take hold of them; where that was done, nothing changes.
    Under ``switches.weights`` (:mod:`memadvise.optim.holding`) that holds for the whole model, and under
    ``switches.gradient_release`` the optimizer steps inside backward (:func:`memadvise.optim.release.attach`); the loop
    stays as it is. The other switches are lines of the loop: ``apply_checkpoint`` and ``split_batch``.

    Args:
        model: its trainable parameters are optimized, tied ones once; frozen ones are left alone.
        plan: the path of a plan file, a plan, or one setting for every parameter (0-D and 1-D tensors then keep dense
            AdamW state where the method is meant for matrices).
        lr: learning rate; a 0-dim tensor works too. Where rules have an ``lr_factor``, parameters of one factor are one
            group, with the learning rate ``lr * lr_factor`` and the entry ``lr_factor``, for schedulers that want a
            rate for each: ``[lr * group.get("lr_factor", 1) for group in optimizer.param_groups]``.
        weight_decay: decoupled, for every parameter; pass ``param_groups`` to exempt some.
        betas: default (0.9, 0.999), or the method's own where every parameter uses the same (Lion: 0.9, 0.99).
        eps: default 1e-8, or likewise the method's own (APOLLO: 1e-6).
        executor: "eager", "chunked", "compiled" (where it can be, else chunked) or "fused"; None chooses.
        param_groups: your own groups of the model's parameters (tensors or named pairs), kept in number and order, but
            that a group of several ``lr_factor`` is as many, one behind the other; each multiplies the group's ``lr``.
            Default one group with every trainable parameter. Not with parameters that are yet to be held in int8.
        switches: to be executed instead of the plan's own.

    Raises:
        PlanError: every mistake of the plan, at once, with its place in the file.
        OptimizerError: a hyper-parameter out of range, or a group with a parameter that is not of the model.
    """
    trainable, settings, factors, switches = _bound(model, plan, switches)
    methods = {settings.method} if isinstance(settings, Setting) else {s.method for s in settings.values()}
    method = method_info(methods.pop() if len(methods) == 1 else "adamw").method
    betas = method.default_betas if betas is None else betas
    eps = method.default_eps if eps is None else eps
    given = None if param_groups is None else _named_groups(param_groups, trainable)

    def make(parameters: Mapping[str, Tensor]) -> MemadviseOptimizer:
        groups = [{"params": list(parameters.items())}] if given is None else given
        if any(factor != 1 for factor in factors.values()):
            groups = _by_factor(groups, factors, lr)
        return MemadviseOptimizer(
            groups, settings, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, executor=executor
        )

    narrowed = _to_be_int8(trainable, settings)
    for index, group in enumerate(given or ()):
        if lost := [name for name, _ in group["params"] if name in narrowed]:
            raise OptimizerError(
                f"group {index} holds {lost[0]}, which weights: int8 would replace by another parameter",
                hint="call memadvise.optim.quantize_weights(model, ...) first, then make the groups",
            )
    if switches.weights is not None and not isinstance(settings, Setting):
        holding.cast(model, settings, switches.weights)
    if narrowed and given is None:
        stand_ins = {name: Int8Weight.from_float(trainable[name].detach().to("meta")) for name in narrowed}
        make({**trainable, **stand_ins})  # whatever is wrong is said before the model changes
        trainable.clear()  # nothing else should keep the floats
        quantize_weights(model, narrowed)
        trainable = {name: p for name, p in _named(model).items() if p.requires_grad}
    optimizer = make(trainable)
    return release.attach(model, lambda _: optimizer) if switches.gradient_release else optimizer


def hold_weights(model: nn.Module, plan: str | Path | Plan | Setting, *, switches: Switches | None = None) -> list[str]:
    """Replace the parameters for which ``plan`` says ``weights: int8``, as :func:`create_optimizer` does; their names.

    For what must happen between the two: hooks, groups, a wrapper, a checkpoint. With ``switches.weights`` (default the
    plan's own) of a bfloat16 form, a float32 model is cast.

    Raises:
        PlanError, OptimizerError: as create_optimizer.
    """
    trainable, settings, _, switches = _bound(model, plan, switches)
    if switches.weights is not None and not isinstance(settings, Setting):
        holding.cast(model, settings, switches.weights)
    return quantize_weights(model, _to_be_int8(trainable, settings))


def _bound(
    model: nn.Module, plan: str | Path | Plan | Setting, switches: Switches | None
) -> tuple[dict[str, Tensor], Setting | dict[str, Setting], dict[str, float], Switches]:
    """The trainable parameters by name, the one setting for all or that of each, the learning-rate factors, and the
    switches to execute.
    """
    named = _named(model)
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    if not trainable:
        raise OptimizerError(
            "the model has no trainable parameter", hint="set requires_grad=True where training is meant"
        )
    if isinstance(plan, Setting):
        switches = switches or Switches()
        one = plan if switches.weights is None else holding.with_weights(plan, trainable, switches.weights)
        return trainable, one, {}, switches
    if not isinstance(plan, Plan):
        from memadvise.plan.load import load_plan

        plan = load_plan(plan)
    shapes = {name: tuple(p.shape) for name, p in trainable.items()}
    settings = bind_plan(plan, shapes, frozen=named.keys() - trainable.keys())
    rules = deciding_rules(plan, trainable)
    switches = switches or plan.switches
    if problems := _wrong_dtypes(trainable, rules, switches):
        raise PlanError(sorted(problems, key=_position))
    if switches.weights is not None:
        settings = holding.with_weights(settings, trainable, switches.weights)
    return trainable, settings, {name: rule.lr_factor for name, rule in rules.items()}, switches


def deciding_rules(plan: Plan, names: Iterable[str]) -> dict[str, Rule]:
    """Name -> the first rule that matches it, for a plan that has one for each."""
    return {name: next(rule for rule in plan.rules if _matches(rule, name)) for name in names}


def _wrong_dtypes(
    trainable: Mapping[str, Tensor], rules: Mapping[str, Rule], switches: Switches
) -> list[MemadviseError]:
    """One problem for each rule whose ``weights`` cannot be written to a parameter as it is."""
    found: dict[int, MemadviseError] = {}
    for name, rule in rules.items():
        p, form = trainable[name], FORMS[rule.options.get("weights", Nearest.name)]
        if isinstance(p, Int8Weight) or nn.parameter.is_lazy(p):
            continue  # said where they are resolved
        problem = form.problem(holding.as_cast(p, switches.weights))
        if form.name == Int8.name:  # it will be made of what p is now
            problem = None if holdable(p) else f"{p.dtype} cannot be held in int8"
        if problem:
            where = rule.marks.get("weights")
            hint = "leave 'weights' out of the rule, or cast the model before making the optimizer"
            found.setdefault(id(rule), OptimizerError(f"{name}: {problem}", where=where, hint=hint))
    return list(found.values())


def _by_factor(groups: list[dict[str, Any]], factors: Mapping[str, float], lr: float | Tensor) -> list[dict[str, Any]]:
    """``groups``, each as many as its parameters have factors; the learning rate times the factor."""
    split = []
    for group in groups:
        parts: dict[float, list[tuple[str, Tensor]]] = {}
        for name, p in group["params"]:
            parts.setdefault(factors[name], []).append((name, p))
        for factor, pairs in parts.items():
            rate = group.get("lr", lr)
            own = {"lr": rate if factor == 1 else rate * factor, "lr_factor": factor}
            split.append({**group, "params": pairs, **own})
    return split


def _to_be_int8(trainable: Mapping[str, Tensor], settings: Setting | Mapping[str, Setting]) -> list[str]:
    """The parameters that their settings want in int8 and that are not yet."""
    names = []
    for name, p in trainable.items():
        if nn.parameter.is_lazy(p) or isinstance(p, Int8Weight):
            continue
        setting = fitted(settings, tuple(p.shape)) if isinstance(settings, Setting) else settings[name]
        if setting.options.get("weights") == Int8.name:
            if not holdable(p):
                raise OptimizerError(f"{name} is a {type(p).__name__} of {p.dtype}, which cannot be held in int8")
            names.append(name)
    return names


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> parameter, tied parameters once, under their first name."""
    named: dict[str, Tensor] = {}
    for raw, p in model.named_parameters():
        name = canonical_name(raw)
        if name in named:
            raise OptimizerError(f"two parameters are called {name}", hint="pass the model without its wrapper")
        named[name] = p
    return named


def _named_groups(groups: Iterable[Any], trainable: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The user's groups with every parameter under its canonical name."""
    name_of = {p: name for name, p in trainable.items()}
    groups = list(groups)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    renamed = []
    for index, group in enumerate(groups):
        pairs = []
        for item in [group["params"]] if isinstance(group["params"], Tensor) else group["params"]:
            p = item[1] if isinstance(item, tuple) else item
            if p not in name_of:
                raise OptimizerError(
                    f"group {index} holds a parameter that is no trainable parameter of this model",
                    hint="leave frozen parameters out: [p for p in model.parameters() if p.requires_grad]",
                )
            pairs.append((name_of[p], p))
        renamed.append({**group, "params": pairs})
    return renamed


def bind_plan(
    plan: Plan, parameters: Mapping[str, tuple[int, ...]], *, frozen: Collection[str] = ()
) -> dict[str, Setting]:
    """Which setting each parameter gets: that of the first rule that matches.

    Args:
        plan: the rules, first match wins, and the model they were made for.
        parameters: canonical name -> shape of the trainable parameters.
        frozen: names of parameters without gradients; they need no rule, and a rule for them alone matches nothing.

    Raises:
        PlanError: all problems at once: another model, an unknown method or option, an option that does not fit,
            a rule that matches nothing, a parameter that no rule matches.
    """
    problems: list[MemadviseError] = list(_other_model(plan, parameters))
    bound: dict[str, Setting] = {}
    seen: dict[int, set[str]] = {}
    matched = [False] * len(plan.rules)
    for name, shape in parameters.items():
        for number, rule in enumerate(plan.rules):
            if not _matches(rule, name):
                continue
            matched[number] = True
            if name in bound:
                continue
            bound[name] = Setting(rule.method, dict(rule.options))
            for problem in problems_of(bound[name], shape, name=name, marks=rule.marks):
                # one mistake in a rule is one message, not one for each parameter the rule decides
                kind = problem.message.removeprefix(f"{name}: ")
                if kind not in seen.setdefault(number, set()):
                    seen[number].add(kind)
                    problems.append(problem)
    for number, rule in enumerate(plan.rules):
        if matched[number]:
            continue
        problems.append(_unused(rule, parameters, frozen))
        problems.extend(problems_of(Setting(rule.method, dict(rule.options)), None, name="", marks=rule.marks))
    problems.extend(_unmatched([name for name in parameters if name not in bound], plan))
    if problems:
        raise PlanError(sorted(problems, key=_position))
    return bound


def _matches(rule: Rule, name: str) -> bool:
    try:
        return matches(rule.match, name)
    except re.error as error:
        problem = OptimizerError(f"'{rule.match}' is not a regular expression: {error}", where=rule.marks.get("match"))
        raise PlanError([problem]) from error


def _position(problem: MemadviseError) -> tuple[int, int]:
    mark: Mark | None = problem.where
    return (mark.line, mark.column or 0) if mark else (0, 0)


def _unused(rule: Rule, parameters: Mapping[str, tuple[int, ...]], frozen: Collection[str]) -> MemadviseError:
    where = rule.marks.get("match")
    if any(_matches(rule, name) for name in frozen):
        return OptimizerError(
            f"'{rule.match}' matches only frozen parameters",
            where=where,
            hint="frozen parameters need no rule: remove it",
        )
    close = _closest(rule.match, parameters)
    return OptimizerError(
        f"'{rule.match}' matches no trainable parameter",
        where=where,
        hint=f"the closest name is {close}" if close else "remove the rule, or correct its pattern",
    )


def _closest(pattern: str, names: Iterable[str]) -> str | None:
    import difflib

    close = difflib.get_close_matches(pattern, list(names), n=1, cutoff=0.5)
    return close[0] if close else None


def _unmatched(names: list[str], plan: Plan) -> Iterable[MemadviseError]:
    by_pattern: dict[str, list[str]] = {}
    for name in names:
        by_pattern.setdefault(repeat_pattern(name)[0], []).append(name)
    for pattern, members in by_pattern.items():
        more = f" (and {len(members) - 1} more like {pattern})" if len(members) > 1 else ""
        yield OptimizerError(
            f"no rule matches {members[0]}{more}",
            where=plan.marks.get("rules"),
            hint=f'add a rule, for example: {{match: "{pattern}", method: adamw}}',
        )


def _other_model(plan: Plan, parameters: Mapping[str, tuple[int, ...]]) -> Iterable[MemadviseError]:
    """One problem if the plan was made for a model of other parameters, naming those that differ."""
    if plan.model is None:
        return
    lines = _differences(plan.model, parameters)
    total = sum(math.prod(shape) for shape in parameters.values())
    if not lines and plan.model.num_parameters != total:
        lines = [f"it had {plan.model.num_parameters:,} trainable values, this one has {total:,} (another depth?)"]
    if lines:
        shown = lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
        yield OptimizerError(
            f"the plan was made for another model ({plan.model.fingerprint}): " + "; ".join(shown),
            where=plan.marks.get("model"),
            hint="scan this model and recommend again, or remove 'model:' from the plan to use its rules all the same",
        )


def _differences(model: ModelShape, parameters: Mapping[str, tuple[int, ...]]) -> list[str]:
    if not model.shapes:
        return []
    lines, found, differing = [], set(), set()
    for name, shape in parameters.items():
        key = name if name in model.shapes else next((p for p in model.shapes if matches(p, name)), None)
        if key is None:
            like = repeat_pattern(name)[0]
            if like not in differing:  # one line for all blocks alike
                lines.append(f"{name} is not in the plan's model")
                differing.add(like)
            continue
        found.add(key)
        if tuple(model.shapes[key]) != tuple(shape) and key not in differing:
            lines.append(f"{name} has shape {list(shape)}, the plan's model {list(model.shapes[key])}")
            differing.add(key)
    missing = [key for key in model.shapes if key not in found]
    return lines + [f"{key} {list(model.shapes[key])} is missing from this model" for key in missing]
