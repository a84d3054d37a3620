"""cuDNN's workspaces and reserves: the rules against a recording, and recurrent layers in a trace."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from memadvise.memory.architecture import MIB, device_model
from memadvise.memory.estimate import estimate
from memadvise.memory.trace import trace_step
from memadvise.target import Target

ROOT = Path(__file__).parents[3]
if str(ROOT / "benchmarks") not in sys.path:
    sys.path.append(str(ROOT / "benchmarks"))
from record_cudnn import errors  # noqa: E402

RECORDING = json.loads((ROOT / "tests/data/cudnn/h200.json").read_text(encoding="utf-8"))
ERRORS = dict(errors(RECORDING))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_take_what_was_measured(kind: str) -> None:
    assert max(map(abs, ERRORS[f"{kind}: reserve"])) < 1e-3
    workspaces = sorted(map(abs, ERRORS[f"{kind}: workspace"]))
    assert statistics.median(workspaces) < 1e-3
    assert workspaces[-1] < 0.06


@pytest.mark.parametrize("name", [name for name in ERRORS if name.endswith((": output", ": of input"))])
def test_most_convolutions_take_copies(name: str) -> None:
    found = [abs(error) for error in ERRORS[name]]
    assert statistics.median(found) < 1e-3
    assert sum(error < 0.05 for error in found) > 0.65 * len(found)


def test_gradients_of_weights_are_near_in_float32() -> None:
    found = [abs(error) for error in ERRORS["convolution float32, contiguous: of weight, bias"]]
    assert statistics.median(found) < 0.02


# ---------------------------------------------------------------- recurrent layers, traced


class Body(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0].square().mean()


def _sizes(layer: nn.RNNBase, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[int]:
    """Bytes of every allocation above 1 MiB that the layer makes in a step, in order."""
    trace = trace_step(
        Target(build_model=lambda: Body(layer).to(dtype), build_batches=lambda: [x.to(dtype)]),
        device=device_model("cuda", arch="sm_90"),
    )
    born = [trace.storages[number] for number in trace.events[trace.start : trace.stop] if number >= 0]
    return [s.num_bytes for s in born if s.module == "layer" and s.num_bytes > MIB and s.phase != "step"]


def test_an_lstm_is_one_call_as_on_an_h200() -> None:
    measured = {
        tuple(case[5]): case[6:] for case in RECORDING["recurrent"] if case[:5] == ["LSTM", 2, False, 0.0, "float32"]
    }
    workspace, reserve = measured[64, 16, 512, 512]
    weights = 4 * sum(p.numel() for p in nn.LSTM(512, 512, 2).parameters())
    forward, backward = [2 * MIB, workspace, reserve], [2 * MIB, workspace, weights, workspace]
    assert _sizes(nn.LSTM(512, 512, 2), torch.zeros(64, 16, 512)) == forward + backward


def test_weights_are_put_side_by_side_where_the_module_does_not_keep_them_so() -> None:
    layer, x = nn.GRU(256, 512), torch.zeros(64, 16, 256)
    weights = sum(p.numel() for p in layer.parameters())
    assert _sizes(layer, x).count(4 * weights) == 1  # their gradients
    assert _sizes(layer, x, torch.bfloat16).count(2 * weights) == 2


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(16, 32, 2, proj_size=8),
        nn.GRU(16, 32, bias=False, bidirectional=True),
        nn.RNN(16, 32, nonlinearity="relu"),
        nn.LSTM(16, 32, 2, dropout=0.5).eval(),
        nn.LSTM(16, 32).double(),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(12, 4, 16), (12, 16)], ids=["a batch", "one"])
def test_every_kind_of_layer_is_traced(layer: nn.RNNBase, shape: tuple[int, ...]) -> None:
    dtype = next(layer.parameters()).dtype
    target = Target(build_model=lambda: Body(layer), build_batches=lambda: [torch.zeros(shape, dtype=dtype)])
    found = estimate(target)
    assert found.source == "estimate"
    assert not found.warnings
    assert found.peak_bytes > 8 * MIB


def test_without_cudnn_it_is_many_small_operations() -> None:
    class Off(Body):
        def forward(self, x):
            with torch.backends.cudnn.flags(enabled=False):
                return super().forward(x)

    target = Target(build_model=lambda: Off(nn.LSTM(16, 32)), build_batches=lambda: [torch.zeros(12, 4, 16)])
    ops = {storage.op for storage in trace_step(target).storages}
    assert "aten.sigmoid.default" in ops
    assert estimate(target).phase("forward").peak_bytes < 8 * MIB + 2 * 32 * MIB


def test_packed_sequences_count_what_they_hold() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(64, 512)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([32, 16, 16, 8]))
            return self.layer(packed)[0].data.square().mean()

    target = Target(build_model=Packed, build_batches=lambda: [torch.zeros(32, 4, 64)])
    trace = trace_step(target, tensors="real")  # how many tokens there are depends on values
    reserve = (32 + 16 + 16 + 8) * 512 * 5 * 4 + 256
    assert reserve in {storage.num_bytes for storage in trace.storages}


def test_recurrent_layers_learn_on_real_tensors_and_under_autocast() -> None:
    def step(model, batch, optimizer):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def target() -> Target:
        return Target(
            build_model=lambda: Body(nn.LSTM(32, 64, 2, batch_first=True, bidirectional=True, dropout=0.1)),
            build_batches=lambda: [torch.zeros(8, 16, 32)],
            train_step=step,
        )

    fake, real = (estimate(target(), tensors=tensors) for tensors in ("fake", "real"))
    assert real.peak_bytes == fake.peak_bytes
    assert "follow rules that were measured" in " ".join(fake.assumptions)
