"""Scratch of CUDA kernels, operation by operation, against what their sources allocate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memadvise.memory.architecture import MIB, device_model
from memadvise.memory.estimate import estimate
from memadvise.memory.trace import trace_step
from memadvise.target import Target

BATCH, HEADS, LENGTH, DIM = 2, 4, 200, 48


def _scratch(loss, *shapes, op, dtype=torch.float32, arch="sm_80", **assumed):
    """Sizes of the scratch blocks of ``op`` in one step whose loss is a function of parameters of these shapes."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes])

        def forward(self, x):
            return loss(*self.weights).sum()

    trace = trace_step(
        Target(build_model=Model, build_batches=lambda: [torch.zeros(1)]),
        device=device_model("cuda", arch=arch, **assumed),
    )
    born = [number for number in trace.events[trace.start : trace.stop] if number >= 0]
    found = (trace.storages[number] for number in born)
    return [s.num_bytes for s in found if s.kind == "workspace" and s.op.startswith(f"aten.{op}")]


def _attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


QKV = [(BATCH, HEADS, LENGTH, DIM)] * 3
ROWS = 4 * BATCH * HEADS * LENGTH


def test_flash_backward_accumulates_dq_in_tiles():
    op, half = "_scaled_dot_product_flash_attention_backward", torch.bfloat16
    tiles = [4 * BATCH * HEADS * 256 * 64, 4 * BATCH * HEADS * 256]
    assert _scratch(lambda *t: _attend(*t).transpose(1, 2).reshape(-1), *QKV, op=op, dtype=half)[:2] == tiles
    grouped = [QKV[0], *[(BATCH, 2, LENGTH, DIM)] * 2]
    found = _scratch(_attend, *grouped, op=op, dtype=half)
    assert found[:4] == [*tiles, *[2 * BATCH * HEADS * LENGTH * DIM] * 2]


def test_cudnn_backward_accumulates_dq_whole():
    op = "_scaled_dot_product_cudnn_attention_backward"
    found = _scratch(_attend, *QKV, op=op, dtype=torch.bfloat16, arch="sm_90")
    assert found[0] == ROWS * DIM + ROWS


def test_efficient_backward_sums_rows_outside_the_kernel_in_fp32():
    op = "_scaled_dot_product_efficient_attention_backward"
    # The gradient of a sum is expanded: the kernel wants it contiguous.
    accumulators = 4 * BATCH * HEADS * 4 * (64 * 64 + 4)  # more than the product of gradient and output before it
    assert _scratch(_attend, *QKV, op=op) == [ROWS * DIM, ROWS, accumulators]
    half = _scratch(_attend, *QKV, op=op, dtype=torch.bfloat16, attention="efficient")
    assert half == [ROWS * DIM // 2, ROWS, 4 * BATCH * HEADS * 4 * (64 * 64 + 4)]


def test_softmax_backward_multiplies_gradient_and_output_first():
    assert _scratch(lambda x: F.softmax(x, -1) * 2, (8, 64), op="_softmax_backward_data") == [4 * 8 * 64]
    assert _scratch(lambda x: F.log_softmax(x, -1) * 2, (8, 64), op="_log_softmax_backward_data") == []


def test_embedding_backward_sorts_when_there_are_many_indices():
    def loss_of(count):
        return lambda table: F.embedding(torch.zeros(count, dtype=torch.long), table) * 2

    op, rows, width = "embedding_dense_backward", 1000, 64
    assert _scratch(loss_of(3072), (rows, width), op=op) == []
    partial = 5000 // 10 + rows
    assert _scratch(loss_of(5000), (rows, width), op=op) == [
        *[8 * 5000] * 2,
        *[8 * rows] * 3,
        8 * partial,
        4 * width * partial,
    ]


def test_indexing_backward_sorts_its_indices():
    def loss(table):
        return table[torch.zeros(700, dtype=torch.long)] * 2

    assert _scratch(loss, (50, 8), op="index_put") == [*[8 * 700] * 4, 16 * 700]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 4096), []),  # in place
        ((5000,), [8 * 5000, 12 * 5000]),
        ((3, 5000), [8 * 15000, 8 * 15000, 4 * 15000, 12 * 15000]),
        ((200, 5000), [8 * 10**6, 12 * 10**6]),
    ],
)
def test_sort_in_its_ways(shape, expected):
    assert _scratch(lambda t: t.sort()[0], shape, op="sort") == expected


def test_norms_keep_partial_sums():
    assert _scratch(lambda x, w: F.layer_norm(x, (64,), w), (70_000, 64), (64,), op="native_layer_norm_backward")[
        -1
    ] == 64 * 4 * min(32 * 1024 // 2, -(-70_000 // 32))
    found = _scratch(lambda x: F.group_norm(x, 4), (2, 8, 5, 5), op="native_group_norm_backward")
    assert found[-5:] == [4 * 2 * 8] * 3 + [4 * 2 * 4] * 2
    assert _scratch(lambda x: F.group_norm(x, 4), (2, 8, 5, 5), op="native_group_norm.default") == [4 * 2 * 8] * 2


def test_a_product_copies_what_cublas_cannot_read():
    assert _scratch(lambda a, b: a[:, ::2] @ b, (40, 60), (30, 50), op="mm")[0] == 4 * 40 * 30
    assert (
        _scratch(lambda a, b: a.T @ b, (30, 40), (30, 50), op="mm.default") == [4 * 40 * 50] * 2
    )  # the expanded gradient


def test_clipping_keeps_a_number_for_every_chunk():
    def step(model, batch, optimizer):
        model(batch).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    target = Target(
        build_model=lambda: nn.Linear(512, 512, bias=False),
        build_batches=lambda: [torch.zeros(2, 512)],
        train_step=step,
    )
    trace = trace_step(target)
    assert {s.num_bytes for s in trace.storages if s.op == "aten._foreach_norm.Scalar" and s.kind} == {4 * 4}


def test_convolutions_take_what_is_assumed_and_the_rule_is_told():
    target = Target(
        build_model=lambda: nn.Conv2d(16, 8, 3),
        build_batches=lambda: [torch.zeros(4, 16, 32, 32)],
        compute_loss=lambda model, batch: model(batch).square().mean(),
    )
    copies = 4 * (4 * 16 * 32 * 32 + 8 * 16 * 9 + 4 * 8 * 30 * 30)
    assert [s.num_bytes for s in _of_convolutions(target)] == [copies, copies + 14 * 4 * 8 * 16 * 9] * 2
    assert "counted by a rule that was measured" in " ".join(estimate(target).assumptions)
    assumed = device_model("cuda", cudnn_workspace=5 * MIB)
    assert [s.num_bytes for s in _of_convolutions(target, assumed)] == [5 * MIB] * 4
    assert "counted as assumed" in " ".join(estimate(target, device=assumed).assumptions)
    assert _of_convolutions(target, device_model("cuda", cudnn_workspace=0)) == []


def _of_convolutions(target, device="cuda"):
    storages = trace_step(target, device=device).storages
    return [s for s in storages if s.op.startswith("aten.convolution") and s.kind == "workspace"]
