"""What any method can be combined with, per parameter: codecs for its moments, caution, and a form for the weights.

These options stand beside a method's own, in a plan as in a class's arguments::

    - {match: "*.weight", method: slimadam, axes: [1], first_moment: int8, cautious: true}

Combinations that would do nothing, or harm, are refused with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypedDict

from memadvise.optim.codecs.table import CODECS
from memadvise.optim.method import Method, OptionProblem, Shape, StateSpec, is_int
from memadvise.optim.weights import FORMS

FULL = "full"
ROUNDINGS = ("stochastic", "nearest")
CAUTION = ("support", "paper", "official")


class Common(TypedDict, total=False):
    """The arguments every optimizer class takes beside its method's own; see :class:`Compose`."""

    first_moment: str
    second_moment: str
    rounding: str
    cautious: bool | str
    cautious_decay: bool
    weights: str
    seed: int


@dataclass(frozen=True)
class Compose:
    """The options that stand beside a method's own.

    Args:
        first_moment, second_moment: "full" (float32), or the name of a codec.
        rounding: of the codecs' codes: "stochastic" (right on average, so that slow averages move) or "nearest".
        cautious: drop the coordinates in which the update disagrees with the gradient (arXiv 2411.16085) and scale up
            the rest: by the share kept of those that had both ("support", also for True), by N / (kept + 1) ("paper"),
            or by 1 / max(mean kept, 1e-3) ("official", the authors' current code).
        cautious_decay: decay only where the update moves towards zero as well (arXiv 2510.12402).
        weights: how new weights are written back; see :mod:`memadvise.optim.weights`.
        seed: of all random numbers; they also depend on the parameter's name and the step.
    """

    first_moment: str = FULL
    second_moment: str = FULL
    rounding: str = "stochastic"
    cautious: bool | str = False
    cautious_decay: bool = False
    weights: str = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        for option, moment in (("first_moment", "first"), ("second_moment", "second")):
            names = [FULL, *(name for name, codec in CODECS.items() if moment in codec.moments)]
            value = getattr(self, option)
            if value not in names:
                raise OptionProblem(option, f"{option} '{value}' is none of {', '.join(names)}")
        if self.rounding not in ROUNDINGS:
            raise OptionProblem("rounding", f"rounding '{self.rounding}' is none of {', '.join(ROUNDINGS)}")
        if not isinstance(self.cautious, bool) and self.cautious not in CAUTION:
            raise OptionProblem(
                "cautious", f"cautious should be true, false or one of {', '.join(CAUTION)}, found {self.cautious!r}"
            )
        if not self.codecs:  # nothing to round: settings that mean the same are the same
            object.__setattr__(self, "rounding", "stochastic")
        if self.cautious is True:
            object.__setattr__(self, "cautious", "support")
        if not isinstance(self.cautious_decay, bool):
            raise OptionProblem(
                "cautious_decay", f"cautious_decay should be true or false, found {self.cautious_decay!r}"
            )
        if self.weights not in FORMS:
            raise OptionProblem("weights", f"weights '{self.weights}' is none of {', '.join(FORMS)}")
        if not is_int(self.seed):
            raise OptionProblem("seed", f"seed should be an integer, found {self.seed!r}")

    @cached_property
    def plain(self) -> bool:
        """Whether nothing is combined: the method alone."""
        return replace(self, seed=0, rounding="stochastic") == PLAIN

    @property
    def codecs(self) -> dict[str, str]:
        """Moment -> codec, where it is held in fewer bits."""
        pairs = {"first": self.first_moment, "second": self.second_moment}
        return {moment: name for moment, name in pairs.items() if name != FULL}

    def without_codecs(self) -> Compose:
        """The same with both moments in full."""
        return replace(self, first_moment=FULL, second_moment=FULL)


PLAIN = Compose()
NAMES = tuple(f.name for f in fields(Compose))
_BYTES = "bf16 (2), int8 (1.06, companded), dynamic8 (1.02, as 8-bit Adam), int4 (0.53)"
HELP: dict[str, str] = {
    "first_moment": f"{FULL} (4 bytes a value), or {_BYTES}",
    "second_moment": f"{FULL} (4 bytes a value), or {_BYTES}",
    "rounding": "how codecs round: stochastic or nearest",
    "cautious": "true: drop what disagrees with the gradient's sign; also support (the same), paper, official",
    "cautious_decay": "true: decay weights only where the update shrinks them, too",
    "weights": "nearest; for bfloat16 and float16 stochastic (0 bytes more; bfloat16 only), ecc8 (1), ecc16 (2); int8 "
    "(weights of 1.02 bytes; see quantize_weights)",
    "seed": "of stochastic rounding and random projections",
}


def check(method: Method, options: Any, compose: Compose, specs: dict[str, StateSpec] | None) -> None:
    """Raise :class:`OptionProblem` for a combination that does nothing or is unsound; ``specs``: the method's state."""
    if compose.cautious and not method.momentum(options):
        raise OptionProblem(
            "cautious",
            f"cautious would do nothing: the update of {method.name} always has the gradient's sign here",
            "it needs a first moment: remove it, or use a method (or option) with momentum",
        )
    if compose.second_moment == "bf16" and compose.rounding == "nearest":
        raise OptionProblem(
            "rounding",
            "a second moment in bfloat16 rounded to nearest freezes: with beta2 = 0.999 a step of its average is below "
            "half a unit in the last place",
            "leave rounding out (stochastic), or use another second_moment",
        )
    if specs is not None:
        moments = {spec.moment for spec in specs.values() if spec.moment}
        for moment, name in compose.codecs.items():
            if moment not in moments:
                raise OptionProblem(
                    f"{moment}_moment",
                    f"{method.name} keeps no {moment} moment here that {name} could shrink",
                    f"remove {moment}_moment",
                )
    method.check_composition(options, compose)


def parse(values: dict[str, Any]) -> Compose:
    """The common options among ``values``. Raises OptionProblem."""
    return Compose(**{name: value for name, value in values.items() if name in NAMES})


def shape_needs_no_codec(shape: Shape) -> bool:
    """Vectors and scalars keep their moments in full when a whole model gets one setting: they cost nothing."""
    return len(shape) < 2
