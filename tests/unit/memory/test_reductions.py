"""Scratch of sums on CUDA, against what an H200 with torch 2.11 was seen to take."""

from __future__ import annotations

import pytest
import torch

from memadvise.memory.architecture import MIB, device_model
from memadvise.memory.reductions import scratch
from memadvise.memory.trace import trace_step
from memadvise.target import Target

H200 = device_model("cuda", arch="sm_90", torch="2.11")


@pytest.mark.parametrize(
    ("rows", "columns", "partial", "semaphores"),
    [(2048, 1024, 16 * MIB, 32), (2048, 4096, 64 * MIB, 128)],  # biases of a GPT
)
def test_the_gradient_of_a_bias_is_summed_in_parts(rows: int, columns: int, partial: int, semaphores: int) -> None:
    x = torch.empty(rows, columns, device="meta")
    assert scratch(x, [0], H200) == [partial, semaphores]
    assert scratch(x.view(8, rows // 8, columns), [0, 1], H200) == [partial, semaphores]
    assert scratch(x.bfloat16(), [0], H200) == [partial, semaphores]  # summed in float32


@pytest.mark.parametrize(
    ("shape", "mib"),
    [  # of convolutions with channels last: gradients of the output
        ((8, 64, 56, 56), 3.0625),
        ((8, 128, 56, 56), 24.5),
        ((8, 256, 56, 56), 49.0),
        ((128, 128, 16, 16), 32.0),
        ((2, 512, 128, 128), 128.0),
        ((8, 768, 14, 14), 9.375),
    ],
)
def test_a_sum_over_pixels_with_channels_last(shape: tuple[int, ...], mib: float) -> None:
    x = torch.empty(shape, device="meta").to(memory_format=torch.channels_last)
    assert scratch(x, [0, 2, 3], H200)[0] == mib * MIB


def test_what_needs_none() -> None:
    assert scratch(torch.empty(512, 4096, device="meta"), [0], H200) == []  # each thread has few values
    assert scratch(torch.empty(4096, 512, device="meta"), [1], H200) == []  # rows, each by a few warps
    assert scratch(torch.empty(1, 512, device="meta"), [0], H200) == []
    assert scratch(torch.empty(0, 4, device="meta"), [0], H200) == []
    assert scratch(torch.empty((), device="meta"), [], H200) == []


def test_what_is_larger_than_2_gib_is_summed_in_halves() -> None:
    half, whole = (torch.empty(rows, 8192, device="meta") for rows in (2**16, 2**17))
    assert whole.nbytes == 4 * 2**30
    assert scratch(whole, [0], H200) == scratch(half, [0], H200)


def test_integers_are_summed_in_int64_and_sparse_ones_elsewhere() -> None:
    floats, numbers = (torch.empty(2048, 1024, dtype=dtype, device="meta") for dtype in (torch.float32, torch.int32))
    assert scratch(numbers, [0], H200)[0] == 2 * scratch(floats, [0], H200)[0]
    assert scratch(torch.eye(3).to_sparse(), [0], H200) == []


def test_a_whole_sum_takes_a_number_for_each_block() -> None:
    partial, semaphores = scratch(torch.empty(2**20, device="meta"), [], H200)
    assert partial <= 4 * 132 * 2048
    assert semaphores == 4


def test_fewer_multiprocessors_split_less() -> None:
    x = torch.empty(65536, 4096, device="meta")
    few, many = (scratch(x, [0], device_model("cuda", arch=arch))[0] for arch in ("sm_75", "sm_90"))
    assert few < many


def test_a_traced_bias_counts_it() -> None:
    target = Target(
        build_model=lambda: torch.nn.Linear(8, 1024),
        build_batches=lambda: [torch.zeros(2048, 8)],
        compute_loss=lambda model, batch: model(batch).square().mean(),
    )
    storages = trace_step(target, device=H200).storages
    sizes = {s.num_bytes for s in storages if s.kind == "workspace" and s.op == "aten.sum.dim_IntList"}
    assert sizes == {16 * MIB, 32}
