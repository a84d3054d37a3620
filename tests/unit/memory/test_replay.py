"""Categories, peaks and timelines from hand-made traces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memadvise.ledger import to_json
from memadvise.memory.events import Storage, Trace
from memadvise.memory.replay import build_ledger, categorize, thin
from memadvise.plan.schema import Switches


def _step() -> tuple[Trace, dict[str, int]]:
    """A steady step: 100 bytes of weights; a forward temporary, an activation, a gradient, a step temporary."""
    trace = Trace(device="cpu", granularity=1)
    numbers: dict[str, int] = {}

    def born(name, size, phase, module="", **more):
        numbers[name] = trace.born(Storage(size, f"op_{name}", module, phase, **more))

    trace.mark("setup")
    born("weights", 100, "setup", "layer", kind="weights")
    born("cache", 7, "forward", "layer")
    trace.start = len(trace.events)
    trace.mark("forward")
    born("dies_in_forward", 30, "forward", "layer")
    born("activation", 50, "forward", "layer")
    trace.died(numbers["dies_in_forward"])
    trace.mark("backward")
    born("recomputed", 5, "backward", "layer", recomputed=True)
    born("gradient", 100, "backward", "layer", kind="gradients")
    born("backward_temporary", 20, "backward")
    trace.died(numbers["recomputed"])
    trace.died(numbers["backward_temporary"])
    trace.died(numbers["activation"])
    trace.mark("step")
    born("foreach_temporary", 200, "step")
    trace.died(numbers["foreach_temporary"])
    trace.died(numbers["gradient"])
    trace.stop = len(trace.events)
    trace.mark("setup")
    return trace, numbers


def _ledger(trace):
    return build_ledger(trace, source="estimate", optimizer="none", switches=Switches())


def test_categories_are_decided_by_lifetime():
    trace, numbers = _step()
    categories = categorize(trace)
    assert {name: categories[number] for name, number in numbers.items()} == {
        "weights": "weights",
        "cache": "buffers",
        "dies_in_forward": "temporaries",
        "activation": "activations",
        "recomputed": "activations",
        "gradient": "gradients",
        "backward_temporary": "temporaries",
        "foreach_temporary": "temporaries",
    }


def test_peaks_by_phase_and_what_they_hold():
    ledger = _ledger(_step()[0])
    assert ledger.peak_bytes == 407
    assert ledger.peak_phase == "step"
    assert ledger.by_category == {"weights": 100, "gradients": 100, "temporaries": 200, "buffers": 7}
    assert {p.phase: p.peak_bytes for p in ledger.phases} == {"forward": 187, "backward": 282, "step": 407}
    assert ledger.phase("backward").by_category == {
        "weights": 100,
        "gradients": 100,
        "activations": 55,
        "temporaries": 20,
        "buffers": 7,
    }
    assert ledger.by_module == {
        "layer": {"weights": 100, "gradients": 100, "buffers": 7},
        "(optimizer)": {"temporaries": 200},
    }
    assert [t.num_bytes for t in ledger.live_at_peak] == [200, 100, 100, 7]
    assert ledger.live_at_peak[0].op == "op_foreach_temporary"
    assert ledger.num_events == 12
    assert max(level for _, level in ledger.timeline) == ledger.peak_bytes
    assert '"peak_bytes": 407' in to_json(ledger)


def test_every_phase_is_split_by_module_and_category_at_its_own_peak():
    ledger = _ledger(_step()[0])
    assert ledger.phase("forward").by_module == {
        "layer": {"weights": 100, "activations": 50, "temporaries": 30, "buffers": 7}
    }
    for phase in ledger.phases:
        for category, size in phase.by_category.items():
            assert size == sum(counts.get(category, 0) for counts in phase.by_module.values())
        assert sum(phase.by_category.values()) == phase.peak_bytes
    assert ledger.phase("step").by_module == ledger.by_module


def test_only_an_estimate_for_cuda_tells_what_the_device_must_hold():
    assert _ledger(_step()[0]).reserved == ()
    assert _ledger(_step()[0]).needed_bytes == _ledger(_step()[0]).comfortable_bytes == 407
    trace = _step()[0]
    trace.device, trace.granularity = "cuda", 512
    ledger = _ledger(trace)
    assert [r.settings for r in ledger.reserved] == ["default", "expandable_segments:True"]
    assert [r.peak_reserved_bytes for r in ledger.reserved] == [2 * 2**20] * 2  # one segment of the small pool
    assert ledger.needed_bytes == ledger.peak_bytes + sum(line.low_bytes for line in ledger.overhead)
    assert ledger.comfortable_bytes == 2 * 2**20 + sum(line.high_bytes for line in ledger.overhead)


def test_granularity_rounds_every_storage_up():
    trace, _ = _step()
    trace.granularity = 512
    ledger = _ledger(trace)
    assert ledger.peak_bytes == 6 * 512  # in the backward pass: all but the forward temporary
    assert ledger.peak_phase == "backward"
    assert sum(ledger.by_category.values()) == ledger.peak_bytes


def test_a_phase_that_allocates_nothing_still_holds_what_it_finds():
    trace = Trace(device="cpu", granularity=1)
    number = trace.born(Storage(10, "", "", "setup", kind="weights"))
    trace.start = 1
    trace.mark("forward")
    trace.born(Storage(5, "", "", "forward"))
    trace.mark("step")
    trace.died(number)
    trace.stop = len(trace.events)
    trace.mark("backward")  # after the last event
    ledger = _ledger(trace)
    assert {p.phase: p.peak_bytes for p in ledger.phases} == {"forward": 15, "backward": 5, "step": 15}


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=700), st.integers(4, 100))
def test_thinning_keeps_the_extremes_in_order(levels, limit):
    points = thin(levels, limit)
    assert len(points) <= max(limit, 4)
    assert [at for at, _ in points] == sorted({at for at, _ in points})
    assert all(levels[at] == level for at, level in points)
    assert max(level for _, level in points) == max(levels)
    assert min(level for _, level in points) == min(levels)


def test_thinning_leaves_short_lists_alone():
    assert thin([3, 1, 2], 2000) == ((0, 3), (1, 1), (2, 2))


@pytest.mark.parametrize("size", [2001, 50_000])
def test_thinned_timeline_has_at_most_2000_points(size):
    assert len(thin(list(range(size)), 2000)) <= 2000
