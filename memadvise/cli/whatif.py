"""The flags of what-ifs: one way to run the step, to be traced beside the target as it stands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memadvise.errors import UsageError
from memadvise.plan.schema import WEIGHT_FORMS, Switches

if TYPE_CHECKING:
    from memadvise.whatif import WhatIf

WeightForm = StrEnum("WeightForm", {form: form for form in WEIGHT_FORMS})  # type: ignore[misc]

MicroBatches = Annotated[
    int | None, typer.Option("--micro-batches", min=1, help="What if the batch ran in so many accumulated parts.")
]
Recompute = Annotated[
    list[str] | None,
    typer.Option(
        "--recompute", metavar="PATTERN", help="What if these modules were recomputed; 'auto': repeated blocks."
    ),
]
Fused = Annotated[bool, typer.Option("--fused", help="What if with torch.optim.AdamW(fused=True).")]
Foreach = Annotated[bool, typer.Option("--foreach", help="What if with torch.optim.AdamW(foreach=True).")]
Release = Annotated[bool, typer.Option("--release", help="What if every parameter were stepped inside backward.")]
Weights = Annotated[WeightForm | None, typer.Option("--weights", help="What if weights were held in this form.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="What if with this plan.")]


def what_if(
    *,
    micro_batches: int | None,
    recompute: list[str] | None,
    fused: bool,
    foreach: bool,
    release: bool,
    weights: str | None,
    plan: Path | None,
) -> WhatIf | None:
    """What the flags ask for; None if they ask for nothing. The plan's own switches hold where no flag speaks.

    Raises:
        UsageError: flags that exclude each other. PlanError, FileFormatError: of the plan file.
    """
    if not any((micro_batches, recompute, fused, foreach, release, weights, plan)):
        return None
    if fused and foreach:
        raise UsageError("--fused and --foreach exclude each other", hint="ask for one of them")
    from memadvise.plan.load import load_plan
    from memadvise.whatif import WhatIf

    loaded = load_plan(plan) if plan is not None else None
    own = loaded.switches if loaded is not None else Switches()
    switches = Switches(
        micro_batches=micro_batches or own.micro_batches,
        checkpoint=tuple(recompute or own.checkpoint),
        gradient_release=release or own.gradient_release,
        weights=str(weights) if weights else own.weights,
    )
    return WhatIf(switches, loaded, "fused" if fused else "foreach" if foreach else None)
