"""Parameters of one kind: what is told of them is what following each would have recorded, event for event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from memadvise.advise.uniform import as_applied
from memadvise.ledger import Parameter
from memadvise.memory.alike import Courses
from memadvise.memory.events import Storage, Trace
from memadvise.memory.trace import trace_step
from memadvise.names import glob_escape
from memadvise.optim.create import create_optimizer, hold_weights
from memadvise.plan.schema import Plan, Rule, Setting, Switches
from memadvise.target import Target

SETTINGS = (
    Setting("adamw", {"first_moment": "int8", "second_moment": "int8"}),
    Setting("adamw", {"first_moment": "int4", "second_moment": "dynamic8"}),
    Setting("adamw", {"cautious": True, "first_moment": "int8"}),
    Setting("adamw", {"weights": "int8"}),
    Setting("slimadam", {"axes": [1], "first_moment": "int8"}),
    Setting("adafactor", {"momentum": 0.9, "first_moment": "int4"}),
    Setting("came"),
    Setting("apollo_mini"),
    Setting("apollo", {"rank": 8}),
    Setting("galore", {"rank": 8}),
    Setting("micro_adam"),
    Setting("adapprox", {"rank": 4}),
)


class Model(nn.Module):
    """Four layers of one shape, one narrower; one bias stays without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))
        self.out = nn.Linear(256, 192)
        self.idle = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.out(x).square().mean()


def traced(plan: Plan, device: str) -> Trace:
    return trace_step(
        Target(Model, lambda: [torch.zeros(8, 256)] * 2),
        device=device,
        prepare=lambda model: hold_weights(model, plan),
        make_optimizer=lambda model: create_optimizer(model, plan, lr=1e-3, executor="chunked"),
        switches=plan.switches,
    )


def plan_of(setting: Setting, release: bool) -> Plan:
    """``setting`` for the matrices, AdamW for the vectors."""
    names = [(name, tuple(p.shape)) for name, p in Model().named_parameters()]
    rules = []
    for name, shape in names:
        record = Parameter(name, shape, "float32", 0, True, "linear", "", "Linear")
        chosen = (as_applied(record, setting) if len(shape) > 1 else None) or Setting("adamw")
        rules.append(Rule(glob_escape(name), chosen.method, dict(chosen.options)))
    return Plan(tuple(rules), Switches(gradient_release=release))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.key)
def test_the_trace_is_the_same_event_for_event(setting: Setting, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[bool] = []
    course = Courses._course

    def counted(*args: Any) -> Any:
        followed.append(True)
        return course(*args)

    for release in (False, True):
        plan = plan_of(setting, release)
        monkeypatch.setattr(Courses, "_course", counted)
        followed.clear()
        quick = traced(plan, device)
        few = len(followed)
        monkeypatch.setattr(Courses, "_course", lambda *args: (followed.append(True), None)[1])
        followed.clear()
        whole = traced(plan, device)
        assert few <= len(followed) - 3  # of the four layers' steps
        assert quick.events == whole.events
        assert quick.storages == whole.storages
        assert (quick.marks, quick.start, quick.stop) == (whole.marks, whole.start, whole.stop)


# ---------------------------------------------------------------- what may be repeated


@pytest.fixture
def trace() -> Trace:
    return Trace("cpu", 1)


def courses(trace: Trace, place: tuple[str, str | None, str, bool] = ("", None, "step", False)) -> Courses:
    return Courses(trace, lambda: place)


def temporaries(trace: Trace, *, module: str = "") -> Callable[[], None]:
    def run() -> None:
        a, b = (trace.born(Storage(size, "op", module, "step")) for size in (8, 16))
        trace.died(a)
        trace.died(b)

    return run


def test_a_closed_course_is_written_down_again(trace: Trace) -> None:
    older = trace.born(Storage(4, "", "", "setup"))
    found = courses(trace)
    assert not found.repeat("a", temporaries(trace))
    assert found.repeat("a", lambda: pytest.fail("it is run again"))
    assert not found.repeat("b", temporaries(trace))
    assert trace.events == [older, 1, 2, ~1, ~2, 3, 4, ~3, ~4, 5, 6, ~5, ~6]
    assert [s.num_bytes for s in trace.storages] == [4, 8, 16, 8, 16, 8, 16]


def test_where_it_happens_is_where_the_next_one_is(trace: Trace) -> None:
    places = [("a", "x.py:1", "step", False), ("b", "x.py:2", "backward", False)]
    found = Courses(trace, lambda: places[0])

    def run() -> None:
        trace.died(trace.born(Storage(8, "op", "a", "step", "x.py:1")))

    found.repeat("k", run)
    places.pop(0)
    assert found.repeat("k", run)
    assert [(s.module, s.where, s.phase) for s in trace.storages] == [
        ("a", "x.py:1", "step"),
        ("b", "x.py:2", "backward"),
    ]


def test_what_keeps_or_frees_something_is_followed_every_time(trace: Trace) -> None:
    found, older = courses(trace), trace.born(Storage(4, "", "", "setup"))
    for run in (
        lambda: trace.born(Storage(8, "op", "", "step")),  # it stays
        lambda: trace.died(older),
        temporaries(trace, module="elsewhere"),
    ):
        assert not found.repeat("a", run)  # type: ignore[arg-type]
        before = len(trace.events)
        assert not found.repeat("a", lambda: None)
        assert len(trace.events) == before
        found = courses(trace)
