"""The pytest plugin, in runs of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memadvise
from memadvise.check_run import Lane, take_ledger
from memadvise.memory.architecture import device_model
from memadvise.plan.load import parse_plan

pytest_plugins = ["pytester"]
PLUGIN = "memadvise.integrations.pytest_plugin"
# The entry point is left out where it is installed, and the module given in its place.
ARGS = ("-p", "no:memadvise", "-p", PLUGIN, "-p", "no:cacheprovider", "-p", "no:randomly", "--strict-markers")
MODEL = """
import pytest, torch
from torch import nn
import memadvise

def build():
    return nn.Linear(512, 512, bias=False)  # 1 MiB of weights: 4 with gradients and state, and a foreach temporary

target = memadvise.Target(build, lambda: [torch.zeros(2, 512)], lambda model, batch: model(batch).sum())
"""


@pytest.fixture(scope="module", autouse=True)
def _all_of_torch_is_there() -> None:
    """pytester forgets what a run imports, and the parts of torch that a trace asks for cannot be imported twice."""
    target = memadvise.Target(
        lambda: torch.nn.Linear(2, 1), lambda: [torch.zeros(2, 2)], lambda model, batch: model(batch).sum()
    )
    plan = parse_plan('version: 1\nrules:\n  - {match: "**", method: sgd}\n')
    for lane in (Lane(), Lane(device=device_model("cpu"), measure=True)):
        take_ledger(target, plan, lane)


def run(pytester: pytest.Pytester, body: str, *args: str) -> pytest.RunResult:
    pytester.makepyfile(MODEL + body)
    return pytester.runpytest_inprocess(*ARGS, *args)


def test_a_returned_target_is_held_against_the_budget(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.memadvise(budget="1 GiB")
def test_fits():
    return target

@pytest.mark.memadvise(budget="3 MiB", device="cpu")
def test_does_not():
    return target
""",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*over the budget of 3.00 MiB: optimizer state of (model) (largest: 2.00 MiB)*"])
    assert "PytestReturnNotNone" not in result.stdout.str()


def test_a_target_built_for_the_fixture_is_held_too(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.memadvise(budget="3 MiB", device="cpu")
def test_over(memory_ledger):
    assert memory_ledger(target).device == "cpu"

def test_without_a_mark(memory_ledger):
    ledger = memory_ledger(target, device="cpu")
    assert ledger.by_category["weights"] == 512 * 512 * 4
    with pytest.raises(TypeError, match="memory_ledger.. takes no budget"):
        memory_ledger(target, budget="1 GiB")
""",
    )
    result.assert_outcomes(passed=1, failed=1)


def test_names_of_targets_and_plans(pytester: pytest.Pytester) -> None:
    model = "import torch\nbuild_model = lambda: torch.nn.Linear(512, 512, bias=False)\n"
    model += "build_batches = lambda: [torch.zeros(2, 512)]\ncompute_loss = lambda m, b: m(b).sum()\n"
    pytester.makefile(".py", model=model)
    pytester.makefile(".yaml", plan='version: 1\nrules:\n  - {match: "**", method: sgd}\n')
    result = run(
        pytester,
        """
def test_state(memory_ledger):
    assert memory_ledger("model.py").state_bytes > 2 * 2**20
    assert memory_ledger("model.py", plan="plan.yaml").state_bytes <= 2**20
    assert memory_ledger("model.py", device="cpu", measure=True).source == "measure"
""",
    )
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("@pytest.mark.memadvise\ndef test_x():\n    return target", "*takes a budget, by name*"),
        ("@pytest.mark.memadvise('2 GiB')\ndef test_x():\n    return target", "*takes a budget, by name*"),
        ("@pytest.mark.memadvise(budget='much')\ndef test_x():\n    return target", "*'much' is not a size in bytes*"),
        ("@pytest.mark.memadvise(budget=1, limit=2)\ndef test_x():\n    return target", "*takes no limit*"),
        ("@pytest.mark.memadvise(budget='1GB')\ndef test_x():\n    pass", "*neither returned a target nor handed*"),
        (
            "@pytest.mark.memadvise(budget='1GB')\ndef test_x():\n    return 7",
            "*a memadvise.Target*found int*",
        ),
        ("@pytest.mark.memadvise(budget='1GB')\nasync def test_x():\n    return target", "*plain test functions only*"),
        (
            "import unittest\nclass TestX(unittest.TestCase):\n    @pytest.mark.memadvise(budget='1GB')\n"
            "    def test_x(self):\n        pass",
            "*plain test functions only*",
        ),
    ],
)
def test_a_mark_that_can_do_nothing_fails(pytester: pytest.Pytester, body: str, message: str) -> None:
    result = run(pytester, body)
    assert result.ret == 1
    result.stdout.fnmatch_lines([message])


def test_a_failing_test_fails_for_its_own_reason(pytester: pytest.Pytester) -> None:
    result = run(pytester, "@pytest.mark.memadvise(budget=1)\ndef test_x():\n    raise ValueError('mine')")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*ValueError: mine"])
    assert "budget" not in result.stdout.str().split("short test summary")[1]


def test_skips_parameters_and_classes(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
class TestModels:
    @pytest.mark.parametrize("width", [8, 16])
    @pytest.mark.memadvise(budget="1 GiB")
    def test_width(self, width):
        if width == 16:
            pytest.skip("not today")
        return memadvise.Target(lambda: nn.Linear(width, 1), lambda: [torch.zeros(2, width)], lambda m, b: m(b).sum())
""",
    )
    result.assert_outcomes(passed=1, skipped=1)


def test_a_run_without_marks_imports_neither_torch_nor_memadvise_whole(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        "import sys\ndef test_nothing():\n"
        "    assert 'memadvise.integrations.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'typer', 'yaml', 'memadvise.ledger', 'memadvise.check'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", *ARGS, "--rootdir", str(tmp_path), str(tmp_path)]
    found = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert "1 passed" in found.stdout


def test_the_marker_is_explained(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess(*ARGS, "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.memadvise(budget, *"])
