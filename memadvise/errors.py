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
        lines = [self.message]
        if self.where is not None:
            lines.append(f"  at {self.where}")
            if self.where.text is not None:
                lines.append(f"    {self.where.text}")
                if self.where.column is not None:
                    lines.append("    " + " " * (self.where.column - 1) + "^")
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
