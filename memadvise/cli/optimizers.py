"""``memadvise optimizers``: the methods a plan can name, their options and what they cost."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any

import typer

from memadvise.cli import common


def optimizers(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Only this method.")] = None,
    output: common.ResultFile = None,
    force: common.Force = False,
    format: common.FormatOption = common.Format.text,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """List methods, their options and what they cost."""
    common.configure(format=format, quiet=quiet, verbose=verbose, no_progress=no_progress)
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
        parts.append(heading(own))
        if row["options"]:
            parts.append(table(columns, _cells(row["options"])))
    parts += [heading("Options of every method"), table(columns, _cells(shared))]
    if output is None:
        common.print_renderables(parts)
    else:
        common.deliver(render_text(parts), output, force=force)


def _describe(info: Any) -> dict[str, Any]:
    """A method as plain data; options in the order a plan would write them."""
    types = {f.name: str(f.type) for f in dataclasses.fields(info.method.options_type)}
    return {
        "name": info.name,
        "summary": info.summary,
        "source": info.source,
        "bytes_per_parameter": info.bytes_per_parameter,
        "default_lr_factor": info.default_lr_factor,
        "options": [
            {"name": option, "type": _type(types[option]), "default": _plain(info.defaults[option]), "help": text}
            for option, text in info.options.items()
        ],
    }


def _cells(options: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(o["name"], o["type"], _shown(o["default"]), o["help"]) for o in options]


def _shown(default: Any) -> str:
    return "-" if default is None else str(default)


def _type(annotation: str) -> str:
    """A Python annotation in the words of a plan: ``tuple[int, ...]`` is a list of int."""
    text = annotation.replace(" | None", "")
    while match := re.fullmatch(r"(.*)tuple\[(.+), \.\.\.\]", text):
        text = f"{match[1]}list of {match[2]}"
    return re.sub(r"tuple\[(.*)\]", r"[\1]", text)


def _plain(value: Any) -> Any:
    """A default as a plan would write it."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
