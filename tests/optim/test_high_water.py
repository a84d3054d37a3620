"""What a step takes beside what is there, by the kernel's own high-water mark, which misses nothing."""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.plan.schema import Setting

MIB = 2**20
SHAPE = (8192, 1024)  # 32 MiB
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REFERENCES.exists(), reason="only Linux counts a process's high-water mark"),
]


def status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def growth(step: Callable[[], object]) -> int:
    """By how many bytes the resident memory of this process grew while ``step`` ran: the median of three, as the
    interpreter and other threads take pages, too, now and then.
    """
    grown = []
    with fresh_pages() as give_back:
        for _ in range(3):
            give_back()
            REFERENCES.write_text("5")  # the mark begins anew
            before = status("VmRSS")
            step()
            grown.append(status("VmHWM") - before)
    return sorted(grown)[1]


@contextlib.contextmanager
def fresh_pages() -> Iterator[Callable[[], object]]:
    """Let the C library take every larger block from the kernel and give it back: its heap would hide a temporary in
    pages that it kept, or count one several times where it spreads over holes that other tests left.

    Yields what gives back the pages of holes that are large enough to serve a block all the same: before each
    measurement, as a block that was freed leaves its pages in the hole.
    """
    libc, threshold = ctypes.CDLL(None), -3  # M_MMAP_THRESHOLD of mallopt(3)
    if not hasattr(libc, "malloc_trim"):  # not glibc
        yield lambda: None
        return
    assert libc.mallopt(threshold, 64 * 1024)
    try:
        yield lambda: libc.malloc_trim(0)
    finally:
        assert libc.mallopt(threshold, 32 * MIB)


def test_the_mark_sees_a_temporary() -> None:
    assert growth(lambda: torch.ones(SHAPE).sum()) > 30 * MIB


def test_the_mark_sees_a_temporary_in_a_hole_of_the_heap() -> None:
    """Which a step of three before it has filled with pages, and which is served before the kernel is asked."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("only glibc keeps such holes")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    assert libc.mallopt(-3, 32 * MIB)
    *hole, above = (libc.malloc(20 * MIB) for _ in range(4))  # what lies above keeps the heap from being cut off
    for block in hole:
        libc.free(block)
    try:
        assert growth(lambda: torch.ones(SHAPE).sum()) > 30 * MIB
    finally:
        libc.free(above)


@pytest.mark.parametrize("executor", ["compiled", "chunked"])
@pytest.mark.parametrize(
    "setting",
    [
        Setting("slimadam", {"axes": [1]}),
        Setting("slimadam", {"axes": [0]}),
        Setting("adam_mini", {"partition": "whole"}),
        Setting("lion"),
        Setting("adafactor"),
        Setting("came"),
        Setting("adamw", {"cautious": True}),
        Setting("slimadam", {"axes": [1], "first_moment": "int8"}),
        Setting("adamw", {"first_moment": "int8", "second_moment": "int8"}),
    ],
    ids=lambda s: s.key,
)
def test_four_mebibytes_and_the_scratch_that_is_reported(setting: Setting, executor: str) -> None:
    if executor == "compiled" and shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler here")
    optimizer = made(setting, executor)
    assert growth(optimizer.step) <= 4 * MIB + optimizer.memory()[0].scratch_bytes


@pytest.mark.parametrize(
    "setting",
    [
        Setting("apollo_mini"),
        Setting("apollo", {"rank": 64}),
        Setting("galore", {"rank": 64}),
        Setting("adapprox", {"rank": 8, "adapt_every": 0}),
    ],
    ids=lambda s: s.key,
)
def test_never_more_than_the_largest_tensor_for_low_rank(setting: Setting) -> None:
    assert growth(made(setting, None).step) <= 32 * MIB


def made(setting: Setting, executor: str | None) -> MemadviseOptimizer:
    p = nn.Parameter(torch.randn(SHAPE))
    p.grad = torch.randn(SHAPE) * 1e-3
    optimizer = MemadviseOptimizer([("p", p)], setting, lr=1e-3, executor=executor)
    for _ in range(2):
        optimizer.step()
    return optimizer
