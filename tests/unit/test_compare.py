"""What moved between two ledgers."""

from __future__ import annotations

from dataclasses import replace

from memadvise.compare import compare, operation
from memadvise.ledger import LiveGroup, MemoryLedger, Scan

MIB = 2**20


def moved(ledger: MemoryLedger, module: str, category: str, more: int) -> MemoryLedger:
    """``ledger`` with ``more`` bytes of a category in one module."""
    cells = {**ledger.by_module.get(module, {})}
    cells[category] = cells.get(category, 0) + more
    return replace(
        ledger,
        peak_bytes=ledger.peak_bytes + more,
        by_category={**ledger.by_category, category: ledger.by_category.get(category, 0) + more},
        by_module={**ledger.by_module, module: cells},
    )


def test_equal_ledgers_do_not_differ(sample_scan: Scan) -> None:
    diff = compare(sample_scan.memory[0], sample_scan.memory[0])
    assert diff.peak.change_bytes == 0
    assert diff.peak.change == 0
    assert not diff.cells
    assert not diff.tensors
    assert not diff.settings
    assert {row.name for row in diff.phases} == {"forward", "backward", "step"}
    assert sum(row.before_bytes for row in diff.modules) == sample_scan.memory[0].peak_bytes


def test_repeated_blocks_are_one_row_and_the_largest_comes_first(sample_scan: Scan) -> None:
    before = sample_scan.memory[0]
    after = before
    for block in range(4):
        after = moved(after, f"transformer.h.{block}.mlp.c_fc", "activations", 10 * MIB)
    after = moved(after, "lm_head", "temporaries", 3 * MIB)
    after = moved(after, "transformer.h.2.attn", "gradients", -5 * MIB)
    diff = compare(before, after)
    assert diff.peak.change_bytes == (40 + 3 - 5) * MIB
    assert [(c.name, c.category, c.change_bytes // MIB, c.count) for c in diff.cells] == [
        ("transformer.h.*.mlp.c_fc", "activations", 40, 4),
        ("transformer.h.*.attn", "gradients", -5, 4),
        ("lm_head", "temporaries", 3, 1),
    ]
    assert [m.name for m in diff.modules[:3]] == ["transformer.h.*.mlp.c_fc", "transformer.h.*.attn", "lm_head"]
    assert diff.modules[2].change is None  # it is new
    assert [c.name for c in diff.categories[:2]] == ["activations", "gradients"]
    # Every byte that moved is in one cell, in one module and in one category.
    for rows in (diff.cells, diff.modules, diff.categories):
        assert sum(row.change_bytes for row in rows) == diff.peak.change_bytes


def tensors(ledger: MemoryLedger, *groups: LiveGroup) -> MemoryLedger:
    return replace(ledger, live_groups=groups)


def gelu(size: int, block: int, *, line: int = 1, dtype: str = "float32", op: str = "aten.gelu.default") -> LiveGroup:
    return LiveGroup("activations", f"h.{block}.mlp", op, dtype, f"model.py:{line}", 2, size * MIB)


def test_a_line_that_moved_is_no_difference(sample_scan: Scan) -> None:
    ledger = sample_scan.memory[0]
    before = tensors(ledger, *(gelu(4, block, line=10) for block in range(3)))
    after = tensors(ledger, *(gelu(4, block, line=99) for block in range(3)))
    assert not compare(before, after).tensors


def test_tensors_that_moved_have_operation_dtype_and_line(sample_scan: Scan) -> None:
    ledger = sample_scan.memory[0]
    before = tensors(ledger, *(gelu(4, block, dtype="bfloat16") for block in range(3)))
    after = tensors(ledger, *(gelu(8, block, line=88) for block in range(3)), gelu(1, 0, op="aten.mul.Tensor"))
    upcast, gone, mul = compare(before, after).tensors
    assert (upcast.name, upcast.op, upcast.dtype, upcast.where) == ("h.*.mlp", "gelu", "float32", "model.py:88")
    assert (upcast.before_count, upcast.after_count, upcast.change_bytes) == (0, 6, 24 * MIB)
    assert (gone.dtype, gone.change_bytes) == ("bfloat16", -12 * MIB)
    assert (mul.name, mul.before_bytes, mul.after_bytes) == ("h.*.mlp", 0, 1 * MIB)


def test_a_profiler_knows_no_dtypes(sample_scan: Scan) -> None:
    """Then the dtype tells nothing apart: a measurement would differ from its estimate everywhere."""
    ledger = sample_scan.memory[0]
    traced = tensors(ledger, gelu(4, 0), gelu(4, 1, dtype="bfloat16"))
    measured = tensors(
        replace(ledger, source="measure"), gelu(4, 0, dtype="", op="aten::gelu"), gelu(5, 1, dtype="", op="aten::gelu")
    )
    state = LiveGroup("optimizer_state", "h.0.mlp", "aten.zeros_like.default", "float32", None, 2, MIB)
    traced = replace(traced, live_groups=(*traced.live_groups, state))
    known = replace(state, op="", dtype="")  # it was there before the step that was measured
    measured = replace(measured, live_groups=(*measured.live_groups, known))
    (row,) = compare(traced, measured).tensors
    assert (row.op, row.dtype, row.change_bytes) == ("gelu", "", 1 * MIB)


def test_settings_that_differ_are_named(sample_scan: Scan) -> None:
    diff = compare(sample_scan.memory[0], replace(sample_scan.memory[2], peak_phase="step", source="measure"))
    assert diff.settings["recomputed modules"] == ("none", "transformer.h.*")
    assert diff.settings["phase of the peak"] == ("backward", "step")
    assert diff.settings["source"] == ("estimate", "measure")
    assert "device" not in diff.settings


def test_operations_of_a_trace_and_of_a_profiler_have_one_name() -> None:
    assert operation("aten.addmm.default") == operation("aten::addmm") == "addmm"
    assert operation("prims.convert_element_type.default") == "convert_element_type"
    assert operation("batch") == "batch"
    assert operation("") == ""
