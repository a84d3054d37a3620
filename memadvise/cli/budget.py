"""A budget and what is held back from it, as every command takes them."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from memadvise.errors import UsageError
from memadvise.units import format_bytes, parse_bytes

_BUDGET = typer.Option(
    "--budget", metavar="SIZE", help="12GB (12*10^9), 12GiB (12*2^30), or 'device' for what the GPU has free."
)
Budget = Annotated[str, _BUDGET]
OptionalBudget = Annotated[str | None, _BUDGET]
Reserve = Annotated[
    str,
    typer.Option(
        "--reserve", metavar="SIZE", help="Held back from the budget, for the CUDA context and fragmentation: 1GiB, 8%."
    ),
]


def budget_bytes(text: str) -> int:
    """The bytes of ``--budget``; raises UsageError, or EnvironmentProblem for 'device' without one."""
    if text.strip().lower() == "device":
        from memadvise.memory.device import device_free_bytes

        return device_free_bytes()
    if text.strip().startswith("-"):
        raise UsageError(f"a budget cannot be negative: '{text}'", hint="give at least one byte, for example 12GB")
    return parse_bytes(text)


def reserve_bytes(text: str, total: int) -> int:
    """Bytes held back: a size, or a share of the budget such as ``8%``; ``0`` is none."""
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if share:
        held = round(total * float(share.group(1)) / 100)
    else:
        held = 0 if re.fullmatch(r"\s*0+(\.0+)?\s*[A-Za-z]*\s*", text) else parse_bytes(text)
    if held >= total:
        raise UsageError(
            f"the reserve of {format_bytes(held)} leaves nothing of the budget of {format_bytes(total)}",
            hint="give a smaller --reserve, for example 5%",
        )
    return held


def budget_words(budget: str, total: int, reserve: str, held: int) -> str:
    """The budget in the user's own words, with what is held back."""
    words = f"device ({format_bytes(total)} free)" if budget.strip().lower() == "device" else budget.strip()
    return f"{words} less a reserve of {reserve.strip()}" if held else words
