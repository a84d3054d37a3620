"""Two ledgers side by side, for people and for pull requests."""

from __future__ import annotations

import re
from dataclasses import replace

from memadvise.compare import compare
from memadvise.ledger import MemoryLedger, Scan
from memadvise.report.compare import compare_markdown, compare_renderables, headline
from memadvise.report.draw import render_text
from memadvise.report.markdown import code, escape, markdown_table

MIB = 2**20
LABELS = ("estimate", "measured")


def test_text_shows_every_table_with_the_largest_difference_first(sample_scan: Scan) -> None:
    before, after = sample_scan.memory[0], sample_scan.memory[2]
    text = render_text(compare_renderables(compare(before, after), LABELS))
    assert text.startswith("peak: estimate 1.98 GiB, measured 1.49 GiB (-500.0 MiB, -24.64 %)\n")
    titles = [line for line in text.splitlines() if line and not line.startswith(" ") and line[0].isupper()]
    assert titles == [
        "What differs in the settings", "Peak, by phase, and optimizer state", "By category, at the peak",
        "By module, at the peak",
    ]  # fmt: skip
    assert re.search(r"activations +600.0 MiB +100.0 MiB +-500.0 MiB +-83.33 %", text)
    assert re.search(r"recomputed modules +none +transformer\.h\.\*", text)
    assert text.index("transformer.h.*.attn") < text.index("1 are equal")
    again = render_text(compare_renderables(compare(before, before), ("a.json", "a.json")))
    assert "a.json (first)" in again
    assert "0 B" in again
    assert "+0.00 %" in again


def test_markdown_has_the_same_numbers_and_no_name_breaks_out(sample_scan: Scan) -> None:
    def hostile(ledger: MemoryLedger, size: int) -> MemoryLedger:
        return replace(ledger, by_module={**ledger.by_module, "a|b`<img src=x>\n## @all": {"activations": size}})

    before, after = hostile(sample_scan.memory[0], 0), hostile(sample_scan.memory[0], 7 * MIB)
    text = compare_markdown(compare(before, after), LABELS)
    assert text.startswith("**peak: `estimate` 1.98 GiB, `measured` 1.98 GiB (0 B, +0.00 %)**\n\n### ")
    row = next(line for line in text.splitlines() if "img" in line)
    assert re.findall("<.*?>", row) == ["<code>", "</code>"]
    assert "@" not in row
    assert "+7.00 MiB" in row.replace("\\", "")
    assert len(re.findall(r"(?<!\\)\|", row)) == 7  # six cells
    assert not any(line.startswith("## ") for line in text.splitlines())


def test_nothing_before_is_new_and_nothing_at_all_is_a_dash(sample_scan: Scan) -> None:
    ledger = sample_scan.memory[0]
    empty = replace(ledger, peak_bytes=0, state_bytes=0, by_category={}, by_module={}, phases=(), live_at_peak=())
    assert headline(compare(empty, ledger), LABELS).endswith("new)")
    assert headline(compare(empty, empty), LABELS).endswith("(0 B, -)")


def test_escaping() -> None:
    assert escape("a*b_c|d") == r"a\*b\_c\|d"
    assert escape("<script>&") == "&lt;script&gt;&amp;"
    assert escape("x\ny") == "x y"
    assert escape("https://x.y @z") == "https:&#47;&#47;x.y &#64;z"
    assert code("h.*.mlp") == "`h.*.mlp`"
    assert code("a`b") == "<code>a&#96;b</code>"
    assert code("a|b") == "<code>a&#124;b</code>"
    assert markdown_table({"module": "name", "n": "number"}, [["h.*", "1"], ["-", "2"]]).splitlines() == [
        "| module | n |", "| --- | ---: |", "| `h.*` | 1 |", r"| - | 2 |",
    ]  # fmt: skip
