"""Every format of the check's verdicts, and names that try to break out of each."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace

import pytest
from baseline_entries import HOSTILE, MIB, MODULES, edited, make_entry, observation

from memadvise.check import Result, Status, compare
from memadvise.errors import Mark, TargetRaised
from memadvise.report import ci
from memadvise.report.check_text import render_check
from memadvise.report.escape import annotation, log_line, visible, xml
from memadvise.report.markdown import code


def results() -> list[Result]:
    bigger = edited("h.2.mlp", "activations", {"gelu float32": 3 * MIB, "mul float32": 9 * MIB})
    places = {("h.2.mlp", "activations", "mul float32"): "model.py:88"}
    regression = compare(observation(make_entry(bigger), places), make_entry(), place=("model.py", 3))
    elsewhere = compare(observation(make_entry(target="b.py")), make_entry(environment={"device": "cpu"}))
    better = edited("(loss)", "temporaries", {"_log_softmax float32": MIB})
    broken = TargetRaised("build_model() raised ValueError: no", where=Mark("d.py", 7), hint="mend it")
    return [
        compare(observation(make_entry(target="a.py")), make_entry()),
        regression,
        elsewhere,
        compare(observation(make_entry(better, target="c.py")), make_entry()),
        Result("d.py", Status.error, error=broken),
        compare(observation(make_entry(target="e.py")), None),
        compare(observation(make_entry(target="f.py")), make_entry(), budget_bytes=MIB),
    ]


def test_text_names_the_cause_first(golden: Callable[[str, str], None]) -> None:
    text = render_check(results())
    golden("check.txt", text)
    first = text.splitlines()[0]
    assert first == "+6.00 MiB (+12.0 %): activations of `h.2.mlp` (new: `mul` saved in fp32, model.py:88)"
    assert text.splitlines()[-1] == (
        "7 targets: 1 regression, 1 over budget, 1 error, 1 not comparable, 1 missing, 1 improved, 1 same"
    )


def test_markdown_is_a_comment(golden: Callable[[str, str], None]) -> None:
    golden("check.md", ci.markdown(results()))


def test_json_is_plain(golden: Callable[[str, str], None]) -> None:
    document = ci.document(results())
    text = json.dumps(document, indent=1, allow_nan=False)
    golden("check.json", text + "\n")
    assert [record["status"] for record in document["results"]] == [
        "same", "regression", "not comparable", "improved", "error", "missing", "over budget",
    ]  # fmt: skip
    assert document["results"][1]["delta_bytes"] == 6 * MIB


def test_junit_has_one_case_an_entry(golden: Callable[[str, str], None]) -> None:
    text = ci.junit(results())
    golden("check.xml", text)
    suites = ElementTree.fromstring(text)
    cases = suites.findall("./testsuite/testcase")
    assert len(cases) == len(results()) == int(suites.attrib["tests"])
    assert len(suites.findall(".//failure")) == 2 == int(suites.attrib["failures"])
    assert len(suites.findall(".//error")) == 3 == int(suites.attrib["errors"])
    failure = suites.find(".//failure")
    assert failure is not None
    assert failure.attrib["message"].startswith("+6.00 MiB (+12.0 %): activations of `h.2.mlp`")
    assert failure.text is not None
    assert "peak allocated" in failure.text


def test_annotations_are_five_at_most_and_point_at_the_line(golden: Callable[[str, str], None]) -> None:
    text = ci.github(results())
    golden("check.github.txt", text)
    commands = [line for line in text.splitlines() if line.startswith("::")]
    assert len(commands) == 5
    assert commands[0].startswith("::error file=model.py,line=88,title=Memory regression::+6.00 MiB (+12.0 %25): ")
    assert commands[2].startswith("::error file=d.py,line=7,title=Memory check failed::build_model() raised")
    many = [replace(results()[1], title=str(i)) for i in range(50)]
    assert sum(line.startswith("::error ") for line in ci.github(many).splitlines()) == 5


def test_an_improvement_alone_is_a_warning() -> None:
    assert "\n::warning " in ci.github([results()[3]])


def test_annotations_name_files_relative_to_the_checkout(tmp_path, monkeypatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert "::error file=sub/model.py,line=88," in ci.github([results()[1]], folder=str(tmp_path))


# ---------------------------------------------------------------- hostile names


@pytest.fixture
def hostile() -> list[Result]:
    """Everything that a model or a repository names, named to break out."""
    makers = {f"{HOSTILE} float32": 9 * MIB}
    entry = make_entry({**MODULES, HOSTILE: {"activations": makers}}, target=f"{HOSTILE}.py", plan=HOSTILE,
                       batch=(HOSTILE,), information={HOSTILE: HOSTILE})  # fmt: skip
    places = {(HOSTILE, "activations", f"{HOSTILE} float32"): f"{HOSTILE}.py:8"}
    found = compare(observation(entry, places), make_entry(batch=(HOSTILE,)), place=(f"{HOSTILE}.py", 1))
    assert found.status is Status.regression
    elsewhere = compare(observation(replace(entry, environment={HOSTILE: "1"})), make_entry())
    error = TargetRaised(HOSTILE, where=Mark(f"{HOSTILE}.py", 3), hint=HOSTILE)
    return [found, elsewhere, Result(HOSTILE, Status.error, error=error)]


def test_no_name_ends_a_line_or_colours_a_terminal(hostile: list[Result]) -> None:
    text = render_check(hostile)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert not any(line.lstrip().startswith("::") for line in text.splitlines())


def test_no_name_is_a_workflow_command(hostile: list[Result]) -> None:
    text = ci.github(hostile)
    lines = text.splitlines()
    commands = [line for line in lines if line.lstrip().startswith("::")]
    assert len(commands) == 3
    for line in commands:
        match = re.fullmatch(r"::error (?P<properties>[^:]*)::(?P<data>.*)", line)
        assert match is not None
        properties = match["properties"].split(",")
        assert [p.partition("=")[0] for p in properties] in (["file", "line", "title"], ["title"])
    assert not any("##[" in line for line in lines)  # the older form is a command anywhere in a line
    assert "\x1b" not in text


def test_no_name_leaves_its_element(hostile: list[Result]) -> None:
    text = ci.junit(hostile)
    assert text.isascii()
    suites = ElementTree.fromstring(text)
    assert {element.tag for element in suites.iter()} == {"testsuites", "testsuite", "testcase", "failure", "error"}
    assert len(suites.findall(".//testcase")) == 3
    assert HOSTILE.split("\n")[0] in suites.findall(".//testcase")[2].attrib["name"]


def test_no_name_is_markdown_or_html(hostile: list[Result]) -> None:
    text = ci.markdown(hostile)
    assert set(re.findall(r"<(/?[A-Za-z!][^>]*)>", text)) <= {
        "!-- memadvise check --", "details", "/details", "summary", "/summary", "code", "/code",
    }  # fmt: skip
    outside = re.sub(r"<code>.*?</code>|`[^`\n]*`", "", text)
    assert "@all" not in outside
    assert "img" not in outside
    for line in text.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (6, 7, 5)
    table = text.split("\n\n")[1].splitlines()
    assert len(table) == 2 + len(hostile)
    assert {len(re.findall(r"\|", line)) for line in table} == {6}


def test_json_keeps_names_as_they_are(hostile: list[Result]) -> None:
    document = json.loads(json.dumps(ci.document(hostile)))
    assert document["results"][0]["causes"][0]["module"] == HOSTILE


def test_markdown_stays_below_what_a_comment_holds(hostile: list[Result]) -> None:
    many = [replace(result, title=f"{i} {'x' * 5000}") for i in range(300) for result in hostile]
    text = ci.markdown(many)
    assert len(text) < 65_536
    assert re.search(r"\d+ more are not shown", text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb", r"a\nb"), ("\x00", r"\x00"), ("\ud800", r"\ud800"), ("\ufeff", r"\ufeff"), ("\U0001f600", "\U0001f600")],
)
def test_what_a_terminal_would_act_on_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_escapes() -> None:
    assert annotation("error", "100%\nb", file="a,b:c", line=3, title="t") == (
        "::error file=a%2Cb%3Ac,line=3,title=t::100%25%0Ab"
    )
    assert log_line("  ::stop-commands::x") == "\\  ::stop-commands::x"
    assert xml('<a b="1">\'&\x07\ufffe') == "&lt;a b=&quot;1&quot;&gt;&#x27;&amp;\\x07\\ufffe"
    assert code("`a`|<b>") == "<code>&#96;a&#96;&#124;&#60;b&#62;</code>"
    assert code("h.*.mlp") == "`h.*.mlp`"
