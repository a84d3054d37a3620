"""The house's floors: nothing imports upwards, nothing in a circle, and torch stays where it is needed."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "memadvise"

FLOORS = (
    ("", "errors"),  # "" is the package itself, whose public names load lazily
    ("units", "names", "batches", "target"),
    (
        "ledger",
        "layout",
        "flows",
        "dataflow",
        "plan",
        "roles",
        "switches",
        "sizing",
        "hf_target",
        "compare",
        "baseline",
    ),
    ("optim",),
    ("memory", "check"),
    ("report",),
    ("advise",),
    ("probe",),
    ("whatif", "fit", "first_look", "scan", "explain", "paired", "verify"),
    ("check_run", "against"),
    ("integrations",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}

# Upward only inside the function that was asked for it: target.load_target("hf:...") hands over to the HF floor.
LAZY_UPWARD = {("memadvise.target", "memadvise.hf_target")}

# What optim may know of the rest, so that it can be used by somebody who never runs the command line.
OPTIM_MAY_IMPORT = ("memadvise.errors", "memadvise.names", "memadvise.plan.schema", "memadvise.optim")
OPTIM_MAY_IMPORT_LAZILY = ("memadvise.plan.load",)

TORCH_AT_IMPORT_TIME = ("optim", "memory", "probe")
THIRD_PARTY = {
    "typer": ("cli",),
    "rich": ("cli", "report"),
    "yaml": ("plan",),
    "pynvml": ("memory",),
    "pytest": ("integrations",),
    "transformers": ("hf_target",),
}


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int
    lazy: bool
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_name(path: Path) -> str:
    parts = ("memadvise", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(module: str) -> str:
    """The floor's name a module of this package belongs to: ``memadvise.optim.engine`` -> ``optim``."""
    return module.split(".")[1] if "." in module else ""


def imports_of(module: str) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, lazy, True)
            for child in node.orelse:
                visit(child, lazy, typing_only)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(module, alias.name, node.lineno, lazy, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                name = deeper if deeper in MODULES else str(node.module)
                found.append(Import(module, name, node.lineno, lazy, typing_only))
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or inner, typing_only)

    visit(ast.parse(MODULES[module].read_text(encoding="utf-8")), False, False)
    return found


def own_imports() -> Iterator[Import]:
    for module in MODULES:
        for item in imports_of(module):
            if item.imported.split(".")[0] == "memadvise" and not (module == "memadvise" and item.typing_only):
                yield item


def test_every_module_has_a_floor() -> None:
    homeless = sorted({part_of(m) for m in MODULES} - set(FLOOR_OF))
    assert not homeless, f"give these a floor in tests/unit/test_layers.py: {homeless}"


def test_nothing_imports_upwards() -> None:
    wrong = [
        str(item)
        for item in own_imports()
        if FLOOR_OF.get(part_of(item.imported), -1) > FLOOR_OF.get(part_of(item.importer), -1)
        and not (item.lazy and (item.importer, item.imported) in LAZY_UPWARD)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for item in own_imports():
        if (item.importer, item.imported) not in LAZY_UPWARD and item.imported != item.importer:
            graph[item.importer].add(item.imported)
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert set(MODULES) <= set(order)


def test_optim_stands_on_its_own() -> None:
    def allowed(item: Import) -> bool:
        names = OPTIM_MAY_IMPORT + (OPTIM_MAY_IMPORT_LAZILY if item.lazy or item.typing_only else ())
        top = item.imported.split(".")[0]
        if top == "memadvise":
            return any(item.imported == name or item.imported.startswith(f"{name}.") for name in names)
        return top == "torch" or top in sys.stdlib_module_names

    wrong = [str(i) for module in MODULES if part_of(module) == "optim" for i in imports_of(module) if not allowed(i)]
    assert not wrong, "\n".join(wrong)


def test_torch_is_imported_inside_functions_elsewhere() -> None:
    wrong = [
        str(item)
        for module in MODULES
        if part_of(module) not in TORCH_AT_IMPORT_TIME
        for item in imports_of(module)
        if item.imported.split(".")[0] == "torch" and not item.lazy and not item.typing_only
    ]
    assert not wrong, "\n".join(wrong)


def test_third_party_packages_stay_in_their_corner() -> None:
    wrong = [
        str(item)
        for module in MODULES
        for item in imports_of(module)
        if part_of(module) not in THIRD_PARTY.get(item.imported.split(".")[0], (part_of(module),))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_source_is_ascii(module: str) -> None:
    assert MODULES[module].read_text(encoding="utf-8").isascii()


def test_the_parser_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport torch\nif TYPE_CHECKING:\n    import yaml\n"
        "class A:\n    def f(self):\n        from memadvise.cli import app\n"
    )
    monkeypatch.setitem(MODULES, "memadvise.sample", path)
    seen = {i.imported: (i.lazy, i.typing_only) for i in imports_of("memadvise.sample")}
    assert seen["torch"] == (False, False)
    assert seen["yaml"] == (False, True)
    assert seen.get("memadvise.cli.app", seen.get("memadvise.cli")) == (True, False)


REPORT = "import atexit, sys; atexit.register(lambda: print('MODULES', *sys.modules, file=sys.stderr)); "


def imported_by(code: str, *arguments: str) -> tuple[str, set[str]]:
    """(stdout, names of all modules loaded at the end) of a fresh interpreter."""
    command = [sys.executable, "-c", REPORT + code, *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout, set(run.stderr.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize("command", [("--help",), ("--version",), ("scan", "--help"), ("recommend", "--help")])
def test_help_does_not_import_torch(command: tuple[str, ...]) -> None:
    stdout, modules = imported_by("import runpy; runpy.run_module('memadvise', run_name='__main__')", *command)
    assert stdout.strip()
    assert "memadvise.cli.app" in modules or "typer" in modules  # the instrument works
    assert "torch" not in modules


def test_importing_the_package_does_not_import_torch() -> None:
    _, modules = imported_by("import memadvise as m; m.Target, m.load_target, m.load_plan, m.split_batch")
    assert "memadvise.target" in modules
    assert "torch" not in modules
