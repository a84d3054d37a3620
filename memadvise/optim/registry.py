"""The table of methods, and what a :class:`~memadvise.plan.schema.Setting` means for a shape."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memadvise.errors import Mark, OptimizerError
from memadvise.optim.method import Method, OptionProblem, Options, Shape, StateSpec, compute_dtype
from memadvise.optim.methods.adam_mini import AdamMini
from memadvise.optim.methods.adamw import AdamW
from memadvise.optim.methods.lion import Lion
from memadvise.optim.methods.sgd import SGD
from memadvise.optim.methods.slimadam import SlimAdam
from memadvise.plan.schema import Setting

DENSE = Setting("adamw")


@dataclass(frozen=True)
class MethodInfo:
    """One row of the table: what a method is called, takes and costs."""

    name: str
    summary: str
    source: str
    options: dict[str, str]
    defaults: dict[str, Any]
    bytes_per_parameter: str
    default_lr_factor: float
    method: Method = dataclasses.field(repr=False, compare=False)


def _info(method: Method) -> MethodInfo:
    return MethodInfo(
        name=method.name,
        summary=method.summary,
        source=method.source,
        options=dict(method.options_help),
        defaults={f.name: f.default for f in dataclasses.fields(method.options_type)},
        bytes_per_parameter=method.bytes_help,
        default_lr_factor=method.lr_factor,
        method=method,
    )


METHODS: tuple[MethodInfo, ...] = tuple(_info(m) for m in (AdamW(), SlimAdam(), AdamMini(), Lion(), SGD()))
_BY_NAME = {info.name: info for info in METHODS}


def list_methods() -> tuple[str, ...]:
    """The names of the methods, in the order of the table."""
    return tuple(_BY_NAME)


def method_info(name: str, *, where: Mark | None = None) -> MethodInfo:
    """The row of one method.

    Raises:
        OptimizerError: there is no such method.
    """
    if name not in _BY_NAME:
        hint = _did_you_mean(name, _BY_NAME) or f"methods: {', '.join(_BY_NAME)}"
        raise OptimizerError(f"there is no method '{name}'", where=where, hint=hint)
    return _BY_NAME[name]


def default_lr_factor(method: str) -> float:
    """The learning rate of ``method`` relative to AdamW's, for comparisons from one lr: 1 for the Adam family."""
    return method_info(method).default_lr_factor


def parse_options(setting: Setting) -> tuple[Method, Options]:
    """The method and its validated options.

    Raises:
        OptimizerError: unknown method or option, wrong type, out of range.
    """
    problems = problems_of(setting, None, name="")
    if problems:
        raise problems[0]
    info = _BY_NAME[setting.method]
    return info.method, info.method.options_type(**setting.options)


def validate(setting: Setting, shape: Shape, *, name: str, marks: Mapping[str, Mark] | None = None) -> None:
    """Check ``setting`` for the parameter ``name`` of ``shape``.

    Raises:
        OptimizerError: unknown method or option, bad type, out of range, does not fit the shape; ``where`` is the
            place in ``marks`` (``"method"`` and the options' names), if there is one.
    """
    problems = problems_of(setting, shape, name=name, marks=marks)
    if problems:
        raise problems[0]


def problems_of(
    setting: Setting, shape: Shape | None, *, name: str, marks: Mapping[str, Mark] | None = None
) -> list[OptimizerError]:
    """Everything wrong with ``setting``, for the parameter ``name`` of ``shape`` or, without one, in itself."""
    marks = marks or {}
    try:
        method = method_info(setting.method, where=marks.get("method")).method
    except OptimizerError as error:
        return [error]
    known = {f.name for f in dataclasses.fields(method.options_type)}
    choices = f"its options: {', '.join(sorted(known))}" if known else "it takes no options"
    found = [
        OptimizerError(
            f"{setting.method} has no option '{option}'",
            where=marks.get(option, marks.get("method")),
            hint=_did_you_mean(option, known) or choices,
        )
        for option in setting.options
        if option not in known
    ]
    fits_name = ""
    try:
        options = method.options_type(**{k: v for k, v in setting.options.items() if k in known})
        if shape is not None:
            fits_name = f"{name}: "
            method.check(tuple(shape), options)
    except OptionProblem as problem:
        where = marks.get(problem.option or "", marks.get("method"))
        found.append(OptimizerError(f"{fits_name}{problem.message}", where=where, hint=problem.hint))
    return found


def fitted(setting: Setting, shape: Shape) -> Setting:
    """``setting`` as the default of a model: what is meant for matrices leaves 0-D and 1-D tensors dense AdamW."""
    return DENSE if len(shape) < 2 and method_info(setting.method).method.matrix_only else setting


def state_specs(setting: Setting, shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, StateSpec]:
    """Name -> state tensor of a parameter of ``shape``; ``dtype`` is the parameter's (only float64 makes a difference).

    Raises:
        OptimizerError: ``setting`` is not valid, or does not fit the shape.
    """
    validate(setting, shape, name=f"a tensor of shape {list(shape)}")
    method, options = parse_options(setting)
    return method.spec(tuple(shape), options, compute_dtype(dtype))


def state_bytes(setting: Setting, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
    """The sum of ``numel * itemsize`` over the state of a parameter of ``shape``, exactly, with nothing allocated."""
    return sum(spec.num_bytes for spec in state_specs(setting, shape, dtype).values())


def canonical_key(setting: Setting) -> str:
    """A text equal for settings that mean the same: the first option, and the others where they are not the default."""
    options = parse_options(setting)[1]
    fields = dataclasses.fields(options)
    values = {f.name: getattr(options, f.name) for f in fields}
    kept = {f.name: values[f.name] for i, f in enumerate(fields) if i == 0 or values[f.name] != f.default}
    return Setting(setting.method, kept).key


def approximate_second_moment(setting: Setting, v: Tensor) -> Tensor | None:
    """What ``setting`` would hold in place of the dense second moment ``v`` (same shape, expanded); None if nothing."""
    validate(setting, tuple(v.shape), name="second moment")
    method, options = parse_options(setting)
    return method.second_moment(v, options)


def _did_you_mean(word: str, known: Any) -> str | None:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else None
