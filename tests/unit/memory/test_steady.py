"""The steady step repeated: what it frees of the step before, the next one frees of it."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from memadvise.memory.allocator import MOST_STEPS, reservation
from memadvise.memory.allocator_config import MIB, AllocatorConfig
from memadvise.memory.events import Storage, Trace
from memadvise.memory.steady import end_of_step, further_steps
from memadvise.memory.trace import trace_step
from memadvise.target import Target


def _trace(sizes=(5, 7), *, kept=()):
    """Two equal steps: each makes a gradient, frees that of the step before, and has a batch and a temporary."""
    trace = Trace(device="cuda", granularity=512)
    gradient = None
    for step in range(2):
        trace.start = len(trace.events)
        batch = trace.born(Storage(3, "", "", "setup", kind="inputs"))
        temporary = trace.born(Storage(sizes[0], "mm", "layer", "forward"))
        trace.died(temporary)
        if gradient is not None:
            trace.died(gradient)
        gradient = trace.born(Storage(sizes[1], "mm", "layer", "backward", kind="gradients"))
        if step in kept:
            trace.born(Storage(9, "log", "", "step"))
        trace.stop = len(trace.events)
        trace.died(batch)
    return trace


def test_a_third_step_frees_what_the_second_left():
    trace = _trace()
    third, fourth = itertools.islice(further_steps(trace), 2)
    assert third == [(6, 3), (7, 5), (~7, 0), (~5, 0), (8, 7), (~6, 0)]
    assert fourth == [(9, 3), (10, 5), (~10, 0), (~8, 0), (11, 7), (~9, 0)]


def test_the_batch_goes_with_its_step():
    trace = _trace()
    assert end_of_step(trace) == trace.events


def test_a_step_that_leaves_more_behind_is_not_repeated():
    assert list(further_steps(_trace(kept=(1,)))) == []
    assert reservation(_trace(kept=(1,)), AllocatorConfig()).num_steps == 2


def test_what_the_first_step_alone_leaves_does_not_matter():
    assert len(list(itertools.islice(further_steps(_trace(kept=(0,))), 3))) == 3


def test_real_third_and_fourth_steps_are_those_of_the_steady_one():
    """Four traced steps and two traced steps repeated reserve the same."""
    batch = torch.zeros(64, 256)

    def target(steps):
        return Target(
            build_model=lambda: nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))),
            build_batches=lambda: iter([batch] * 2),
            train_step=lambda model, batch, optimizer: [_step(model, batch, optimizer) for _ in range(steps)][-1],
        )

    def _step(model, batch, optimizer):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    two, four = trace_step(target(1)), trace_step(target(2))
    assert len(list(itertools.islice(further_steps(two), 2))) == 2
    for config in (AllocatorConfig(), AllocatorConfig(expandable_segments=True)):
        assert reservation(two, config).peak_reserved_bytes == reservation(four, config).peak_reserved_bytes


def test_steps_are_added_until_nothing_more_is_reserved():
    found = reservation(_trace(sizes=(30 * MIB, 20 * MIB)), AllocatorConfig())
    assert (
        found.peak_reserved_bytes == 62 * MIB
    )  # the first gradient splits a segment of 30 MiB, which the second step lacks
    assert found.num_steps == 3 <= MOST_STEPS
