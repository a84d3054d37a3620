import dataclasses

import pytest
import torch
from tiny_models import TinyTransformer, describe

from memadvise.ledger import HessianValue, Parameter, Segment
from memadvise.probe.partitions import (
    COLUMNS,
    GRADIENT_COVARIANCE,
    HESSIAN_VECTOR_PRODUCTS,
    ROWS,
    Partition,
    choose_partition,
    layout,
    partition_sizes,
    prior_partition,
)


def parameter(shape, role="linear", **changes):
    axes = {"fan_in": tuple(range(1, len(shape))), "fan_out": (0,)} if len(shape) > 1 else {}
    return Parameter("w", tuple(shape), "float32", 0, True, role, "", "Linear", **{**axes, **changes})


def test_candidates_of_a_transformer():
    sizes = {p.name: partition_sizes(p) for p in describe(TinyTransformer())}
    assert sizes["query.weight"] == {"head": 4, "row": 16, "column": 16}
    assert sizes["output.weight"] == {"head_column": 4, "row": 16, "column": 16}
    assert sizes["up.weight"] == {"row": 64, "column": 16}
    assert sizes["tokens.weight"] == {"row": 8, "column": 16}
    assert sizes["norms.0.weight"] == {}


def test_heads_are_consecutive_rows():
    (head,) = [p for p in layout(parameter((12, 5), "attention_key", heads=3)).partitions if p.name == "head"]
    assert head.axis == ROWS
    assert head.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_heads_of_the_attention_output_are_columns():
    (head,) = [p for p in layout(parameter((5, 12), "attention_output", heads=3)).partitions if "head" in p.name]
    assert (head.name, head.axis, head.num_blocks) == ("head_column", COLUMNS, 3)


def test_fused_qkv_has_heads_of_q_and_k_and_rows_of_v():
    segments = (
        Segment("attention_query", 0, 8, 4),
        Segment("attention_key", 8, 12, 2),
        Segment("attention_value", 12, 16, 2),
    )
    found = layout(parameter((16, 8), "attention_qkv", segments=segments))
    head = next(p for p in found.partitions if p.name == "head")
    assert head.num_blocks == 4 + 2 + 4
    assert head.lines_per_block().tolist() == [2] * 6 + [1] * 4


def test_transposed_storage_swaps_rows_and_columns():
    conv1d = parameter((6, 12), "attention_query", heads=3, fan_in=(0,), fan_out=(1,))
    found = layout(conv1d)
    assert (found.rows, found.columns) == (12, 6)
    weight = torch.arange(72.0).view(6, 12)
    assert torch.equal(found.matrix(weight), weight.T)
    assert partition_sizes(conv1d) == {"head": 3, "row": 12, "column": 6}


@pytest.mark.parametrize(
    ("shape", "changes"), [((6, 12), {"fan_in": (0,), "fan_out": (1,)}), ((4, 3, 2, 5), {}), ((7, 3), {})]
)
def test_matrix_and_back(shape, changes):
    found = layout(parameter(shape, **changes))
    weight = torch.randn(shape)
    assert torch.equal(found.tensor(found.matrix(weight), shape), weight)


def test_convolutions_have_a_row_per_output_channel():
    found = layout(parameter((4, 3, 2, 5), "conv"))
    assert (found.rows, found.columns) == (4, 30)


def test_embeddings_have_a_row_per_token_whatever_the_fans_say():
    table = parameter((9, 4), "token_embedding", fan_in=(0,), fan_out=(1,))
    assert partition_sizes(table) == {"row": 9, "column": 4}
    positions = parameter((1, 9, 4), "position_embedding")
    assert partition_sizes(positions) == {"row": 9, "column": 4}


def test_degenerate_partitions_are_not_candidates():
    assert partition_sizes(parameter((1, 8))) == {}  # one row is the whole, one column a coordinate
    assert partition_sizes(parameter((8,))) == {}
    assert partition_sizes(parameter((4, 4), "attention_query", heads=4)) == {"row": 4, "column": 4}
    assert partition_sizes(parameter((10, 4), "attention_query", heads=3)) == {"row": 10, "column": 4}


def test_chance_is_the_share_of_pairs_inside_blocks():
    partition = Partition("row", ROWS, torch.tensor([0, 0, 0, 1, 2]))
    labels = partition.expand(torch.arange(3)).expand(5, 2).flatten()
    same = (labels[:, None] == labels[None, :]).float()
    n = len(labels)
    assert partition.chance(2) == pytest.approx((same.sum().item() - n) / (n * (n - 1)))


def value(partition, score, stderr=0.02, estimator=GRADIENT_COVARIANCE):
    return HessianValue(partition, score, stderr, 0.1, estimator, 32)


SIZES = {"head": 4, "row": 16, "column": 16}


def test_a_clear_winner():
    chosen, why, measured = choose_partition([value("head", 0.9), value("row", 0.4), value("column", 0.0)], SIZES)
    assert (chosen, measured) == ("head", True)
    assert "head 0.90 +- 0.02 by gradient covariance, clear" in why


def test_the_finest_of_equals():
    chosen, *_ = choose_partition([value("head", 0.92), value("row", 0.88), value("column", 0.0)], SIZES)
    assert chosen == "row"
    chosen, *_ = choose_partition([value("head", 0.92), value("row", 0.80), value("column", 0.0)], SIZES)
    assert chosen == "head"
    chosen, *_ = choose_partition([value("head", 0.92, 0.15), value("row", 0.85, 0.15)], SIZES)
    assert chosen == "row"  # within one standard error


@pytest.mark.parametrize(("stderr", "clear"), [(0.099, True), (0.101, False)])
def test_clear_is_two_standard_errors_above_a_half(stderr, clear):
    chosen, why, measured = choose_partition([value("column", 0.7, stderr)], SIZES, prior="row")
    assert (chosen, measured) == (("column", True) if clear else ("row", False))
    assert (", clear" in why) == clear
    assert ("is unclear (best: column 0.70 +- 0.10); row is the static prior" in why) == (not clear)
    # a finer one that is not clear itself is not taken for being near
    chosen, *_ = choose_partition([value("head", 0.8, 0.1), value("row", 0.78, 0.2)], SIZES)
    assert chosen == "head"


def test_weak_structure_falls_back_to_the_prior_and_says_so():
    chosen, why, measured = choose_partition([value("row", 0.31), value("column", 0.2)], SIZES, prior="row")
    assert (chosen, measured) == ("row", False)
    assert why == "block structure is weak (best: row 0.31 +- 0.02); row is the static prior"


def test_nothing_measured_falls_back_to_the_prior():
    assert choose_partition([], SIZES, prior="head") == (
        "head",
        "block structure was not measured; head is the static prior",
        False,
    )


def test_confirmation_decides_whatever_the_screen_says():
    screened = [value("head", 0.2), value("row", 0.9)]
    confirmed = [value("head", 0.7, 0.05, HESSIAN_VECTOR_PRODUCTS), value("row", 0.3, 0.05, HESSIAN_VECTOR_PRODUCTS)]
    chosen, why, measured = choose_partition(screened + confirmed, SIZES)
    assert (chosen, measured) == ("head", True)
    assert "head 0.70 +- 0.05 by Hessian-vector products" in why
    vetoed = [dataclasses.replace(confirmed[0], score=0.1), confirmed[1]]
    chosen, why, measured = choose_partition(screened + vetoed, SIZES, prior="head")
    assert (chosen, measured) == ("head", False)
    assert "is weak" in why


def test_priors_of_the_papers():
    priors = {p.name: prior_partition(p) for p in describe(TinyTransformer())}
    assert priors["query.weight"] == priors["key.weight"] == "head"
    assert priors["value.weight"] == priors["up.weight"] == priors["tokens.weight"] == "row"
    assert priors["norms.0.bias"] == "coordinate"
