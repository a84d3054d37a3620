"""What a recommendation says of itself: what it needs, what it costs, how sure it is, and what was overridden."""

from __future__ import annotations

from collections.abc import Sequence

from memadvise.advise.candidates import CONFIDENCE_MEANS, Confidence
from memadvise.advise.choose import Choice, Chosen
from memadvise.advise.harm import Source
from memadvise.advise.rules import DENSE, broken_rules, codecs_of, is_unknown
from memadvise.advise.weight_forms import WORDS, form_confidence
from memadvise.errors import Infeasible
from memadvise.ledger import MemoryLedger, Scan
from memadvise.optim.step_costs import SOURCE
from memadvise.plan.schema import Plan, Switches
from memadvise.units import format_bytes

NOTHING_BEYOND_8BIT = (
    "8-bit state is enough: nothing to optimise beyond it. On every model measured it trained as AdamW in full does"
)


def stated_confidence(chosen: Sequence[Chosen]) -> Confidence:
    """That of the least sure tensor; one level lower where a score is no measurement of this model."""
    return max((confidence_of(c) for c in chosen), default=Confidence.HIGH)


def plan_confidence(choice: Choice) -> Confidence:
    """:func:`stated_confidence`, and no surer than the form of the weights allows."""
    return max(stated_confidence(choice.chosen), form_confidence(choice.switches.weights))


def confidence_of(choice: Chosen) -> Confidence:
    """How sure the choice for one group is."""
    sure = choice.priced.confidence
    guessed = choice.priced.harm.source in (Source.PROFILE, Source.PRIOR)
    return sure.lowered if guessed and sure is not Confidence.HIGH else sure


def optimizer_time(chosen: Sequence[Chosen]) -> float:
    """The optimizer step of a plan, AdamW's = 1; see :mod:`memadvise.optim.step_costs`."""
    numel = sum(m.numel for c in chosen for m in c.group.members)
    return sum(c.priced.step_time for c in chosen) / max(1, numel)


def explain(scan: Scan, after: MemoryLedger, plan: Plan, budget: int, choice: Choice) -> list[str]:
    """The notes of a plan, the answer first."""
    before, chosen = scan.memory[0], choice.chosen
    over = before.peak_bytes - budget
    compressed = [c for c in chosen if c.priced.setting != DENSE]
    as_it_stands = (
        f"{before.optimizer} as it stands peaks at {format_bytes(before.peak_bytes)} in the {before.peak_phase} phase, "
        + (f"{format_bytes(over)} over the budget" if over > 0 else f"within the budget of {format_bytes(budget)}")
    )
    if not compressed and plan.switches == Switches():
        return [
            f"nothing needs compressing: AdamW in full, run by memadvise, peaks at {format_bytes(after.peak_bytes)} in "
            f"the {after.peak_phase} phase, within the budget of {format_bytes(budget)}",
            as_it_stands,
            *([choice.contest] if choice.contest else []),
        ]
    lines = [as_it_stands]
    narrow = sorted({p.dtype for p in scan.parameters if p.trainable} & {"bfloat16", "float16"})
    if over <= 0 and narrow:
        lines.append(
            f"a plan needs more than that: for {' and '.join(narrow)} parameters memadvise keeps state in float32, "
            "torch.optim.AdamW in their own precision"
        )
    lines.append(
        f"the plan peaks at {format_bytes(after.peak_bytes)} in the {after.peak_phase} phase; optimizer state "
        f"{format_bytes(before.state_bytes)} -> {format_bytes(after.state_bytes)}"
    )
    sure = plan_confidence(choice)
    if sure > stated_confidence(chosen):
        lines.append(f"confidence: {sure.words}, for the form of the weights was not measured on this model; verify it")
    elif sure is Confidence.LOW and all(c.priced.tier == 1 for c in chosen):
        why = "hard rules were set aside" if _overridden(chosen) else "scores of coarse settings were not measured"
        lines.append(f"confidence: {sure.words} ({why})")
    else:
        lines.append(f"confidence: {sure.words} ({CONFIDENCE_MEANS[sure]})" + _unmeasured(chosen))
    if compressed and choice.level is Confidence.HIGH and sure is Confidence.HIGH:
        lines.append(NOTHING_BEYOND_8BIT)
    if sure is Confidence.LOW:
        lines.append(_low(choice))
    lines += [choice.contest] if choice.contest else []
    lines += _overridden(chosen) + _unknown(chosen)
    lines.append(f"an optimizer step takes about {optimizer_time(chosen):.1f} times AdamW's ({SOURCE})")
    return lines + _switches(scan, plan.switches)


def _unmeasured(chosen: Sequence[Chosen]) -> str:
    sure = stated_confidence(chosen)
    if sure is max((c.priced.confidence for c in chosen), default=sure):
        return ""
    sources = {c.priced.harm.source for c in chosen if confidence_of(c) is sure}
    if Source.PRIOR in sources:
        return "; one level lower, for some scores are priors: they were not measured on this model"
    return "; one level lower, for scores are a profile's, of other models" if Source.PROFILE in sources else ""


def _low(choice: Choice) -> str:
    count = sum(len(c.group.members) for c in choice.chosen if c.priced.tier == 2)
    verify = "run: memadvise verify PLAN TARGET --steps 300"
    if not count:
        return verify
    goes = "tensors go" if count > 1 else "tensor goes"
    if choice.contest:
        return f"{count} {goes} without AdamW's momentum; {verify}"
    if choice.level is not Confidence.LOW:  # the user's pins
        return f"{count} pinned {goes} without AdamW's momentum; {verify}"
    fewest = "" if choice.smallest else ", the fewest that make room"
    return f"no plan that keeps the momentum fits; {count} {goes} without{fewest}; {verify}"


def _overridden(chosen: Sequence[Chosen]) -> list[str]:
    return [
        f"against the rule '{rule.name}', as you asked: {c.group.label} under {c.priced.setting.key}; {rule.evidence}"
        for c in chosen
        for rule in broken_rules(c.group.members[0], c.priced.setting)
    ]


def _unknown(chosen: Sequence[Chosen]) -> list[str]:
    lost = [c for c in chosen if c.priced.setting != DENSE and is_unknown(c.group.members[0])]
    if not lost:
        return []
    names = ", ".join(c.group.label for c in lost)
    return [f"what these tensors are used for is not known, so they got nothing bolder than means of rows: {names}"]


def _switches(scan: Scan, switches: Switches) -> list[str]:
    lines = []
    if switches.weights:
        lines.append(f"{WORDS[switches.weights]} (switches.weights: {switches.weights}); create_optimizer does it")
    if switches.checkpoint:
        lines.append(
            f"activations of {', '.join(switches.checkpoint)} are recomputed (checkpointing): about one more "
            "forward pass a step, the same gradients; call memadvise.apply_checkpoint(model, plan.switches.checkpoint)"
        )
    if switches.gradient_release:
        lines.append(
            "every parameter is stepped inside backward and its gradient freed (gradient release), the same weights "
            "bit for bit; create_optimizer does it, and clipping by global norm cannot go with it"
        )
    if switches.micro_batches > 1:
        checked = "checked" if scan.probe else "not checked without a probe"
        lines.append(
            f"each batch runs as {switches.micro_batches} micro-batches with accumulated gradients, the same "
            f"gradient where the loss is a mean over samples ({checked}); "
            "use memadvise.split_batch(batch, plan.switches.micro_batches)"
        )
    return lines


def infeasible(before: MemoryLedger, smallest: MemoryLedger, choice: Choice, budget: int) -> Infeasible:
    """Name the smallest peak that the advisor's candidates reach, what dominates it, and the way out."""
    switches = choice.switches
    largest = sorted(smallest.by_category.items(), key=lambda item: -item[1])[:3]
    how = [f"checkpointing {', '.join(switches.checkpoint)}"] if switches.checkpoint else []
    how += [f"{switches.micro_batches} micro-batches"] if switches.micro_batches > 1 else []
    how += ["gradient release"] if switches.gradient_release else []
    how += [f"weights in {switches.weights}"] if switches.weights else []
    methods = sorted({o.setting.method + _bits(o.setting) for c in choice.chosen for o in c.others})
    hint = f"raise the budget to {smallest.peak_bytes} bytes or more, or use a smaller batch or model"
    if before.peak_bytes <= budget:  # its state has the parameters' own, narrower dtype
        hint = (
            f"{before.optimizer} as it stands peaks at {format_bytes(before.peak_bytes)} and fits: train with that, or "
            f"raise the budget to {smallest.peak_bytes} bytes or more"
        )
    return Infeasible(
        f"no plan fits {format_bytes(budget)}: the smallest reachable peak is {format_bytes(smallest.peak_bytes)}"
        f" ({' and '.join(how) or 'no switch helps'}; candidates: {', '.join(methods)}), in the "
        f"{smallest.peak_phase} phase, dominated by "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in largest),
        hint=hint,
    )


def _bits(setting: object) -> str:
    codecs = sorted(set(codecs_of(setting).values()))  # type: ignore[arg-type]
    return f" {'/'.join(codecs)}" if codecs else ""
