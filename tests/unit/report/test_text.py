"""The text report: golden files for the whole, and the promises behind them."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from memadvise.ledger import MemoryLedger, Scan, from_dict, to_json
from memadvise.report.draw import Bar, Timeline, make_console, render_text, table
from memadvise.report.summary import axes_label, device_rows, hessian_rows, module_rows, snr_rows, unknown_reasons
from memadvise.report.text import render_recommendation, render_scan

Golden = Callable[[str, str], None]


def test_the_report_of_a_scan(sample_scan: Scan, golden: Golden) -> None:
    golden("scan.txt", render_scan(sample_scan))


def test_the_report_of_a_scan_without_a_probe(sample_scan: Scan, golden: Golden) -> None:
    bare = dataclasses.replace(sample_scan, probe=None, memory=sample_scan.memory[:1])
    golden("scan_no_probe.txt", render_scan(bare))


def test_the_report_of_a_recommendation(sample_recommendation: Any, golden: Golden) -> None:
    golden("recommendation.txt", render_recommendation(sample_recommendation, budget="1700MiB"))


def test_a_recommendation_to_do_nothing(sample_recommendation: Any) -> None:
    fits = dataclasses.replace(sample_recommendation, needs_compression=False, after=None, groups=())
    text = render_recommendation(fits)
    assert text.startswith("nothing needs compressing: 1.98 GiB at the peak, budget 1.66 GiB, margin")
    assert "with the plan" not in text


def test_the_report_survives_the_scan_file(sample_scan: Scan) -> None:
    assert render_scan(from_dict(Scan, json.loads(to_json(sample_scan)))) == render_scan(sample_scan)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_names_are_folded_never_cut(sample_scan: Scan, width: int) -> None:
    name = "transformer." + "a_very_long_block_name" * 8 + ".attn"
    memory = dataclasses.replace(sample_scan.memory[0], by_module={name: {"weights": 1}}, peak_bytes=1)
    text = render_scan(dataclasses.replace(sample_scan, memory=(memory,), probe=None), width=width)
    assert "\u2026" not in text
    assert all(len(line) <= width for line in text.splitlines())
    # The folded pieces of the first column, put together again, are the whole name.
    rows = text.split("By module, at the peak\n")[1].split("\n\n")[0].splitlines()[2:]
    assert "".join(line.split(" ")[0] for line in rows) == name


@pytest.mark.parametrize("width", [80, 100])
def test_narrow_terminals_lose_columns_not_digits(sample_scan: Scan, sample_recommendation: Any, width: int) -> None:
    for text in (render_scan(sample_scan, width=width), render_recommendation(sample_recommendation, width=width)):
        assert "\u2026" not in text
        assert all(len(line) <= width for line in text.splitlines())
    assert "-24.6 %" in render_scan(sample_scan, width=width)
    assert "1.59 GiB" in render_recommendation(sample_recommendation, width=width)


def test_brackets_in_names_are_no_markup() -> None:
    assert "h[0].[bold]w[/bold]" in render_text([table({"module": "name"}, [["h[0].[bold]w[/bold]"]])])


def test_module_rows_add_up_and_collapse_repeats(sample_scan: Scan) -> None:
    ledger = sample_scan.memory[0]
    for depth in (1, 2, 3, 9):
        for limit in (1, 2, 3, 16):
            rows = module_rows(ledger, depth=depth, limit=limit)
            assert len(rows) <= limit
            assert sum(row.total_bytes for row in rows) == ledger.peak_bytes
            for category, size in ledger.by_category.items():
                assert sum(row.by_category.get(category, 0) for row in rows) == size
    rows = module_rows(ledger, depth=2)
    assert [(row.pattern, row.count) for row in rows] == [("transformer.h.*", 4), ("(no module)", 1)]
    assert [row.pattern for row in module_rows(ledger, depth=9)][1] == "transformer.h.*.mlp.c_fc"


def test_snr_rows_choose_the_axes_of_highest_snr(sample_scan: Scan) -> None:
    rows = {row.role: row for row in snr_rows(sample_scan)}
    assert set(rows) == {"tied_embedding", "attention_qkv", "mlp_up"}
    qkv = rows["attention_qkv"]
    # Tensors number 1, 4, 7 and 10 of the scan have SNR 4 + number along axis 1.
    assert (qkv.best, qkv.count, qkv.median_snr, qkv.lowest_snr, qkv.error) == ("[1] fan_in", 4, 9.5, 5.0, 0.2)
    assert [label for label, _ in qkv.others] == ["[0] fan_out"], "axes without a finite SNR are left out"
    assert snr_rows(sample_scan)[0].role == "mlp_up", "most elements first"


def test_snr_rows_where_nothing_is_finite(sample_scan: Scan) -> None:
    assert sample_scan.probe is not None
    first = sample_scan.probe.parameters[0]
    only = dataclasses.replace(first, snr=(dataclasses.replace(first.snr[2]),))
    scan = dataclasses.replace(sample_scan, probe=dataclasses.replace(sample_scan.probe, parameters=(only,)))
    (row,) = snr_rows(scan)
    assert (row.best, row.median_snr, row.lowest_snr, row.error) == ("[0, 1] all", None, None, None)
    assert "[0, 1] all" in render_scan(scan)


def test_axes_are_named_by_the_parameter_not_by_position(sample_scan: Scan) -> None:
    linear = next(p for p in sample_scan.parameters if p.role == "mlp_up")
    conv1d = dataclasses.replace(linear, fan_in=(0,), fan_out=(1,))
    kernel = dataclasses.replace(linear, shape=(8, 4, 3, 3), fan_in=(1, 2, 3), fan_out=(0,))
    assert axes_label(linear, (1,)) == "[1] fan_in"
    assert axes_label(conv1d, (1,)) == "[1] fan_out"
    assert axes_label(kernel, (1, 2, 3)) == "[1, 2, 3] fan_in"
    assert axes_label(kernel, (2, 3)) == "[2, 3]"
    assert axes_label(kernel, (0, 1, 2, 3)) == "[0, 1, 2, 3] all"


def test_hessian_rows_average_over_tensors(sample_scan: Scan) -> None:
    row = next(r for r in hessian_rows(sample_scan) if (r.role, r.partition) == ("mlp_up", "row"))
    assert (row.count, row.num_samples, row.score) == (4, 64, 0.75)
    assert row.stderr == pytest.approx(0.03 / 2), "independent errors of four tensors"
    assert unknown_reasons(sample_scan) == (("a vector is never compressed", 4, 512),)


def test_bars_are_proportional_and_something_is_never_nothing() -> None:
    assert render_text([Bar(1, 2, width=10)]) == "\u2588" * 5 + "\n"
    assert render_text([Bar(10**6, 10**6, width=10)]) == "\u2588" * 10 + "\n"
    assert render_text([Bar(1, 10**9, width=10)]) == "\u258f\n"
    assert render_text([Bar(0, 10, width=10)]) == "\n"
    assert render_text([Bar(0, 0, width=10)]) == "\n"


def test_an_ascii_terminal_gets_ascii() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = make_console(file, width=60)
    console.print(Bar(1, 2, width=10), Timeline(((0, 1), (5, 100), (9, 3))), table({"a": "name"}, [["x"]]))
    file.flush()
    text = file.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "#####" in text
    assert "100 B |" in text


def test_the_timeline_keeps_the_highest_value() -> None:
    points = tuple((i, 1000 if i == 4567 else i % 7) for i in range(10_000))
    columns = Timeline(points).columns(50)
    assert max(columns) == 1000
    assert columns.index(1000) == 4567 * 50 // 10_000
    assert Timeline(((0, 5), (99, 1))).columns(4) == [5, 5, 5, 1], "memory holds between events"


def test_width_when_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console(io.StringIO()).width == 160
    monkeypatch.setenv("COLUMNS", "90")
    assert make_console(io.StringIO()).width == 90
    assert make_console(io.StringIO(), width=70).width == 70


def test_an_empty_step_draws_nothing_strange() -> None:
    empty = MemoryLedger("estimate", "cpu", "x", 1, (), 0, "forward", 0, {}, {}, (), (), (), 0)
    scan = Scan("t.py", None, {}, "sha256:0", (), (empty,))
    assert render_scan(scan).startswith("t.py: 0 B at the peak")
    assert "rich" in sys.modules


def test_what_the_device_must_hold_adds_up(sample_scan: Scan) -> None:
    memory = sample_scan.memory[0]
    rows = device_rows(memory)
    assert sum(row.needed_bytes for row in rows) == memory.needed_bytes
    assert sum(row.comfortable_bytes for row in rows) == memory.comfortable_bytes
    assert device_rows(dataclasses.replace(memory, reserved=(), overhead=())) == ()
