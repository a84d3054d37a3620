"""The CPU allocator's own events, from torch.profiler: what was allocated and freed, by whom, in order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

MEMORY = "[memory]"
_LOG_LEVEL = "KINETO_LOG_LEVEL"


class AllocatorLog:
    """Filled when :func:`allocator_log` closes: profiler nodes in the order of time."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []

    def sizes(self) -> list[int]:
        """Bytes of each allocation (positive) and each free (negative)."""
        return [node.extra_fields.alloc_size for node in self.nodes if node.name == MEMORY]


@contextlib.contextmanager
def allocator_log() -> Iterator[AllocatorLog]:
    """Log the CPU allocator while open. Not to be nested in another profiler."""
    log = AllocatorLog()
    level = os.environ.get(_LOG_LEVEL)
    os.environ.setdefault(_LOG_LEVEL, "99")  # read when the profiler first starts: keeps its own lines off stderr
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield log
    finally:
        if level is None:
            os.environ.pop(_LOG_LEVEL, None)
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    if results is not None:
        log.nodes = sorted(_walk(results.experimental_event_tree()), key=lambda node: node.start_time_ns)


def _walk(nodes: Any) -> Iterator[Any]:
    stack = list(reversed(nodes))
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))
