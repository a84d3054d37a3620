"""The one exception tree. Every error says what, where and the way out, and carries its exit code.

Exit codes: 0 ok, 1 finding (over budget, regression, infeasible), 2 usage, configuration or input,
3 environment or internal, 130 Ctrl-C.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """A place in a text file; ``line`` and ``column`` count from 1, ``text`` is the source line."""

    path: str
    line: int
    column: int | None = None
    text: str | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.path, self.line, self.column) if part is not None)

    def excerpt(self) -> list[str]:
        """The source line and, when the column is known, a caret under it; a very long line is cut around the caret."""
        if self.text is None:
            return []
        text, at = self.text, (self.column or 1) - 1
        if len(text) > 160:
            start = max(0, at - 80)
            text, at = text[start : start + 160], at - start
        # Tabs are kept in the padding, so that the caret stands under its character however wide a tab is shown.
        padding = "".join("\t" if char == "\t" else " " for char in text[:at])
        return [text] if self.column is None else [text, f"{padding}^"]


class MemadviseError(Exception):
    """Base of all expected failures.

    Args:
        message: what is wrong, one sentence, no trailing period needed.
        where: the place in a file, when there is one.
        hint: the way out: what to type or change next.
    """

    exit_code = 2

    def __init__(self, message: str, *, where: Mark | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message if self.where is None else f"{self.where}: error: {self.message}"]
        if self.where is not None:
            lines += [f"    {line}" for line in self.where.excerpt()]
        if self.hint is not None:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class UsageError(MemadviseError):
    """A flag, a size or an argument that cannot be read (exit 2)."""


class TargetError(MemadviseError):
    """The target is missing something, or returns the wrong thing (exit 2)."""


class TargetRaised(TargetError):
    """The user's own code raised while it ran (exit 3)."""

    exit_code = 3


class FileFormatError(MemadviseError):
    """A scan, plan or baseline file that is truncated, foreign or too new (exit 2)."""


class PlanError(MemadviseError):
    """One or more mistakes in a plan; all of them are reported at once (exit 2)."""

    def __init__(self, problems: list[MemadviseError], *, limit: int = 20) -> None:
        self.problems = problems
        shown = [str(problem) for problem in problems[:limit]]
        if len(problems) > limit:
            shown.append(f"... and {len(problems) - limit} more")
        super().__init__("\n".join(shown))


class OptimizerError(MemadviseError, ValueError):
    """An option, parameter or state that an optimizer refuses; also a ValueError for plain users of ``optim``."""


class Infeasible(MemadviseError):
    """No plan fits the budget (exit 1)."""

    exit_code = 1


class EnvironmentProblem(MemadviseError):
    """No GPU, no driver, out of memory, a missing extra (exit 3)."""

    exit_code = 3
