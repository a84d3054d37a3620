"""The knapsack solver against brute force and against scipy's MILP."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memadvise.advise.solver import Option, solve

options = st.builds(Option, st.integers(0, 40), st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 3)))
instances = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def brute_force(groups: list[list[Option]], budget: int) -> float | None:
    picks = itertools.product(*groups)
    return min((sum(o.harm for o in p) for p in picks if sum(o.num_bytes for o in p) <= budget), default=None)


@settings(max_examples=200, deadline=None)
@given(instances, st.integers(0, 150))
def test_small_instances_equal_brute_force(groups: list[list[Option]], budget: int) -> None:
    solution, truth = solve(groups, budget), brute_force(groups, budget)
    if truth is None:
        assert solution is None
        return
    assert solution is not None
    assert solution.optimal
    assert solution.note == "optimal"
    assert solution.harm == pytest.approx(truth, abs=1e-9)
    chosen = [group[i] for group, i in zip(groups, solution.choice, strict=True)]
    assert sum(o.num_bytes for o in chosen) == solution.num_bytes <= budget


def random_instance(num_groups: int, seed: int) -> tuple[list[list[Option]], int]:
    rng = random.Random(seed)
    groups = []
    for _ in range(num_groups):
        size, weight = int(rng.lognormvariate(14, 1.5)), rng.lognormvariate(0, 2)
        kept = sorted((rng.random() for _ in range(6)), reverse=True)
        smaller = [Option(int(size * k), weight * (1 - k) ** rng.uniform(0.5, 3)) for k in kept]
        groups.append([Option(size, 0.0), *smaller])
    full = sum(max(o.num_bytes for o in g) for g in groups)
    least = sum(min(o.num_bytes for o in g) for g in groups)
    return groups, max(least, int(0.55 * full))


def milp(groups: list[list[Option]], budget: int) -> float:
    from scipy.optimize import Bounds, LinearConstraint, milp

    cost = np.array([o.harm for g in groups for o in g])
    scale = 1.0 / budget
    size = np.array([o.num_bytes * scale for g in groups for o in g])
    rows = np.zeros((len(groups), cost.size))
    at = 0
    for i, group in enumerate(groups):
        rows[i, at : at + len(group)] = 1
        at += len(group)
    constraints = [LinearConstraint(rows, 1, 1), LinearConstraint(size[None, :], -np.inf, 1.0)]
    result = milp(cost, constraints=constraints, integrality=np.ones(cost.size), bounds=Bounds(0, 1))
    assert result.success
    return float(result.fun)


@pytest.mark.parametrize("seed", range(5))
def test_twenty_groups_are_solved_exactly(seed: int) -> None:
    groups, budget = random_instance(20, seed)
    solution = solve(groups, budget)
    assert solution is not None
    assert solution.optimal
    assert solution.harm == pytest.approx(milp(groups, budget), rel=1e-4)


def test_many_groups_state_their_gap() -> None:
    groups, budget = random_instance(300, 7)
    solution = solve(groups, budget, node_limit=500)
    assert solution is not None
    assert not solution.optimal
    assert "within" in solution.note
    truth = milp(groups, budget)
    assert solution.lower_bound <= truth * (1 + 1e-6)
    assert truth * (1 - 1e-4) <= solution.harm <= 1.02 * truth  # HiGHS stops at a relative gap of 1e-4
