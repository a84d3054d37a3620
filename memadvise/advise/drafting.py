"""From choices to a plan: rules with their reasons, patterns that match no parameter of another decision."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from memadvise.advise.choose import Chosen, Priced
from memadvise.advise.rules import DENSE, broken_rules
from memadvise.advise.sizes import StateSizes
from memadvise.ledger import Scan
from memadvise.names import glob_escape, matches, shared_patterns
from memadvise.plan.schema import ModelShape, Plan, Rule, Switches
from memadvise.units import format_bytes

_RUNNERS_UP = 2


def draft_plan(
    scan: Scan,
    chosen: Sequence[Chosen],
    switches: Switches,
    budget: int | None,
    sizes: StateSizes,
    pinned: Collection[str],
) -> Plan:
    """Rules for every parameter: one a pattern where the pattern is unambiguous, ``**`` for what stays dense.

    Args:
        scan: the model.
        chosen: what was decided for each group.
        switches: of the plan.
        budget: in bytes, for the record.
        sizes: state bytes.
        pinned: names of the parameters that the user decided for.
    """
    decision_of = {m.name: (c.priced.setting.key, c.priced.harm.lr_factor) for c in chosen for m in c.group.members}
    rules: list[Rule] = []
    for choice in chosen:
        setting, group = choice.priced.setting, choice.group
        if is_default(choice):
            continue
        saved = sizes.of(group, DENSE) - sizes.of(group, setting) + sizes.weights_saved(group, setting)
        text = f"{group.role} {list(group.shape)} x {len(group.members)}: saves {format_bytes(saved)}; "
        text += "; ".join(reasons(choice, pinned))
        for match in matching((m.name for m in group.members), decision_of):
            rules.append(
                Rule(match, setting.method, dict(setting.options), reason=text, lr_factor=choice.priced.harm.lr_factor)
            )
            text = "as above"
    if any(is_default(c) for c in chosen):
        rest = "everything else keeps both moments in full" if rules else "every parameter keeps both moments in full"
        rules.append(Rule("**", DENSE.method, reason=rest))
    trainable = [p for p in scan.parameters if p.trainable]
    shape_of = {p.name: p.shape for p in trainable}
    shapes = {
        pattern: shape
        for shape in dict.fromkeys(shape_of.values())
        for pattern in matching((name for name, s in shape_of.items() if s == shape), shape_of)
    }
    return Plan(
        rules=tuple(rules),
        switches=switches,
        model=ModelShape(scan.fingerprint, sum(p.numel for p in trainable), shapes),
        budget_bytes=budget,
        predicted_state_bytes=sum(sizes.of(c.group, c.priced.setting) for c in chosen),
        device=scan.memory[0].device,
    )


def is_default(choice: Chosen) -> bool:
    """AdamW in full at the optimizer's own learning rate."""
    return choice.priced.setting == DENSE and choice.priced.harm.lr_factor == 1


def matching(names: Iterable[str], value_of: Mapping[str, object]) -> list[str]:
    """Patterns for ``names``, which all have one value, that match no parameter of another value."""
    patterns: list[str] = []
    for pattern, members in shared_patterns(names).items():
        pure = len({value for name, value in value_of.items() if matches(pattern, name)}) == 1
        patterns += [pattern] if pure else [glob_escape(name) for name in members]
    return patterns


def reasons(choice: Chosen, pinned: Collection[str]) -> list[str]:
    """Why this setting: its score in words, the user's hand, broken rules, runners-up."""
    lines = ["pinned by hand"] if choice.group.members[0].name in pinned else []
    lines.append(choice.priced.harm.reason)
    for rule in broken_rules(choice.group.members[0], choice.priced.setting):
        lines.append(f"AGAINST THE RULE '{rule.name}' ({rule.text}): {rule.evidence}")
    if others := runners_up(choice):
        lines.append(f"next: {', '.join(others)}")
    return lines


def runners_up(choice: Chosen) -> list[str]:
    """The settings of least harm among those of the same tier that would have been as small, worse by how much."""
    picked = choice.priced
    as_small = [
        o for o in choice.others if o.tier == picked.tier and o.num_bytes <= picked.num_bytes and o is not picked
    ]
    if picked.setting == DENSE:
        return []
    as_small = [o for o in as_small if o.setting != picked.setting]
    as_small.sort(key=lambda o: (o.harm.value, o.num_bytes))
    return [f"{o.setting.key} ({_worse(o, picked)})" for o in as_small[:_RUNNERS_UP]]


def _worse(other: Priced, picked: Priced) -> str:
    if not (other.harm.measured and picked.harm.measured):
        return "not measured" if not other.harm.measured else "measured, this one not"
    if picked.harm.value <= 0:
        return "more error" if other.harm.value > 0 else "no difference known"
    ratio = other.harm.value / picked.harm.value
    return f"{ratio:.2g} x the error" if ratio < 100 else "over 100 x the error"
