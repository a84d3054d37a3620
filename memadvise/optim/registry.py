"""The table of methods, and what a :class:`~memadvise.plan.schema.Setting` means for a shape."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memadvise.errors import Mark, OptimizerError
from memadvise.optim import compose as composition
from memadvise.optim.compose import Compose
from memadvise.optim.int8_tensor import Int8Weight
from memadvise.optim.method import Method, OptionProblem, Options, Shape, StateSpec
from memadvise.optim.methods.adafactor import Adafactor
from memadvise.optim.methods.adagrad import Adagrad
from memadvise.optim.methods.adam_mini import AdamMini
from memadvise.optim.methods.adamw import AdamW
from memadvise.optim.methods.adapprox import Adapprox
from memadvise.optim.methods.apollo import Apollo
from memadvise.optim.methods.apollo_mini import ApolloMini
from memadvise.optim.methods.came import CAME
from memadvise.optim.methods.galore import GaLore
from memadvise.optim.methods.lion import Lion
from memadvise.optim.methods.micro_adam import MicroAdam
from memadvise.optim.methods.rmsprop import RMSprop
from memadvise.optim.methods.sgd import SGD
from memadvise.optim.methods.slimadam import SlimAdam
from memadvise.optim.recipe import make_recipe
from memadvise.optim.weights import FORMS, Int8
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


_METHODS: tuple[Method, ...] = (
    AdamW(),
    SlimAdam(),
    AdamMini(),
    Lion(),
    SGD(),
    Adafactor(),
    CAME(),
    MicroAdam(),
    Adapprox(),
    RMSprop(),
    Adagrad(),
    Apollo(),
    ApolloMini(),
    GaLore(),
)
METHODS: tuple[MethodInfo, ...] = tuple(_info(method) for method in _METHODS)
_BY_NAME = {info.name: info for info in METHODS}
ALL_OPTIONS = frozenset(composition.NAMES).union(*(info.options for info in METHODS))


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


@dataclass(frozen=True)
class Parsed:
    """A setting understood: the method, its own options, and what it is composed with."""

    method: Method
    options: Options
    compose: Compose


def parse_setting(setting: Setting) -> Parsed:
    """The method, its validated options and the common ones.

    Raises:
        OptimizerError: unknown method or option, wrong type, out of range, an unsound combination.
    """
    problems = problems_of(setting, None, name="")
    if problems:
        raise problems[0]
    return _parsed(setting)


def _parsed(setting: Setting) -> Parsed:
    method = _BY_NAME[setting.method].method
    own = {name: value for name, value in setting.options.items() if name not in composition.NAMES}
    return Parsed(method, method.options_type(**own), composition.parse(setting.options))


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
    own = {f.name for f in dataclasses.fields(method.options_type)}
    known = own | set(composition.NAMES)
    meant = {**dict.fromkeys([*known, "lr_factor"]), "lr": "lr_factor"}  # what a rule has beside options
    choices = f"its options: {', '.join(sorted(own))}" if own else "it takes no options of its own"
    choices += f"; of any method: {', '.join(composition.NAMES)}"
    found = [
        OptimizerError(
            f"{setting.method} has no option '{option}'",
            where=marks.get(option, marks.get("method")),
            hint=_did_you_mean(meant.get(option) or option, meant) or choices,
        )
        for option in setting.options
        if option not in known
    ]
    fits_name = ""
    try:
        parsed = _parsed(Setting(setting.method, {k: v for k, v in setting.options.items() if k in known}))
        if shape is None:
            composition.check(method, parsed.options, parsed.compose, None)
        else:
            fits_name = f"{name}: "
            method.check(tuple(shape), parsed.options)
            form = FORMS[parsed.compose.weights]
            if form.matrix_only and (len(shape) < 2 or not math.prod(shape)):
                message = f"weights: {form.name} is for matrices, not for a tensor of shape {list(shape)}"
                raise OptionProblem("weights", message, "leave 'weights' out for it")
            specs = method.spec(method.view(tuple(shape), parsed.options), parsed.options, torch.float32)
            composition.check(method, parsed.options, parsed.compose, specs)
    except OptionProblem as problem:
        where = marks.get(problem.option or "", marks.get("method"))
        found.append(OptimizerError(f"{fits_name}{problem.message}", where=where, hint=problem.hint))
    return found


def fitted(setting: Setting, shape: Shape) -> Setting:
    """``setting`` as the default of a model: 0-D and 1-D tensors keep their moments in full, and plain AdamW where the
    method is meant for matrices.
    """
    if len(shape) >= 2 or setting.method not in _BY_NAME:
        return setting
    options = {k: v for k, v in setting.options.items() if k not in ("first_moment", "second_moment")}
    form = FORMS.get(str(options.get("weights")))
    if form is not None and form.matrix_only:
        del options["weights"]
    method = method_info(setting.method).method
    if not method.matrix_only:
        return Setting(setting.method, options)
    common = {k: v for k, v in options.items() if k in composition.NAMES}
    own = method.for_vectors({k: v for k, v in options.items() if k not in common})
    return Setting(DENSE.method, common) if own is None else Setting(setting.method, {**own, **common})


def state_specs(setting: Setting, shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, StateSpec]:
    """Name -> state tensor of a parameter of ``shape`` and ``dtype``, as it is stored.

    Raises:
        OptimizerError: ``setting`` is not valid, or does not fit the shape.
    """
    validate(setting, shape, name=f"a tensor of shape {list(shape)}")
    parsed = _parsed(setting)
    return make_recipe(parsed.method, parsed.options, tuple(shape), dtype, parsed.compose).specs


def state_bytes(setting: Setting, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
    """The sum of ``numel * itemsize`` over the state of a parameter of ``shape``, exactly, with nothing allocated."""
    return sum(spec.num_bytes for spec in state_specs(setting, shape, dtype).values())


def canonical_key(setting: Setting) -> str:
    """A text equal for settings that mean the same: the first option, and the others where they are not the default."""
    parsed = parse_setting(setting)
    fields = dataclasses.fields(parsed.options)
    values = {f.name: getattr(parsed.options, f.name) for f in fields}
    kept = {
        f.name: values[f.name]
        for i, f in enumerate(fields)
        if (i == 0 and values[f.name] is not None) or values[f.name] != f.default
    }
    for f in dataclasses.fields(Compose):
        value = getattr(parsed.compose, f.name)
        if value != f.default:
            kept[f.name] = value
    return Setting(setting.method, kept).key


def weight_bytes(setting: Setting, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
    """The bytes of the weights of a parameter of ``shape`` and ``dtype`` under ``setting``: fewer for int8 alone."""
    values = torch.empty(shape, dtype=dtype, device="meta")
    if setting.options.get("weights") == Int8.name and values.numel():
        return Int8Weight.from_float(values).nbytes_held
    return values.nbytes


def approximate_second_moment(setting: Setting, v: Tensor) -> Tensor | None:
    """What ``setting`` would hold in place of the dense second moment ``v`` (same shape, expanded).

    None if nothing, or where a codec holds a moment: what that loses is not seen in v alone.
    """
    validate(setting, tuple(v.shape), name="second moment")
    parsed = _parsed(setting)
    if parsed.compose.codecs:
        return None
    return parsed.method.second_moment(v, parsed.options)


def _did_you_mean(word: str, known: Any) -> str | None:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else None
