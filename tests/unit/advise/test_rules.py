"""Hard rules: what they forbid, and that each can be set aside."""

from __future__ import annotations

import pytest

from memadvise.advise.candidates import candidate_settings
from memadvise.advise.rules import RULES, broken_rules, check_names
from memadvise.errors import UsageError
from memadvise.ledger import Parameter, Segment
from memadvise.plan.schema import Setting

APOLLO, MINI, GALORE = Setting("apollo"), Setting("apollo_mini"), Setting("galore")


def parameter(shape: tuple[int, ...], role: str, **more: object) -> Parameter:
    numel = 1
    for size in shape:
        numel *= size
    axes: dict[str, object] = {"fan_in": tuple(range(1, len(shape))), "fan_out": (0,)} if len(shape) > 1 else {}
    return Parameter("w", shape, "float32", 4 * numel, True, role, "m", "Linear", **{**axes, **more})  # type: ignore[arg-type]


HEAD = parameter((512, 64), "head")
TABLE = parameter((512, 64), "token_embedding")
TRANSPOSED = parameter((64, 512), "head", fan_in=(0,), fan_out=(1,))
QKV = parameter(
    (192, 64), "attention_qkv", segments=(Segment("attention_query", 0, 64, 4), Segment("attention_key", 64, 192, 8))
)
MATRIX = parameter((512, 64), "mlp_up")
UNKNOWN = parameter((8, 64, 32), "unknown", fan_in=(), fan_out=())
VECTOR = parameter((100_000,), "bias")


def names(p: Parameter, setting: Setting) -> set[str]:
    return {rule.name for rule in broken_rules(p, setting)}


@pytest.mark.parametrize(
    ("p", "setting", "rule"),
    [
        *[(p, setting, "projection") for p in (HEAD, TABLE, TRANSPOSED) for setting in (APOLLO, MINI, GALORE)],
        (parameter((8192, 1), "linear"), APOLLO, "projection"),
        (HEAD, Setting("slimadam", {"axes": [0]}), "vocabulary-mean"),
        (HEAD, Setting("slimadam", {"axes": [0, 1]}), "vocabulary-mean"),
        (TRANSPOSED, Setting("slimadam", {"axes": [1]}), "vocabulary-mean"),
        (TABLE, Setting("adam_mini", {"partition": "whole"}), "vocabulary-mean"),
        (TABLE, Setting("adam_mini", {"partition": "column"}), "vocabulary-mean"),
        (TABLE, Setting("rmsprop", {"store": "mean", "axes": [0]}), "vocabulary-mean"),
        (TABLE, Setting("micro_adam"), "error-feedback"),
        (VECTOR, Setting("adamw", {"first_moment": "int8"}), "tiny"),
        (parameter((63, 65), "linear"), Setting("slimadam", {"axes": [1]}), "tiny"),
        (parameter((1, 8192), "linear"), Setting("slimadam", {"axes": [1]}), "tiny"),
        (MATRIX, Setting("galore", {"rank": 64}), "no-op"),
        (parameter((8192, 1), "linear"), Setting("slimadam", {"axes": [1]}), "no-op"),
        (UNKNOWN, Setting("adafactor"), "unknown"),
        (UNKNOWN, Setting("slimadam", {"axes": [0]}), "unknown"),
        (UNKNOWN, Setting("adamw", {"first_moment": "int4"}), "unknown"),
    ],
)
def test_what_is_forbidden(p: Parameter, setting: Setting, rule: str) -> None:
    assert rule in names(p, setting)
    assert setting.key not in {s.key for s in candidate_settings(p)}
    assert rule not in {r.name for r in broken_rules(p, setting, allowed=[rule])}


@pytest.mark.parametrize(
    ("p", "setting"),
    [
        (HEAD, Setting("slimadam", {"axes": [1]})),
        (TRANSPOSED, Setting("slimadam", {"axes": [0]})),
        (TABLE, Setting("adam_mini")),
        (TABLE, Setting("adafactor", {"momentum": 0.9})),
        (MATRIX, APOLLO),
        (MATRIX, Setting("slimadam", {"axes": [0, 1]})),
        (QKV, Setting("adam_mini", {"partition": "head", "segments": [[0, 64, 4], [64, 192, 8]]})),
        (UNKNOWN, Setting("slimadam", {"axes": [2]})),
        (UNKNOWN, Setting("adamw", {"first_moment": "int8", "second_moment": "int8"})),
        (VECTOR, Setting("adamw", {"cautious": True})),
        (MATRIX, Setting("adamw", {"weights": "stochastic"})),
    ],
)
def test_what_is_not(p: Parameter, setting: Setting) -> None:
    assert names(p, setting) == set()


def test_a_rule_set_aside_opens_candidates() -> None:
    assert not any(s.method == "apollo" for s in candidate_settings(HEAD))
    assert any(s.method == "apollo" for s in candidate_settings(HEAD, ["projection"]))
    assert any(s.options.get("axes") == [0] for s in candidate_settings(HEAD, ["vocabulary-mean"]))
    assert len(candidate_settings(VECTOR, ["tiny"])) > 1


def test_every_rule_says_what_and_why() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.text and rule.evidence for rule in RULES)
    with pytest.raises(UsageError, match="no hard rule 'projections'"):
        check_names(["projections"])
