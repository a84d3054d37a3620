"""The ladder: the surest kind of plan first, harm of two tiers never on one scale."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memadvise.advise.candidates import Confidence, Group
from memadvise.advise.choose import Choice, Ladder, Priced, Row
from memadvise.advise.harm import Harm, Source
from memadvise.ledger import MemoryLedger, Parameter, PhasePeak
from memadvise.plan.schema import Setting

FIXED = 1000
OPTIONS = {  # per tensor: bytes, harm, tier, confidence, time
    "adamw": (800, 0.0, 1, Confidence.HIGH, 1.0),
    "adamw8": (200, 0.1, 1, Confidence.HIGH, 3.5),
    "rows": (110, 5.0, 1, Confidence.FAIRLY_HIGH, 2.0),
    "factored": (120, 4.0, 1, Confidence.FAIRLY_HIGH, 3.0),
    "means4": (60, 3.0, 1, Confidence.MEDIUM, 20.0),
    "none": (1, 0.01, 2, Confidence.LOW, 1.0),
}
SETTINGS = {name: Setting("adamw", {"seed": i}) for i, name in enumerate(OPTIONS)}
NAMES = {setting.key: name for name, setting in SETTINGS.items()}


def ledger(checkpoint: bool = False, fixed: int = FIXED) -> MemoryLedger:
    kinds = {"weights": fixed, "optimizer_state": 4000}
    return MemoryLedger(
        source="estimate", device="cpu", optimizer="memadvise adamw", micro_batches=1,
        checkpoint=("h.*",) if checkpoint else (), peak_bytes=fixed + 4000, peak_phase="step", state_bytes=4000,
        by_category=kinds, by_module={}, phases=(PhasePeak("step", fixed + 4000, kinds),), live_at_peak=(),
        timeline=(), num_events=0,
    )  # fmt: skip


# Displacement of each tensor in tier 2: the second of "up" moves least, "head" most.
DISPLACEMENT = {"up.0": 3.0, "up.1": 1.0, "up.2": 2.0, "head": 9.0}


def price(group: Group) -> tuple[Priced, ...]:
    count = len(group.members)
    rows = []
    for name, (size, harm, tier, sure, time) in OPTIONS.items():
        value = sum(DISPLACEMENT[m.name] for m in group.members) if tier == 2 else harm * count
        rows.append(Priced(SETTINGS[name], size * count, Harm(value, Source.MEASURED, ""), tier, sure, time * count))
    return tuple(rows)


def group(role: str, *names: str) -> Group:
    members = tuple(Parameter(n, (8, 8), "float32", 256, True, role, n, "Linear", (1,), (0,)) for n in names)
    return Group(role, (8, 8), members, names, tuple(SETTINGS.values()))


GROUPS = (group("mlp_up", "up.0", "up.1", "up.2"), group("head", "head"))


def ladder(objective: str = "quality", *ledgers: MemoryLedger) -> Ladder:
    return Ladder(ledgers or (ledger(),), [Row(g, price(g)) for g in GROUPS], price, objective)


def settings(choice: Choice | None) -> dict[str, str]:
    assert choice is not None
    return {m.name: NAMES[c.priced.setting.key] for c in choice.chosen for m in c.group.members}


def best(state: int, objective: str = "quality", *ledgers: MemoryLedger) -> Choice:
    rungs = ladder(objective, *ledgers)
    choice = rungs.best(FIXED + state, {}) or rungs.best(FIXED + state, {}, momentum=False)
    assert choice is not None
    assert choice.num_bytes <= state
    return choice


def test_full_state_then_8_bit_where_it_must_be() -> None:
    assert set(settings(best(3200)).values()) == {"adamw"}
    some = best(3199)
    assert settings(some)["head"] == "adamw8"
    assert settings(some)["up.0"] == "adamw"
    assert some.level is Confidence.HIGH
    assert set(settings(best(800)).values()) == {"adamw8"}


def test_8_bit_comes_before_a_switch_and_a_switch_before_quality() -> None:
    cheaper = ledger(checkpoint=True, fixed=FIXED - 500)
    assert best(800, "quality", ledger(), cheaper).switches.checkpoint == ()
    choice = ladder("quality", ledger(), cheaper).best(FIXED + 799, {})
    assert choice is not None
    assert choice.switches.checkpoint == ("h.*",)
    assert choice.level is Confidence.HIGH


def test_a_surer_level_wins_over_a_smaller_score() -> None:
    choice = best(799)
    assert choice.level is Confidence.FAIRLY_HIGH
    assert "means4" not in settings(choice).values()  # although its score is smaller
    assert settings(choice)["head"] == "factored"
    tight = best(4 * 110 - 1)
    assert tight.level is Confidence.MEDIUM


def test_the_fewest_tensors_lose_their_momentum_and_those_that_move_least() -> None:
    one = best(4 * 60 - 1)
    assert one.level is Confidence.LOW
    names = settings(one)
    assert [n for n, s in names.items() if s == "none"] == ["up.1"]  # of the cheapest displacement, not the group
    assert "none" not in {s for n, s in names.items() if n != "up.1"}
    two = settings(best(2 * 60 + 2))
    assert {n for n, s in two.items() if s == "none"} == {"up.1", "up.2"}
    three = settings(best(60 + 3))
    assert {n for n, s in three.items() if s == "none"} == {"up.0", "up.1", "up.2"}
    assert set(settings(best(4)).values()) == {"none"}
    assert ladder().best(FIXED + 3, {}, momentum=False) is None


def test_tier_one_makes_use_of_the_room_that_tier_two_leaves() -> None:
    names = settings(best(60 * 4 - 1))
    kept = sorted(s for n, s in names.items() if n != "up.1")
    assert kept == ["means4", "means4", "means4"]
    roomier = settings(best(60 * 3 + 1))
    assert sorted(roomier.values()) == ["means4", "means4", "means4", "none"]


def test_speed_asks_for_time_within_the_level() -> None:
    quality, speed = best(4 * 120), best(4 * 120, "speed")
    assert quality.level is speed.level is Confidence.FAIRLY_HIGH
    assert set(settings(quality).values()) == {"factored"}
    assert set(settings(speed).values()) == {"rows"}


def test_the_slow_codec_is_the_last_of_the_8_bit_ones() -> None:
    slow = Setting("adamw", {"first_moment": "dynamic8", "second_moment": "dynamic8"})

    def priced(g: Group) -> tuple[Priced, ...]:
        count = len(g.members)
        options = [o for o in price(g) if NAMES[o.setting.key] in ("adamw", "adamw8")]
        extra = Priced(slow, 190 * count, Harm(0.0001, Source.MEASURED, ""), 1, Confidence.HIGH, 40.0 * count)
        return (*options, extra)

    rows = [Row(g, priced(g)) for g in GROUPS]
    quick = Ladder([ledger()], rows, priced).best(FIXED + 800, {})
    assert quick is not None
    assert slow.key not in {c.priced.setting.key for c in quick.chosen}
    tight = Ladder([ledger()], rows, priced).best(FIXED + 799, {})
    assert tight is not None
    assert slow.key in {c.priced.setting.key for c in tight.chosen}


def test_a_pin_is_kept_at_every_level() -> None:
    pinned = [Row(GROUPS[0], price(GROUPS[0])), Row(GROUPS[1], (price(GROUPS[1])[-1],))]
    choice = Ladder([ledger()], pinned, price).best(FIXED + 3200, {})
    assert settings(choice) == {"up.0": "adamw", "up.1": "adamw", "up.2": "adamw", "head": "none"}
    assert choice is not None
    assert choice.level is Confidence.HIGH


@pytest.mark.parametrize("state", [3200, 799, 239, 63])
def test_for_state_alone(state: int) -> None:
    within = ladder().within(state)
    assert within is not None
    assert within.num_bytes <= state
    assert settings(within) == settings(best(state))


def test_what_traces_showed_is_taken_off_the_room() -> None:
    lost = ladder().best(FIXED + 3200, {0: 1})
    assert lost is not None
    assert lost.num_bytes <= 3199
    assert replace(lost, note="") != replace(best(3200), note="")
