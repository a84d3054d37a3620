"""What pictures in a terminal are made of: a console of the right width, bars, and a small chart over time."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memadvise.units import format_bytes

WIDTH_OFF_TTY = 160  # rich assumes 80 columns and would fold every parameter name
_EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"
_LEVELS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def make_console(file: TextIO, *, width: int | None = None) -> Console:
    """A console that never reads markup in names and, when it is not a terminal, is wide enough for them.

    The width is ``width``, else the terminal's, else the variable COLUMNS, else 160.
    """
    if width is None and not file.isatty() and not os.environ.get("COLUMNS", "").isdigit():
        width = WIDTH_OFF_TTY
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)


def render_text(renderables: Iterable[RenderableType], *, width: int = WIDTH_OFF_TTY) -> str:
    """Plain text without colours, the same on every machine; no line ends in spaces."""
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=width, markup=False, highlight=False, emoji=False, no_color=True, force_terminal=False
    )
    for renderable in renderables:
        console.print(renderable, crop=False)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


@dataclass(frozen=True)
class Grid:
    """A plain table that leaves columns out, the last of ``optional`` first, where the console is too narrow.

    Args:
        columns: title -> kind: "name" (folded, never cut), "number" (right), "text" (folded) or "bar".
        rows: cells, strings or bars.
        optional: titles of columns that can be spared.
    """

    columns: dict[str, str]
    rows: list[list[str | RenderableType]]
    optional: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        titles, spare = list(self.columns), list(self.optional)
        while spare and sum(self._width(t) for t in titles) + 3 * (len(titles) - 1) > options.max_width:
            titles.remove(spare.pop())
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        for title in titles:
            number = self.columns[title] == "number"
            table.add_column(title, justify="right" if number else "left", overflow="fold", no_wrap=number)
        wanted = [list(self.columns).index(title) for title in titles]
        for row in self.rows:
            table.add_row(*(Text(cell) if isinstance(cell := row[i], str) else cell for i in wanted))
        yield table

    def _width(self, title: str) -> int:
        """The width a column would like; names and texts fold beyond 40 characters, bars can be short."""
        kind = self.columns[title]
        index = list(self.columns).index(title)
        if kind == "bar":
            return 6
        cells = [title, *(row[index] for row in self.rows)]
        widest = max(cell_len(cell) for cell in cells if isinstance(cell, str))
        return widest if kind == "number" else min(widest, 40)


def table(
    columns: Mapping[str, str], rows: Iterable[Sequence[str | RenderableType]], *, optional: Sequence[str] = ()
) -> Grid:
    """A :class:`Grid` of these columns (title -> kind) and rows."""
    return Grid(dict(columns), [list(row) for row in rows], tuple(optional))


def heading(text: str) -> Text:
    """A section's title with an empty line above."""
    return Text(f"\n{text}", style="bold")


@dataclass(frozen=True)
class Bar:
    """A horizontal bar for ``value`` out of ``total``; '#' where the output knows ASCII only."""

    value: float
    total: float
    width: int = 30
    style: str = "cyan"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(self.width, options.max_width)
        share = min(1.0, max(0.0, self.value / self.total)) if self.total > 0 else 0.0
        eighths = max(1, round(share * width * 8)) if self.value > 0 else 0
        if options.ascii_only:
            yield Text("#" * -(-eighths // 8), style=self.style)
        else:
            partial = _EIGHTHS[eighths % 8] if eighths % 8 else ""
            yield Text("\u2588" * (eighths // 8) + partial, style=self.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(6, self.width), self.width)


@dataclass(frozen=True)
class Timeline:
    """Live bytes over the events of one step as a filled curve; every column shows its highest value.

    Args:
        points: (event number, live bytes), ascending.
        width, height: of the curve in characters; narrower when the console is.
    """

    points: tuple[tuple[int, int], ...]
    width: int = 100
    height: int = 8

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        peak = max(value for _, value in self.points)
        label = format_bytes(peak)
        width = max(10, min(self.width, options.max_width - len(label) - 3))
        columns = self.columns(width)
        axis, floor, corner = ("|", "-", "+") if options.ascii_only else ("\u2502", "\u2500", "\u2514")
        for row in range(self.height, 0, -1):
            line = "".join(self._cell(value, peak, row, options.ascii_only) for value in columns)
            yield Text(f"{label if row == self.height else '':>{len(label)}} {axis}{line}".rstrip(), style="cyan")
        yield Text(f"{'0':>{len(label)}} {corner}{floor * width}")
        yield Text(f"{'':>{len(label)}}  {'start of the step':<{width - 3}}end")

    def columns(self, width: int) -> list[int]:
        """The highest live bytes in each of ``width`` equal stretches of events; a stretch without events holds."""
        first, last = self.points[0][0], self.points[-1][0]
        span = max(1, last - first + 1)
        highest: list[int | None] = [None] * width
        for event, value in self.points:
            column = min(width - 1, (event - first) * width // span)
            highest[column] = max(value, highest[column] or 0)
        filled, held = [], self.points[0][1]
        for top in highest:
            held = held if top is None else top
            filled.append(held)
        return filled

    def _cell(self, value: int, peak: int, row: int, ascii_only: bool) -> str:
        eighths = round(8 * self.height * value / peak) - 8 * (row - 1) if peak else 0
        if ascii_only:
            return "#" if eighths >= 4 else " "
        return _LEVELS[min(8, max(0, eighths))]


def number(value: float | None, *, digits: int = 3) -> str:
    """To so many significant digits; a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def note(text: str) -> Text:
    """A line of explanation below a table."""
    return Text(text, style="dim")


def bullets(title: str, lines: Sequence[str]) -> list[RenderableType]:
    """A heading and its lines; nothing where there are none."""
    if not lines:
        return []
    return [heading(title), *(Padding(Text(f"- {line}"), (0, 0, 0, 2)) for line in lines)]
