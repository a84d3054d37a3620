"""The strict reader: types decided by the field, every mistake at its place, all of them at once."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from memadvise.errors import FileFormatError, PlanError
from memadvise.plan.load import MAX_FILE_BYTES, load_plan, parse_plan, resolve
from memadvise.plan.nodes import Source, compose
from memadvise.plan.schema import ModelShape, Plan, Rule, Switches

WHOLE = """
# a comment
version: 1
budget_bytes: 12000000000
predicted_peak_bytes: 11
predicted_state_bytes: 0
device: no
switches:
  micro_batches: 2
  checkpoint: ["h.*", blocks.on]
model:
  fingerprint: sha256:12
  num_parameters: 3
  shapes: {h.*.w: [3, 4], scale: []}
rules:
  - match: "h.*.w"   # why
    method: adam_mini
    partition: head
    heads: 4
    segments: [[0, 8, 2], [8, 16, 0]]
  - match: on
    method: sgd
    momentum: 1e-3
    nesterov: true
    word: no
    nothing: null
    quoted: "1"
"""


def problems(text: str) -> list[str]:
    """First lines of the messages, without the file's name."""
    with pytest.raises(PlanError) as caught:
        parse_plan(textwrap.dedent(text), path="m.yaml")
    found = [str(problem).splitlines()[0] for problem in caught.value.problems]
    assert all(line.startswith("m.yaml:") for line in found)
    return [line.removeprefix("m.yaml:") for line in found]


def only_problem(text: str) -> tuple[str, str | None]:
    with pytest.raises(PlanError) as caught:
        parse_plan(textwrap.dedent(text), path="m.yaml")
    assert len(caught.value.problems) == 1, str(caught.value)
    return problems(text)[0], caught.value.problems[0].hint


def with_rule(body: str) -> str:
    return "version: 1\nrules:\n  - " + body + "\n"


def test_a_whole_plan_is_read_with_types_decided_by_the_field() -> None:
    plan = parse_plan(WHOLE, path="m.yaml")
    assert plan == Plan(
        rules=(
            Rule("h.*.w", "adam_mini", {"partition": "head", "heads": 4, "segments": [[0, 8, 2], [8, 16, 0]]}),
            Rule(
                "on",
                "sgd",
                {"momentum": 0.001, "nesterov": True, "word": "no", "nothing": None, "quoted": "1"},
            ),
        ),
        switches=Switches(2, ("h.*", "blocks.on")),
        model=ModelShape("sha256:12", 3, {"h.*.w": (3, 4), "scale": ()}),
        budget_bytes=12_000_000_000,
        predicted_peak_bytes=11,
        predicted_state_bytes=0,
        device="no",
    )
    assert plan.path == "m.yaml"
    assert isinstance(plan.rules[1].options["momentum"], float)


SWITCHED = "version: 1\nrules: [{match: '**', method: adamw}]\nswitches: "


def test_switches_that_the_optimizer_executes() -> None:
    plan = parse_plan(SWITCHED + "{gradient_release: true, weights: ecc8, checkpoint: [h.*]}")
    assert plan.switches == Switches(1, ("h.*",), True, "ecc8")
    assert parse_plan(SWITCHED + "{gradient_release: false, weights: null}").switches == Switches()


@pytest.mark.parametrize(
    ("switches", "message", "hint"),
    [
        ("{gradient_release: yes}", "switches.gradient_release should be true or false, found 'yes'", None),
        ("{weights: ecc9}", "switches.weights 'ecc9' is none of bf16, stochastic, ecc8, ecc16, int8", "did you mean"),
        ("{weights: none}", "switches.weights 'none' is none of", "remove the line"),
        (
            "{micro_batches: 2, gradient_release: true}",
            "release and micro-batches exclude each other",
            "choose",
        ),
    ],
)
def test_switches_that_cannot_be(switches: str, message: str, hint: str | None) -> None:
    with pytest.raises(PlanError) as raised:
        parse_plan(SWITCHED + switches, path="m.yaml")
    (problem,) = raised.value.problems
    assert message in problem.message
    assert problem.where is not None
    assert problem.where.line == 3
    assert problem.where.column > 10
    assert (hint or "") in (problem.hint or "")


def test_a_learning_rate_factor_is_no_option_of_the_method() -> None:
    (rule,) = parse_plan(with_rule("{match: a, method: apollo, lr_factor: 1e1, rank: 4}")).rules
    assert (rule.lr_factor, rule.options) == (10.0, {"rank": 4})
    assert rule.marks["lr_factor"].column == 43
    assert parse_plan(with_rule("{match: a, method: b}")).rules[0].lr_factor == 1
    assert rule != parse_plan(with_rule("{match: a, method: apollo, rank: 4}")).rules[0]


def test_marks_point_at_values() -> None:
    rule = parse_plan(WHOLE, path="m.yaml").rules[0]
    assert {key: str(mark) for key, mark in rule.marks.items()} == {
        "match": "m.yaml:16:12",
        "method": "m.yaml:17:13",
        "partition": "m.yaml:18:16",
        "heads": "m.yaml:19:12",
        "segments": "m.yaml:20:15",
    }
    assert rule.marks["heads"].text == "    heads: 4"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-12", -12),
        ("+3", 3),
        ("1e-3", 0.001),
        ("1.0e+3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("12GB", "12GB"),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("e3", "e3"),
        (".", "."),
        ("-", "-"),
    ],
)
def test_plain_scalars(text: str, value: object) -> None:
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


@pytest.mark.parametrize("text", [".inf", "-.INF", ".nan", "1e999", "9" * 31, "9" * 6000])
def test_numbers_a_plan_cannot_hold(text: str) -> None:
    found, _ = only_problem(with_rule(f"{{match: a, method: sgd, momentum: {text}}}"))
    assert "option 'momentum' of rules[0] is" in found


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "1: error: the plan is empty", "memadvise recommend"),
        ("# nothing\n", "1: error: the plan is empty", "memadvise recommend"),
        ("---\n", "the plan is empty", "memadvise recommend"),
        ("- a\n", "1:1: error: a plan is a mapping that starts with 'version: 1', found a list", "memadvise"),
        ("rules: [{match: a, method: b}]\n", "1:1: error: the plan has no 'version'", "version: 1"),
        ("version: 1\n", "1:1: error: the plan has no 'rules'", "rules:"),
        ("version: 1\nrules: []\n", "2:8: error: 'rules' is empty", "for example"),
        ("version: 1\nrules:\n", "2:1: error: 'rules' has no value", "remove the line"),
        ("version: one\nrules: [{match: a, method: b}]", "1:10: error: version should be an integer", None),
        ("version: '1'\nrules: [{match: a, method: b}]", "version should be an integer of at least 1, found", None),
        (
            "version: 1\nrules: [3]\n",
            "2:9: error: rules[0] should be a mapping with 'match' and 'method', found '3'",
            None,
        ),
        (with_rule("{match: a}"), "3:5: error: rules[0] has no 'method'", "every rule"),
        (with_rule("{mtch: a, method: b}"), "3:6: error: unknown key 'mtch' in rules[0]", "did you mean 'match'?"),
        (with_rule("{match: a, metod: b}"), "unknown key 'metod' in rules[0]", "did you mean 'method'?"),
        (with_rule("{match: '', method: b}"), "'match' of rules[0] is empty", None),
        (with_rule("{match: [a], method: b}"), "'match' of rules[0] should be a string, found a list", None),
        (with_rule("{match: 're:(', method: b}"), "'re:(' is not a regular expression: missing )", None),
        (
            with_rule("{match: a, method: b, axes: {x: 1}}"),
            "option 'axes' of rules[0] should be a scalar or a list",
            None,
        ),
        (
            with_rule("{match: a, method: b, axes: }"),
            "3:27: error: option 'axes' of rules[0] has no value",
            "remove the key",
        ),
        (with_rule("{match: a, method: b, axes: [1, {}]}"), "option 'axes' of rules[0][1] should be a scalar", None),
        (with_rule("{match: a, method: b, lr: 1, lr: 2}"), "3:34: error: duplicate key 'lr' in rules[0]", "line 3"),
        *(
            (
                with_rule(f"{{match: a, method: b, lr_factor: {value}}}"),
                f"3:38: error: 'lr_factor' of rules[0] should be a finite number above 0, found {shown}",
                "multiplies the learning rate",
            )
            for value, shown in [
                ("0", "'0'"),
                ("-1", "'-1'"),
                ("x", "'x'"),
                ("true", "'true'"),
                ("[1]", "a list"),
                ('"1"', "the string '1'"),
                (".inf", "'.inf'"),
                ("1e999", "'1e999'"),
            ]
        ),
        (
            with_rule("{match: a, method: b, lr_factor: }"),
            "'lr_factor' of rules[0] should be a finite number above 0, found nothing",
            "10",
        ),
        (with_rule("{match: a, method: b, [1]: 2}"), "a key of rules[0] is a list, not a word", None),
        (
            "version: 1\nversion: 1\nrules: [{match: a, method: b}]",
            "2:1: error: duplicate key 'version'",
            "line 1: keep one",
        ),
        (
            with_rule("match: *.weight\n    method: b"),
            "3:12: error: an unquoted * stands at the start",
            'match: "*.weight"',
        ),
        (with_rule("match: **\n    method: b"), "3:12: error: an unquoted * stands at the start", "needs quotes"),
        (with_rule("match: *w\n    method: b"), "3:12: error: YAML aliases (*w) are not used in plans", "needs quotes"),
        (with_rule("match: &w a\n    method: b"), "YAML anchors (&w) are not used", "write the value out"),
        (with_rule("match: !!str a\n    method: b"), "YAML tags (!!str) are not used", "remove the tag"),
        (with_rule("match: !own a\n    method: b"), "YAML tags (!own) are not used", "remove the tag"),
        (with_rule("{match: a, method: b}") + "---\nversion: 1\n", "4:1: error: a second YAML document", "'---'"),
        ("version: 1\nrules: [\n", "this is not valid YAML", None),
        ("a: b: c\n", "1:5: error: this is not valid YAML: mapping values are not allowed here", "indentation"),
        (with_rule("match: a\n   method: b"), "this is not valid YAML: expected <block end>", "indentation"),
        ("version: 1\x07\n", "1:11: error: the character U+0007 may not stand in a YAML file", "remove it"),
        ("version: 1\nrules: " + "[" * 30 + "]" * 30, "the YAML nests too deeply", None),
    ],
)
def test_one_mistake_one_message_with_its_place(text: str, message: str, hint: str | None) -> None:
    found, given = only_problem(text)
    assert message in found
    assert (hint is None and given is None) or (given is not None and hint is not None and hint in given)


def test_tabs_are_all_named() -> None:
    found = problems("version: 1\nrules:\n\t- match: a\n\t  method: b\n")
    assert found == ["3:1: error: a tab is used for indentation", "4:1: error: a tab is used for indentation"]


def test_all_mistakes_at_once_in_the_order_of_the_file(golden: Callable[[str, str], None]) -> None:
    text = """\
        version: 1
        budgt_bytes: 12
        budget_bytes: 12GB
        switches: {micro_batches: 0, checkpoints: ["h.*"], checkpoint: h}
        model: {fingerprint: [1], shapes: {a: 3, b: [x]}}
        rules:
          - mach: "h.*.w"
            method: slimadam
          - match: "re:["
            method: adamw
            lr: 1
            lr: 2
        """
    with pytest.raises(PlanError) as caught:
        parse_plan(textwrap.dedent(text), path="memadvise.yaml")
    golden("plan_mistakes.txt", str(caught.value) + "\n")
    lines = [problem.where.line for problem in caught.value.problems if problem.where]
    assert lines == sorted(lines)
    assert len(lines) == len(caught.value.problems) == 12


def test_the_standard_form_of_a_message() -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan("version: 1\nruls: 3\nrules: [{match: a, method: b}]\n", path="memadvise.yaml")
    assert str(caught.value) == (
        "memadvise.yaml:2:1: error: unknown key 'ruls' in the plan\n    ruls: 3\n    ^\n  hint: did you mean 'rules'?"
    )


def test_at_most_twenty_messages_are_shown() -> None:
    text = "version: 1\nrules:\n" + "  - {match: a}\n" * 25
    with pytest.raises(PlanError) as caught:
        parse_plan(text)
    assert len(caught.value.problems) == 25
    assert str(caught.value).count("has no 'method'") == 20
    assert "... and 5 more" in str(caught.value)


def test_a_newer_version_is_named_and_nothing_else_is_judged() -> None:
    found, hint = only_problem("# A memadvise plan, written by memadvise 9.1.0\nversion: 7\nfuture: x\n")
    assert found == "2:10: error: this plan, written by memadvise 9.1.0, has version 7; this memadvise reads version 1"
    assert hint is not None
    assert "update memadvise" in hint


def test_both_parsers_of_pyyaml_give_the_same_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    text = WHOLE + "  - {match: a, method: , x: [ ]}\n  -\nother:\n"
    with_c = compose(Source(text, "m.yaml"))
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert compose(Source(text, "m.yaml")) == with_c


def test_line_ends_of_windows_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + WHOLE.replace("\n", "\r\n").encode())
    assert load_plan(path) == parse_plan(WHOLE)


def test_files_that_cannot_be_a_plan(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"cannot read the plan .*No such file"):
        load_plan(tmp_path / "none.yaml")
    with pytest.raises(FileFormatError, match="Is a directory"):
        load_plan(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"version: 1\n\xff\xfe")
    with pytest.raises(FileFormatError, match=r"binary\.yaml:2: error: not UTF-8 text: byte 0xff"):
        load_plan(binary)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(FileFormatError, match=r"has 5,000,001 bytes"):
        load_plan(large)


def test_a_very_long_line_is_shown_around_the_caret() -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan(with_rule("{match: a, method: b, " + ", ".join(f"o{i}: {i}" for i in range(200)) + ", o7: 1}"))
    shown = str(caught.value).splitlines()
    assert len(shown[1]) <= 170
    assert shown[1][shown[2].index("^") :].startswith("o7: 1}")
