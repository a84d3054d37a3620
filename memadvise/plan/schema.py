"""What a plan is: frozen records without torch. :mod:`load` reads them strictly, :mod:`emit` writes them commented."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from memadvise.errors import Mark

PLAN_VERSION = 1


@dataclass(frozen=True)
class Setting:
    """One method with options, as the engine executes it for a parameter and the advisor weighs it."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A stable text for tables and JSON: ``adamw``, ``slimadam(axes=[1])``; options in sorted order."""
        inner = ", ".join(f"{name}={_plain(value)}" for name, value in sorted(self.options.items()))
        return f"{self.method}({inner})" if inner else self.method


def _plain(value: Any) -> str:
    return f"[{', '.join(_plain(v) for v in value)}]" if isinstance(value, list | tuple) else str(value)


@dataclass(frozen=True)
class Rule:
    """``match`` -> ``method`` with ``options``; the first rule that matches a parameter decides.

    Options are the method's own (already of Python types); ``marks`` maps ``"match"``, ``"method"``, ``"lr_factor"``
    and each option to its place in the file, so that later layers can point at it. ``reason`` is written as a comment.
    ``lr_factor`` times the optimizer's learning rate is that of the parameters which the rule decides.
    """

    match: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    reason: str = field(default="", compare=False)
    marks: dict[str, Mark] = field(default_factory=dict, compare=False, repr=False)
    lr_factor: float = 1.0


@dataclass(frozen=True)
class Switches:
    """What changes the step as a whole and costs time, not quality.

    ``micro_batches``: the batch is split in that many parts and gradients accumulate.
    ``checkpoint``: globs of module names whose activations are recomputed in the backward pass.
    """

    micro_batches: int = 1
    checkpoint: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelShape:
    """The model a plan was made for: a fingerprint and the shapes behind it (patterns with ``*`` for numbers)."""

    fingerprint: str
    num_parameters: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A whole plan file; ``marks`` maps its keys to their places, when it was read from one."""

    rules: tuple[Rule, ...]
    switches: Switches = Switches()
    model: ModelShape | None = None
    budget_bytes: int | None = None
    predicted_state_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    device: str | None = None
    version: int = PLAN_VERSION
    path: str | None = field(default=None, compare=False)
    marks: dict[str, Mark] = field(default_factory=dict, compare=False, repr=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
