"""What every benchmark prints: the machine first, then one table."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from memadvise import __version__
from memadvise.memory.device import device_facts
from memadvise.units import format_bytes

MIB = 2**20


def machine() -> str:
    """The command, the machine and the versions, one line each."""
    lines = {
        "command": " ".join(["python", *map(shlex.quote, sys.argv)]),
        "cpu": f"{_cpu_name()}, {os.cpu_count()} logical CPUs, {torch.get_num_threads()} thread(s) used by torch",
        "versions": f"memadvise {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    for gpu in device_facts():
        lines[f"gpu {gpu['index']}"] = (
            f"{gpu['name']}, {format_bytes(gpu['total_bytes'])}, driver {gpu['driver']} (CUDA {gpu['cuda_driver']})"
        )
    if not torch.cuda.is_available():
        lines["cuda"] = "not available to torch"
    return "\n".join(f"{name + ':':<10}{value}" for name, value in lines.items())


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned text; a column whose cells are numbers, or start with a digit or a sign, is set to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    if any(len(row) != len(columns) for row in cells):
        raise ValueError(f"every row needs {len(columns)} cells")
    widths = [max(len(name), *(len(row[i]) for row in cells)) if cells else len(name) for i, name in enumerate(columns)]
    right = [any(row[i][:1] in "+-" or row[i][:1].isdigit() for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(row, widths, right, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, cells)])


def _cell(value: object) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


class Rows:
    """A table that is printed line by line, so that what was measured is seen when a run is cut short.

    Args:
        columns: their names; the first ``left`` hold text, the others numbers.
        widths: of the text columns; a number that is wider than its column's name takes ``number`` characters.
    """

    def __init__(self, columns: Sequence[str], widths: Sequence[int], *, number: int = 8) -> None:
        self.columns = columns
        self.left = len(widths)
        text = [max(len(name), width) for name, width in zip(columns, widths, strict=False)]
        self.widths = [*text, *(max(len(name), number) for name in columns[self.left :])]

    def start(self) -> None:
        """Print the names of the columns."""
        self._print(self.columns)
        self._print(["-" * width for width in self.widths])

    def add(self, row: Sequence[object]) -> None:
        """Print one row at once."""
        if len(row) != len(self.columns):
            raise ValueError(f"every row needs {len(self.columns)} cells")
        self._print([_cell(value) for value in row])

    def note(self, name: str, text: str) -> None:
        """Print a name and why there are no numbers."""
        print(f"{name.ljust(self.widths[0])}  {text}", flush=True)

    def _print(self, cells: Sequence[str]) -> None:
        parts = [
            cell.ljust(width) if i < self.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, self.widths, strict=True))
        ]
        print("  ".join(parts).rstrip(), flush=True)
