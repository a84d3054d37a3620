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
BLOCK = 2**16  # a chunk's pieces are larger
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
    for _ in range(3):
        with larger_blocks_from_the_kernel():
            REFERENCES.write_text("5")  # the mark begins anew
            before = status("VmRSS")
            step()
            grown.append(status("VmHWM") - before)
    return sorted(grown)[1]


@contextlib.contextmanager
def larger_blocks_from_the_kernel() -> Iterator[None]:
    """Let the C library take every block of 64 KiB and more from the kernel and give it back at once.

    Its heap would hide a temporary in pages that it kept, or count one several times: temporaries that follow each
    other may each be put into another hole that earlier tests left, and all those pages stay. A lower threshold is
    not enough, as a hole is used before the threshold is asked; so what holes there are is taken, untouched.
    """
    libc, threshold = heap(), -3  # M_MMAP_THRESHOLD of mallopt(3)
    if libc is None:
        yield
        return
    assert libc.mallopt(threshold, BLOCK)
    plugs, size = [], 64 * MIB
    while size >= BLOCK:
        block = libc.malloc(size)
        if mapped(block):  # there is no such hole left
            libc.free(block)
            size //= 2
        else:
            plugs.append(block)
    try:
        yield
    finally:
        for block in plugs:
            libc.free(block)
        assert libc.mallopt(threshold, 32 * MIB)


def mapped(block: int) -> bool:
    """Whether glibc took this block from the kernel: the second bit of the size before it (malloc/malloc.c)."""
    return bool(ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2)


def heap() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    return libc


def test_the_mark_sees_a_temporary() -> None:
    assert growth(lambda: torch.ones(SHAPE).sum()) > 30 * MIB


def test_the_mark_sees_a_temporary_in_a_hole_of_the_heap() -> None:
    """Which a step of three before it has filled with pages, and which is served before the kernel is asked."""
    libc = heap()
    if libc is None:
        pytest.skip("only glibc keeps such holes")
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
