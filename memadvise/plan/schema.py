"""What a plan is: frozen records without torch. :mod:`load` reads them strictly, :mod:`emit` writes them commented."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from memadvise.errors import Mark, UsageError

PLAN_VERSION = 1
# What switches.weights may say: a form of memadvise.optim.weights, or bf16 (cast, and rounded to nearest).
WEIGHT_FORMS = ("bf16", "stochastic", "ecc8", "ecc16", "int8")


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
    """What changes the step as a whole. The first three cost time, not quality; ``weights`` costs precision.

    ``micro_batches``: the batch is split in that many parts and gradients accumulate (:func:`split_batch`).
    ``checkpoint``: globs of module names whose activations are recomputed in backward (:func:`apply_checkpoint`).
    ``gradient_release``: every parameter is stepped inside backward, and its gradient freed (``create_optimizer``).
    ``weights``: how every parameter is held that can be held so and whose rule says nothing of its own
    (``create_optimizer``, or ``hold_weights`` before it): ``int8`` the matrices; the others in bfloat16, to which
    float32 models are cast: ``stochastic``, ``ecc8``, ``ecc16``, and ``bf16`` rounds to nearest.

    Raises:
        UsageError: out of range, or gradients that are released and accumulated at once.
    """

    micro_batches: int = 1
    checkpoint: tuple[str, ...] = ()
    gradient_release: bool = False
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.micro_batches < 1:
            raise UsageError(f"{self.micro_batches} micro-batches: there is at least one")
        if self.gradient_release and self.micro_batches > 1:
            raise UsageError(
                "gradient release and micro-batches exclude each other: a gradient that is freed inside backward "
                "cannot be added to",
                hint="choose one: gradient_release, or micro_batches with accumulation",
            )
        if self.weights is not None and self.weights not in WEIGHT_FORMS:
            raise UsageError(f"weights '{self.weights}' is none of {', '.join(WEIGHT_FORMS)}")

    def describe(self) -> str:
        """In words: ``checkpointing and 4 micro-batches``; empty where nothing is switched."""
        parts = ["checkpointing"] if self.checkpoint else []
        parts += [f"{self.micro_batches} micro-batches"] if self.micro_batches > 1 else []
        parts += ["gradient release"] if self.gradient_release else []
        parts += [f"{self.weights} weights"] if self.weights else []
        return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}"


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
