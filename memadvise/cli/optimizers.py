"""``memadvise optimizers``: the methods a plan can name, their options and what they cost; what a plan does."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memadvise.cli import common
from memadvise.cli.common import Device
from memadvise.errors import UsageError
from memadvise.units import format_bytes

if TYPE_CHECKING:
    from memadvise.explain import Explanation


def optimizers(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Only this method.")] = None,
    explain: Annotated[
        Path | None, typer.Option("--explain", metavar="PLAN", help="Show what a plan does to each parameter instead.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="TARGET", help="With --explain: the model; default the plan's own section."),
    ] = None,
    device: Annotated[
        Device | None, typer.Option("--device", help="With --explain: whose executors; default the plan's, or cuda.")
    ] = None,
    output: common.ResultFile = None,
    force: common.Force = False,
    format: common.FormatOption = common.Format.text,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """List methods, their options and what they cost."""
    common.configure(format=format, quiet=quiet, verbose=verbose, no_progress=no_progress)
    if explain is not None:
        if name is not None:
            raise UsageError(f"--explain shows a plan, not the method {name}", hint=f"memadvise optimizers {name}")
        _deliver_explanation(_explanation(explain, target, device), format, output, force=force)
        return
    if target is not None or device is not None:
        raise UsageError(
            "--target and --device go with --explain", hint="memadvise optimizers --explain memadvise.yaml"
        )
    from memadvise.optim.compose import HELP, Compose
    from memadvise.optim.registry import METHODS, method_info

    methods = METHODS if name is None else (method_info(name),)
    rows = [_describe(info) for info in methods]
    types = {f.name: (str(f.type), f.default) for f in dataclasses.fields(Compose)}
    shared = [
        {"name": option, "type": _type(types[option][0]), "default": types[option][1], "help": text}
        for option, text in HELP.items()
    ]
    if format is common.Format.json:
        document = {"methods": rows, "options_of_every_method": shared}
        common.deliver(common.to_json(document), output, force=force)
        return
    from memadvise.report.draw import heading, render_text, table

    columns = {"option": "text", "type": "text", "default": "text", "what it means": "text"}
    parts: list[Any] = [
        table(
            {"method": "text", "state bytes per parameter": "text", "what it does": "text", "source": "text"},
            [(row["name"], row["bytes_per_parameter"], row["summary"], row["source"]) for row in rows],
        )
    ]
    for row in rows:
        own = f"Options of {row['name']}" if row["options"] else f"{row['name']} has no options of its own"
        parts += [_class_line(row), heading(own)]
        if row["options"]:
            parts.append(table(columns, _cells(row["options"])))
    parts += [heading("Options of every method"), table(columns, _cells(shared))]
    if output is None:
        common.print_renderables(parts)
    else:
        common.deliver(render_text(parts), output, force=force)


def _explanation(path: Path, target: str | None, device: Device | None) -> Explanation:
    from memadvise.explain import explain
    from memadvise.plan.load import load_plan

    plan = load_plan(path)
    kind = device.value if device is not None else plan.device if plan.device in list(Device) else Device.cuda.value
    with common.interruptible():
        return explain(plan, target=target, device=str(kind))


def _deliver_explanation(found: Explanation, format: common.Format, output: Path | None, *, force: bool) -> None:
    totals = {"state_bytes": found.state_bytes, "largest_scratch_bytes": found.largest_scratch_bytes}
    if format is common.Format.json:
        common.deliver(common.to_json({**common.plain(found), **totals}), output, force=force)
        return
    from memadvise.report.draw import render_text, table

    scaled = any(p.lr_factor != 1 for p in found.parameters)
    columns = {"parameter": "name", "shape": "text", "dtype": "text", "setting": "text", "executor": "text"}
    columns |= ({"lr factor": "number"} if scaled else {}) | {"state": "number", "scratch": "number"}
    rows = [
        (
            p.name, str(list(p.shape)), p.dtype, p.setting, p.executor, *([f"{p.lr_factor:g}"] if scaled else []),
            f"{p.state_bytes:,}", f"{p.scratch_bytes:,}",
        )
        for p in found.parameters
    ]  # fmt: skip
    parts: list[Any] = [
        table(columns, rows, optional=("dtype", "shape")),
        f"\n{len(rows)} parameters on {found.device}: {found.state_bytes:,} bytes of state "
        f"({format_bytes(found.state_bytes)}), at most {found.largest_scratch_bytes:,} of scratch for one of them",
        *found.assumptions,
    ]
    if output is None:
        common.print_renderables(parts)
    else:
        common.deliver(render_text(parts), output, force=force)


def _class_line(row: dict[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in row["defaults"].items())
    factor = row["default_lr_factor"]
    customary = "" if factor == 1 else f"; in a plan with AdamW's lr, lr_factor: {factor:g} is customary"
    return f"\nmemadvise.optim.{row['class']}(params, {arguments}){customary}"


def _class_of(method: str) -> Any:
    """The plain class of a method: the one without presets."""
    from memadvise import optim
    from memadvise.optim.classes.base import PlainOptimizer

    exported = (getattr(optim, name) for name in optim.__all__)
    classes = [c for c in exported if isinstance(c, type) and issubclass(c, PlainOptimizer)]
    return next(c for c in classes if c.method == method and not c.preset)


def _describe(info: Any) -> dict[str, Any]:
    """A method as plain data; options in the order a plan would write them."""
    types = {f.name: str(f.type) for f in dataclasses.fields(info.method.options_type)}
    plain = _class_of(info.name)
    arguments = inspect.signature(plain).parameters
    return {
        "name": info.name,
        "summary": info.summary,
        "source": info.source,
        "bytes_per_parameter": info.bytes_per_parameter,
        "default_lr_factor": info.default_lr_factor,
        "class": plain.__name__,
        "defaults": {key: arguments[key].default for key in ("lr", "betas", "eps", "weight_decay")},
        "options": [
            {"name": option, "type": _type(types[option]), "default": _plain(info.defaults[option]), "help": text}
            for option, text in info.options.items()
        ],
    }


def _cells(options: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(o["name"], o["type"], _shown(o["default"]), o["help"]) for o in options]


def _shown(default: Any) -> str:
    return "-" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _type(annotation: str) -> str:
    """A Python annotation in the words of a plan: ``tuple[int, ...]`` is a list of int."""
    text = annotation.replace(" | None", "")
    while match := re.fullmatch(r"(.*)tuple\[(.+), \.\.\.\]", text):
        text = f"{match[1]}list of {match[2]}"
    return re.sub(r"tuple\[(.*)\]", r"[\1]", text)


def _plain(value: Any) -> Any:
    """A default as a plan would write it."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
