"""Hard rules: what may be done to which parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memadvise.advise.candidates import (
    DENSE,
    Confidence,
    candidate_settings,
    confidence,
    kind,
    make_groups,
    parts_of,
    probe_settings,
    static_prior,
    tier,
)
from memadvise.ledger import Parameter, Segment
from memadvise.plan.schema import Setting


def parameter(name: str, shape: tuple[int, ...], role: str, **more: object) -> Parameter:
    numel = 1
    for size in shape:
        numel *= size
    axes: dict[str, object] = {"fan_in": tuple(range(1, len(shape))), "fan_out": (0,)} if len(shape) > 1 else {}
    values = {"dtype": "float32", "trainable": True, "module": name.rpartition(".")[0], "module_type": "Linear"}
    return Parameter(name=name, shape=shape, role=role, num_bytes=4 * numel, **{**values, **axes, **more})  # type: ignore[arg-type]


def axes(p: Parameter) -> set[tuple[int, ...]]:
    return {tuple(s.options["axes"]) for s in candidate_settings(p) if s.method == "slimadam"}


@pytest.mark.parametrize("role", ["token_embedding", "position_embedding", "tied_embedding", "head"])
def test_the_token_axis_is_never_averaged(role: str) -> None:
    assert axes(parameter("e.weight", (512, 64), role)) == {(1,)}


def test_a_transposed_head_keeps_its_tokens_too() -> None:
    assert axes(parameter("head.weight", (64, 512), "head", fan_in=(0,), fan_out=(1,))) == {(0,)}


@pytest.mark.parametrize(
    "p",
    [
        parameter("b", (100_000,), "bias"),
        parameter("s", (), "vector"),
        parameter("w", (63, 65), "linear"),  # 4095 elements
    ],
)
def test_vectors_and_tiny_tensors_stay_dense(p: Parameter) -> None:
    assert candidate_settings(p) == (DENSE,)


def test_a_position_table_with_a_leading_axis_keeps_its_positions() -> None:
    assert axes(parameter("pos", (1, 64, 128), "position_embedding", fan_in=(2,), fan_out=(1,))) == {(0, 2)}


def test_a_tensor_of_unknown_axes_is_averaged_over_the_last_only() -> None:
    assert axes(parameter("w", (8, 64, 32), "unknown", fan_in=(), fan_out=())) == {(2,)}


def test_dense_comes_first_and_no_setting_twice() -> None:
    for p in (
        parameter("w", (128, 64), "mlp_up"),
        parameter("c", (64, 32, 3, 3), "conv"),
        parameter("q", (64, 64), "attention_query", heads=4),
    ):
        settings = candidate_settings(p)
        assert settings[0] == DENSE
        assert len({s.key for s in settings}) == len(settings)
    assert axes(parameter("c", (64, 32, 3, 3), "conv")) == {(1, 2, 3), (0,), (0, 1, 2, 3), (2, 3)}


def test_heads_of_queries_and_keys() -> None:
    q = parameter("q", (64, 64), "attention_query", heads=4)
    assert Setting("adam_mini", {"partition": "head", "heads": 4}) in candidate_settings(q)
    transposed = replace(q, fan_in=(0,), fan_out=(1,))
    assert Setting("adam_mini", {"partition": "head", "heads": 4, "axis": 1}) in candidate_settings(transposed)
    assert all(s.method != "adam_mini" for s in candidate_settings(replace(q, role="attention_value")))
    assert all(s.method != "adam_mini" for s in candidate_settings(replace(q, heads=None)))
    assert all(s.method != "adam_mini" for s in candidate_settings(replace(q, heads=5)))  # does not divide


def test_fused_qkv_splits_values_by_row() -> None:
    segments = (
        Segment("attention_query", 0, 64, 4),
        Segment("attention_key", 64, 96, 2),
        Segment("attention_value", 96, 128, 2),
    )
    fused = parameter("qkv", (128, 64), "attention_qkv", segments=segments)
    expected = Setting("adam_mini", {"partition": "head", "segments": [[0, 64, 4], [64, 96, 2], [96, 128, 0]]})
    assert expected in candidate_settings(fused)
    assert all(s.method != "adam_mini" for s in candidate_settings(replace(fused, segments=())))


def test_static_prior_follows_the_papers() -> None:
    assert static_prior(parameter("q", (64, 64), "attention_query")) == Setting("slimadam", {"axes": [1]})
    assert static_prior(parameter("v", (64, 64), "attention_value")) == Setting("slimadam", {"axes": [0]})
    assert static_prior(parameter("d", (64, 256), "mlp_down")) == Setting("slimadam", {"axes": [0]})
    assert static_prior(parameter("e", (256, 64), "token_embedding")) == Setting("slimadam", {"axes": [1]})
    assert static_prior(parameter("n", (64,), "norm")) == DENSE
    for role in ("attention_query", "mlp_up", "conv", "head", "unknown"):
        p = parameter("x", (64, 64), role)
        assert static_prior(p) in candidate_settings(p)


def test_groups_pool_equal_role_and_shape_across_names() -> None:
    parameters = [
        parameter("h.0.q.weight", (64, 64), "attention_query", heads=4),
        parameter("h.1.q.weight", (64, 64), "attention_query", heads=4),
        parameter("h.0.k.weight", (64, 64), "attention_key", heads=4),
        parameter("g.0.q.weight", (64, 64), "attention_query", heads=4),
        parameter("g.1.q.weight", (64, 64), "attention_query", heads=8),
        parameter("frozen.weight", (64, 64), "linear", trainable=False),
    ]
    groups = make_groups(parameters)
    assert [(g.patterns, len(g.members)) for g in groups] == [
        (("h.*.q.weight", "g.0.q.weight"), 3),
        (("h.0.k.weight",), 1),
        (("g.1.q.weight",), 1),
    ]


MATRIX = parameter("w", (256, 128), "mlp_up")


def test_every_class_of_the_two_tiers_is_a_candidate() -> None:
    kinds = {kind(MATRIX, s): tier(s) for s in candidate_settings(MATRIX)}
    first = {
        "adamw", "adamw, m int8, v int8", "adamw, m dynamic8, v dynamic8", "adamw, m int4, v int4", "adamw, m int8",
        "adamw, v int8", "mean(fan_in)", "mean(fan_in), m int8", "mean(fan_out), m int4", "mean(all)", "factored",
        "factored, m int8", "low-rank", "low-rank, m int8",
    }  # fmt: skip
    assert {kinds[name] for name in first} == {1}
    second = {"apollo", "apollo_mini", "factored, no momentum", "lion", "micro_adam", "galore"}
    assert {name for name, number in kinds.items() if number == 2} == second


def test_combinations_are_measured_by_their_parts() -> None:
    measured = {s.key for s in probe_settings(MATRIX)}
    whole = Setting("slimadam", {"axes": [1], "first_moment": "int8"})
    parts = parts_of(whole)
    assert parts == (Setting("slimadam", {"axes": [1]}), Setting("adamw", {"first_moment": "int8"}))
    assert whole.key not in measured
    assert {part.key for part in parts} <= measured
    both = Setting("adamw", {"first_moment": "int8", "second_moment": "int8"})
    assert parts_of(both) is None
    assert both.key in measured  # the probe's own check: 8 bits must hardly turn the update
    assert measured < {s.key for s in candidate_settings(MATRIX)}


@pytest.mark.parametrize(
    ("setting", "level"),
    [
        (Setting("adamw"), Confidence.HIGH),
        (Setting("adamw", {"first_moment": "int8", "second_moment": "dynamic8"}), Confidence.HIGH),
        (Setting("adafactor", {"momentum": 0.9}), Confidence.FAIRLY_HIGH),
        (Setting("slimadam", {"axes": [1], "first_moment": "int8"}), Confidence.FAIRLY_HIGH),
        (Setting("slimadam", {"axes": [0]}), Confidence.MEDIUM),
        (Setting("slimadam", {"axes": [1], "first_moment": "int4"}), Confidence.MEDIUM),
        (Setting("adamw", {"first_moment": "int4"}), Confidence.FAIRLY_HIGH),
        (Setting("adafactor"), Confidence.LOW),
        (Setting("sgd"), Confidence.LOW),
    ],
)
def test_levels_of_confidence(setting: Setting, level: Confidence) -> None:
    assert confidence(MATRIX, setting) is level


def test_a_broken_rule_makes_confidence_low() -> None:
    head = parameter("head", (512, 64), "head")
    assert confidence(head, Setting("slimadam", {"axes": [1]})) is Confidence.FAIRLY_HIGH
    assert confidence(head, Setting("slimadam", {"axes": [0]})) is Confidence.LOW


def test_apollo_holds_less_than_four_bits_and_keeps_the_size_of_its_update() -> None:
    large = parameter("w", (4096, 4096), "mlp_up")
    apollo = next(s for s in candidate_settings(large) if s.method == "apollo")
    assert apollo.options == {"rank": 128, "scale": 8.0}  # 8.0 * 128 / 4096 = 1/4, the paper's
