"""Narrower weights as a way to make room: what each form costs, traced only when everything surer was too large."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from memadvise.advise.candidates import Confidence
from memadvise.advise.choose import Choice, Ladder, fixed_peak_bytes
from memadvise.ledger import MemoryLedger, Parameter

# The most precise first: bfloat16 with an error-correction byte, with stochastic rounding, then int8 matrices.
_FORMS = {"ecc8": Confidence.MEDIUM, "stochastic": Confidence.MEDIUM, "int8": Confidence.LOW}
WORDS = {
    "ecc8": "weights are held in bfloat16 with an error-correction byte",
    "stochastic": "weights are held in bfloat16 and rounded stochastically",
    "int8": "weight matrices are held in int8 groups and rounded stochastically",
}


@dataclass(frozen=True)
class NarrowWeights:
    """A ladder under one form of weights; ``extra_bytes``: state that the form itself keeps, whatever the method."""

    ladder: Ladder
    extra_bytes: int

    def arithmetic_peak(self, choice: Choice) -> int:
        return fixed_peak_bytes(choice.ledger) + self.extra_bytes + choice.num_bytes


def form_confidence(form: str | None) -> Confidence:
    """How sure a plan can be at most under a form of the weights."""
    return Confidence.HIGH if form is None else _FORMS.get(form, Confidence.LOW)


def weight_ladders(
    ladder: Ladder,
    parameters: Sequence[Parameter],
    dense_bytes: int,
    trace: Callable[[Choice], MemoryLedger],
    forbidden: Collection[str],
) -> Iterator[NarrowWeights]:
    """One ladder for each form that takes bytes off these weights, under the switches that leave the most room.

    Args:
        ladder: without such a form.
        parameters: of the model.
        dense_bytes: of AdamW's state in full.
        trace: of AdamW in full under the switches of a choice.
        forbidden: forms not to use.
    """
    wide = any(p.trainable and p.dtype == "float32" for p in parameters)
    dense = ladder.dense()
    for form in _FORMS:
        if form in forbidden or (form != "int8" and not wide):
            continue
        ledger = trace(replace(dense, switches=replace(dense.switches, weights=form)))
        narrow = replace(ledger, weights=form)
        if fixed_peak_bytes(ledger) < fixed_peak_bytes(dense.ledger):
            yield NarrowWeights(replace_ledgers(ladder, narrow), max(0, ledger.state_bytes - dense_bytes))


def replace_ledgers(ladder: Ladder, ledger: MemoryLedger) -> Ladder:
    """The same rows under one ledger."""
    return Ladder([ledger], ladder.rows, ladder.price, ladder.objective)
