"""The pytest plugin: memory limits on tests, checked without a GPU and without a flag.

.. code-block:: python

    @pytest.mark.memadvise(budget="2 GiB")
    def test_the_model_fits():
        return memadvise.Target(build_model=GPT, build_batches=batches)   # or "model.py", or memadvise.load_target(...)

    def test_attention_saves_no_mask(memory_ledger):
        ledger = memory_ledger("model.py")
        assert ledger.by_category["activations"] < 2**30

A marked test returns a target, or hands it to ``memory_ledger``; it fails when the peak of one training step is above
the budget. pytest loads this module in every run of its users, so it imports nothing heavy until a test asks for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from memadvise.ledger import MemoryLedger

_MARKER = "memadvise"
_OPTIONS = ("budget", "device", "plan", "measure")
_USAGE = 'write @pytest.mark.memadvise(budget="2 GiB")'
_Seen = list[tuple[str, "MemoryLedger"]]
_seen = pytest.StashKey[_Seen]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        'memadvise(budget, device="cuda", plan=None, measure=False): one training step of the target that the test '
        "returns, or hands to memory_ledger, peaks within the budget, such as '2 GiB'; estimated without a GPU.",
    )


@pytest.fixture
def memory_ledger(request: pytest.FixtureRequest) -> Callable[..., MemoryLedger]:
    """``memory_ledger(target, device=..., plan=..., measure=...)``: where the bytes of one training step go.

    The target is a :class:`memadvise.Target` or what the command line takes, such as ``"model.py"``. Options default to
    those of the test's ``memadvise`` marker, whose budget holds for every target.
    """
    node = request.node
    options = _options(node.get_closest_marker(_MARKER)) if node.get_closest_marker(_MARKER) else {}
    seen = node.stash.setdefault(_seen, [])

    def ledger(target: Any, **given: Any) -> MemoryLedger:
        unknown = sorted(given.keys() - set(_OPTIONS[1:]))
        if unknown:
            raise TypeError(f"memory_ledger() takes no {', '.join(unknown)}; it takes {', '.join(_OPTIONS[1:])}")
        name, made = _take(target, **{key: value for key, value in {**options, **given}.items() if key != "budget"})
        seen.append((name, made))
        return made

    return ledger


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A mark that could not do anything fails the test instead of passing it."""
    mark = item.get_closest_marker(_MARKER)
    if mark is None:
        return
    _budget(_options(mark))
    test = getattr(item, "obj", None)
    if not isinstance(item, pytest.Function) or inspect.iscoroutinefunction(test) or _is_unittest(item):
        _fail("@pytest.mark.memadvise works on plain test functions only, not on coroutines or unittest's methods")


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """After a marked test: whatever it returned or measured is held against the budget."""
    mark = pyfuncitem.get_closest_marker(_MARKER)
    if mark is None:
        yield
        return
    returned: list[Any] = []
    test = pyfuncitem.obj

    def call(*args: Any, **kwargs: Any) -> None:
        returned.append(test(*args, **kwargs))

    pyfuncitem.obj = call
    try:
        outcome = yield
    finally:
        pyfuncitem.obj = test
    outcome.get_result()  # type: ignore[attr-defined]  # the test's own failure comes first
    options = _options(mark)
    seen = [*pyfuncitem.stash.setdefault(_seen, [])]
    if returned and returned[0] is not None:
        seen.append(_take(returned[0], **{key: value for key, value in options.items() if key != "budget"}))
    if not seen:
        _fail("the test is marked memadvise, and neither returned a target nor handed one to memory_ledger")
    budget = _budget(options)
    for name, ledger in seen:
        _hold(name, ledger, budget)


def _hold(name: str, ledger: MemoryLedger, budget: int) -> None:
    from memadvise.baseline import observe
    from memadvise.check import compare

    facts: dict[str, dict[str, str]] = {"environment": {"device": ledger.device}, "information": {}}
    result = compare(observe(ledger, target=name, plan=None, options={}, **facts), None, budget_bytes=budget)
    if result.over_budget_bytes:
        _fail(f"{result.headline}\npeak {ledger.peak_bytes} bytes, budget {budget} bytes: {result.title}")


def _take(
    target: Any, *, device: str = "cuda", plan: str | Path | None = None, measure: bool = False
) -> tuple[str, MemoryLedger]:
    """The name and the ledger of a target."""
    from memadvise.check_run import Lane, take_ledger
    from memadvise.memory.architecture import device_model
    from memadvise.plan.load import load_plan
    from memadvise.target import Target, load_target

    if isinstance(target, str | Path):
        target = load_target(str(target))
    if not isinstance(target, Target):
        _fail(f"expected a memadvise.Target or the name of one, found {type(target).__name__}")
    lane = Lane(device=device_model(device), plan=str(plan) if plan is not None else None, measure=measure)
    return target.spec, take_ledger(target, load_plan(plan) if plan is not None else None, lane)


def _options(mark: pytest.Mark | None) -> dict[str, Any]:
    assert mark is not None
    unknown = sorted(mark.kwargs.keys() - set(_OPTIONS))
    if mark.args or unknown or "budget" not in mark.kwargs:
        what = f"takes no {', '.join(unknown)}" if unknown else "takes a budget, by name"
        _fail(f"@pytest.mark.memadvise {what}: {_USAGE}; it takes {', '.join(_OPTIONS)}")
    return dict(mark.kwargs)


def _budget(options: dict[str, Any]) -> int:
    from memadvise.errors import UsageError
    from memadvise.units import parse_bytes

    try:
        return parse_bytes(str(options["budget"]))
    except UsageError as error:
        _fail(f"@pytest.mark.memadvise: {error}")


def _is_unittest(item: pytest.Item) -> bool:
    import unittest

    owner = getattr(item, "cls", None)
    return owner is not None and issubclass(owner, unittest.TestCase)


def _fail(reason: str) -> NoReturn:
    pytest.fail(reason, pytrace=False)
