"""The papers' memory tables, from the specs alone (the arithmetic of benchmarks/paper_tables.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import paper_tables as tables
from bench_support.shapes import kept_second_moments, model_bytes, numel


def test_the_models_have_the_published_sizes() -> None:
    assert numel(tables.GPT2["117M"]) == 124_439_808
    assert numel(tables.GPT2["345M"]) == 354_823_168
    assert numel(tables.LLAMA) == 6_738_415_616
    assert numel(tables.SLIM) == 124_373_760


@pytest.mark.parametrize(
    ("model", "method", "mib", "percent"),
    [
        ("117M", "AdamW", 949.4, 0.0),
        ("117M", "Adafactor, first moment", 475.9, 49.87),
        ("117M", "CAME", 476.7, 49.79),
        ("117M", "Adapprox, rank 1 (k_min)", 475.9, 49.87),
        ("117M", "Adapprox, rank 1/4 (k_max)", 621.8, 34.50),
        ("117M", "Adafactor", 1.23, 99.87),
        ("117M", "Adapprox, rank 1, no first moment", 1.23, 99.87),
        ("117M", "Adapprox, rank 1/4, no first moment", 147.1, 84.50),
        ("345M", "AdamW", 2707.1, 0.0),
        ("345M", "Adafactor, first moment", 1356.5, 49.89),
        ("345M", "CAME", 1358.2, 49.83),
        ("345M", "Adapprox, rank 1 (k_min)", 1356.5, 49.89),
        ("345M", "Adapprox, rank 1/4 (k_max)", 1790.8, 33.85),
        ("345M", "Adafactor", 2.93, 99.89),
        ("345M", "Adapprox, rank 1, no first moment", 2.93, 99.89),
        ("345M", "Adapprox, rank 1/4, no first moment", 437.3, 83.85),
    ],
)
def test_gpt2(model: str, method: str, mib: float, percent: float) -> None:
    found, saved = tables.saved(tables.GPT2[model], tables.GPT2_METHODS[method])
    assert found == pytest.approx(mib, abs=0.1)
    assert saved == pytest.approx(percent, abs=0.01)


def test_adam_mini_on_llama_2_7b() -> None:
    assert tables.num_blocks(tables.LLAMA, tables.adam_mini) == 1_163_841
    assert round(model_bytes(tables.LLAMA, tables.adam_mini) / 1e9, 2) == 26.96
    assert round(model_bytes(tables.LLAMA, tables.ADAMW) / 1e9, 2) == 53.91


def test_slimadam_saves_99_per_cent_of_second_moments() -> None:
    assert kept_second_moments(tables.SLIM, tables.slim_static) == 153_472
    assert kept_second_moments(tables.SLIM, tables.slim_measured) == 749_440
    assert [row[2] for row in tables.slim_rows()] == ["99.88 %", "99.40 %"]


def test_micro_adam_on_llama_2_7b() -> None:
    assert round(tables.micro_adam(10) / 2**30, 2) == 5.65
    assert round(tables.micro_adam(20) / 2**30, 2) == 8.16
    assert round(tables.micro_adam(10) / numel(tables.LLAMA), 2) == 0.90


def test_apollo_on_llama_2_7b() -> None:
    rows = {row[0]: row for row in tables.llama_rows()}
    assert rows["APOLLO, rank 256, in bf16"][1] == "1.62 GB"
    assert rows["APOLLO-Mini, in bf16"][1] == "0.0063 GB"
    assert "1.05 GB" in str(rows["APOLLO, rank 256, in bf16"][3])


def test_the_tables_print(capsys: pytest.CaptureFixture[str]) -> None:
    tables.main()
    printed = capsys.readouterr().out
    assert "1,163,841 blocks" in printed
    assert "153,472" in printed
