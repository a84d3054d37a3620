"""The writer: what it writes reads back equal, whatever the strings; reasons are comments; edits are noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from memadvise.plan.emit import emit_plan, is_unedited
from memadvise.plan.load import load_plan, parse_plan
from memadvise.plan.schema import WEIGHT_FORMS, ModelShape, Plan, Rule, Switches

NASTY = [
    "*",
    "**",
    "*.w",
    "&a",
    "!x",
    "a: b",
    "- a",
    "#",
    "a #b",
    "no",
    "1",
    "1e-3",
    "null",
    "~",
    "",
    " ",
    "'",
    '"',
    "\\",
]
NASTY += [
    "\n",
    "\r",
    "\t",
    "\x85",
    "\u2028",
    "\ufeff",
    "\x00",
    "{a}",
    "[a",
    "%",
    "@",
    "`",
    "? a",
    "| a",
    "---",
    "\U0001f600",
    "y",
]
text = st.one_of(st.sampled_from(NASTY), st.text(max_size=12))
pattern = text.filter(lambda t: t != "" and not t.startswith("re:")) | st.just("re:h\\.[0-9]+\\.w")
scalar = st.one_of(
    st.integers(-(10**18), 10**18), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none(), text
)
value = st.recursive(scalar, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
key = text.filter(lambda t: t not in ("match", "method", "lr_factor") and len(t) < 60)
rule = st.builds(
    Rule,
    match=pattern,
    method=text.filter(bool),
    options=st.dictionaries(key, value, max_size=3),
    reason=st.text(max_size=30),
    lr_factor=st.just(1.0) | st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)
size = st.integers(1, 10**15)
plans = st.builds(
    Plan,
    rules=st.lists(rule, min_size=1, max_size=4).map(tuple),
    switches=st.builds(
        lambda parts, checkpoint, release, weights: Switches(parts, checkpoint, release and parts == 1, weights),
        st.integers(1, 64),
        st.lists(text, max_size=2).map(tuple),
        st.booleans(),
        st.none() | st.sampled_from(WEIGHT_FORMS),
    ),
    model=st.none()
    | st.builds(
        ModelShape,
        fingerprint=text,
        num_parameters=st.integers(0, 10**6),
        shapes=st.dictionaries(text, st.lists(st.integers(0, 10**6), max_size=4).map(tuple), max_size=3),
    ),
    budget_bytes=st.none() | size,
    predicted_state_bytes=st.none() | size,
    predicted_peak_bytes=st.none() | size,
    device=st.none() | text,
    notes=st.lists(st.text(max_size=30), max_size=2).map(tuple),
)


def readable(plan: Plan) -> bool:
    """Patterns with brackets may be no valid set, which the reader refuses: not a matter of writing."""
    import re

    from memadvise.names import pattern_regex

    try:
        for item in plan.rules:
            pattern_regex(item.match)
    except re.error:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(plans.filter(readable))
def test_what_is_written_reads_back_equal(plan: Plan) -> None:
    written = emit_plan(plan, command="memadvise recommend --budget '12 GB'", budget="12 GB")
    written.encode("utf-8")
    back = parse_plan(written)
    assert back == plan
    assert [type(v) for r in back.rules for v in r.options.values()] == [
        type(v) for r in plan.rules for v in r.options.values()
    ]


def sample() -> Plan:
    return Plan(
        rules=(
            Rule(
                "transformer.h.*.attn.c_attn.weight",
                "slimadam",
                {"axes": [1]},
                reason="SNR 12.4 along fan_in in 12 of 12 tensors",
            ),
            Rule("lm_head.weight", "sgd", {"momentum": 1e-3}, reason="pinned\nby hand"),
            Rule("**", "adamw"),
        ),
        switches=Switches(2, ("transformer.h.*",)),
        model=ModelShape("sha256:abc", 3, {"transformer.h.*.attn.c_attn.weight": (768, 2304), "scale": ()}),
        budget_bytes=12 * 10**9,
        predicted_state_bytes=1_000_000,
        predicted_peak_bytes=11 * 10**9,
        device="cuda",
        notes=("Optimal: no other choice within the budget is expected to do less harm.",),
    )


def test_the_text_people_read(golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memadvise.__version__", "0.0.0")
    golden("plan.yaml", emit_plan(sample(), command="memadvise recommend --budget 12GB", budget="12GB"))


def test_other_yaml_readers_see_the_same() -> None:
    loaded = yaml.safe_load(emit_plan(sample()))
    assert loaded["rules"][1] == {"match": "lm_head.weight", "method": "sgd", "momentum": 0.001}
    assert loaded["model"]["shapes"]["scale"] == []


def test_a_reason_cannot_break_out_of_its_comment() -> None:
    for char in ("\n", "\r", "\x85", "\u2028", "\u2029", "\r\n"):
        plan = Plan(rules=(Rule("a", "adamw", reason=f"x{char}  - match: evil"),), notes=(f"y{char}evil: 1",))
        assert parse_plan(emit_plan(plan)) == plan


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), {"a": 1}, object(), [b"x"]])
def test_values_a_plan_cannot_hold_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="a plan cannot hold"):
        emit_plan(Plan(rules=(Rule("a", "adamw", {"x": bad}),)))
    with pytest.raises(ValueError, match="cannot be called 'match'"):
        emit_plan(Plan(rules=(Rule("a", "adamw", {"match": 1}),)))


def test_edits_by_hand_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "memadvise.yaml"
    assert not is_unedited(path)
    written = emit_plan(sample())
    path.write_text(written, encoding="utf-8")
    assert is_unedited(path)
    assert load_plan(path) == sample()
    path.write_bytes(written.replace("\n", "\r\n").encode())
    assert is_unedited(path), "another line end is no edit"
    for edited in (
        written.replace("slimadam", "adamw"),
        written + "\n",
        written + "# mine\n",
        written.rpartition("# memadvise-digest")[0],
        "version: 1\n",
        "",
    ):
        path.write_text(edited, encoding="utf-8")
        assert not is_unedited(path), edited[-60:]
    path.write_bytes(b"\xff\xfe")
    assert not is_unedited(path)
