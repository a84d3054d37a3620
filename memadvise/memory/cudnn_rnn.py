"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` as cuDNN runs them, on fake CPU tensors: one call for all layers and times.

What it keeps for the backward pass (the reserve) and takes while it runs (the workspace) torch asks cuDNN for, which is
closed. Both were measured in 432 cases (three kinds, one to three layers, both directions, dropout, float32 and
bfloat16, twelve shapes) on an H200 with cuDNN 9.19. The reserve follows exactly; so does the workspace of one layer,
and that of several within 0.5 %. Around them the calls are those of ``aten/src/ATen/native/cudnn/RNN.cpp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
_KEPT = {"lstm": 5, "gru": 6, "rnn": 1}  # values of the reserve for every output of every layer
_SMALL = {
    "lstm": (256, 16),
    "gru": (256, 14),
    "rnn": (512, 9),
}  # hidden size below which float32 takes more, and how much
_LAYER, _HEAD = 8 * 2**20, 256  # bytes
_SHORT = 10  # time steps
_FLATTENED = (torch.float32, torch.float16, torch.float64)  # dtypes whose weights a module keeps in one piece


@dataclass(frozen=True)
class Call:
    """One call. ``length``: time steps; ``rows``: elements of a batch; ``tokens``: length times rows, less where packed
    sequences end early; ``width``: features of the input.
    """

    kind: str
    layers: int
    directions: int
    length: int
    rows: int
    tokens: int
    width: int
    hidden: int
    dropout: float
    itemsize: int

    @property
    def num_weights(self) -> int:
        """Elements of all matrices, without biases."""
        widths = [self.width, *[self.hidden * self.directions] * (self.layers - 1)]
        return self.directions * _GATES[self.kind] * self.hidden * sum(width + self.hidden for width in widths)

    @property
    def reserve_bytes(self) -> int:
        """What is kept for the backward pass."""
        outputs = self.tokens * self.hidden * self.directions
        values = outputs * (self.layers * _KEPT[self.kind] + self.layers - 1)
        mask = outputs * self.directions * (self.layers - 1) // 8 if self.dropout else 0
        return values * self.itemsize + mask + _HEAD

    @property
    def workspace_bytes(self) -> int:
        """What is taken while the call, or each of the two of its backward pass, runs."""
        a_time, once = self._states()
        states = self.hidden * (self.tokens * a_time + self.rows * once) + 2 * self.rows
        below, more = _SMALL[self.kind]
        if self.itemsize == 4 and self.hidden < below:
            states += self.hidden * (self.tokens * more + self.rows)
        return _HEAD + self.layers * self.directions * _LAYER + self.itemsize * (self.num_weights + math.ceil(states))

    def _states(self) -> tuple[float, float]:
        """Values that are held for each hidden feature: of every time step, and once."""
        layers, share, dropped = self.layers, self.width / self.hidden, self.dropout > 0
        wide = max(0.0, share - 1)
        share = min(share, 1.0)
        if self.kind == "lstm":
            if self.directions == 2:
                return 14 + share + 3 * wide, 24 * layers
            return 5 + share + 3 * wide + (dropped and layers > 1), 11 if layers == 1 else 10 * layers
        if self.directions == 2:
            first = (12 if self.kind == "gru" else 10) + share * (1 if self.kind == "gru" else 2)
            return (first if layers == 1 else 12 + 2 * share) + 5 * wide, 14 * layers
        if layers == 1 or self.length < _SHORT or (dropped and self.kind == "gru"):
            return 4 + 2 * share + 3 * wide, 5 * layers
        return 3 + 2 * share + 3 * wide, 13 * layers  # layers overlap in time


def cuda_rnn(kind: str) -> Callable[..., Any]:
    """A kernel for ``aten::lstm.input`` and its kin."""

    def run(
        x: Tensor, hx: Any, params: list[Tensor], has_biases: bool, layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        x = x.transpose(0, 1) if batch_first else x
        length, rows = x.shape[:2]
        sizes = (length, rows, length * rows)
        out, *states = _run(kind, x, hx, params, layers, dropout if train else 0.0, bidirectional, sizes)
        return (out.transpose(0, 1) if batch_first else out, *states)

    return run


def cuda_packed_rnn(kind: str) -> Callable[..., Any]:
    """The same for packed sequences, ``aten::lstm.data`` and its kin."""

    def run(
        x: Tensor, batch_sizes: Tensor, hx: Any, params: list[Tensor], has_biases: bool, layers: int, dropout: float,
        train: bool, bidirectional: bool,
    ) -> Any:  # fmt: skip
        rows = (hx[0] if kind == "lstm" else hx).shape[1]
        sizes = (batch_sizes.shape[0], rows, x.shape[0])
        return tuple(_run(kind, x, hx, params, layers, dropout if train else 0.0, bidirectional, sizes))

    return run


def _run(
    kind: str, x: Tensor, hx: Any, params: Sequence[Tensor], layers: int, dropout: float, bidirectional: bool,
    sizes: tuple[int, int, int],
) -> list[Tensor]:  # fmt: skip
    given = list(hx) if kind == "lstm" else [hx]
    if torch.is_autocast_enabled("cpu"):  # where autocast for CUDA is kept in a trace
        dtype = torch.get_autocast_dtype("cpu")
        x, *given = (t.to(dtype) for t in (x, *given))
    directions = 1 + bidirectional
    hidden = given[-1].shape[-1]
    call = Call(kind, layers, directions, *sizes, x.shape[-1], hidden, dropout, x.itemsize)
    return list(_CudnnRnn.apply(call, x, len(given), *given, *params))  # type: ignore[no-untyped-call]


def _like(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


def _taken(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")


class _CudnnRnn(torch.autograd.Function):
    """``_cudnn_rnn``: the outputs, and everything that is allocated on the way, in its order."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, count: int, *tensors: Tensor) -> Any:
        states, params = tensors[:count], tensors[count:]
        whole = x.contiguous()
        out_width = (states[0].shape[-1]) * call.directions
        out = torch.zeros((*x.shape[:-1], out_width), dtype=x.dtype, device="cpu")
        last = [_like(state) for state in states]
        flat = None
        if x.dtype not in _FLATTENED or params[0].dtype is not x.dtype:  # put side by side at every call
            flat = _taken(sum(p.numel() for p in params) * x.itemsize)
        workspace = _taken(call.workspace_bytes)
        reserve = _taken(call.reserve_bytes)
        del workspace, whole
        ctx.save_for_backward(x, out, reserve, flat, *states, *params)
        ctx.call, ctx.count = call, count
        return (out, *last)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, _, _, _, *tensors = ctx.saved_tensors
        states, params = tensors[: ctx.count], tensors[ctx.count :]
        whole, of_out = x.contiguous(), gradients[0].contiguous()
        of_x = torch.zeros(whole.shape, dtype=x.dtype, device="cpu")
        of_states = [_like(state) for state in states]
        workspace = _taken(ctx.call.workspace_bytes)
        del workspace, whole, of_out
        whole = x.contiguous()
        of_all = torch.zeros(sum(p.numel() for p in params), dtype=x.dtype, device="cpu")
        workspace = _taken(ctx.call.workspace_bytes)
        del workspace, whole
        of_params = [g.view(p.shape) for g, p in zip(of_all.split([p.numel() for p in params]), params, strict=True)]
        if params[0].dtype is not x.dtype:
            of_params = [g.to(p.dtype) for g, p in zip(of_params, params, strict=True)]
        return (None, of_x, None, *of_states, *of_params)


def _where_enabled(operator: Any, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``; the composition of small operations where the program has turned cuDNN off."""

    def run(*args: Any) -> Any:
        if torch.backends.cudnn.enabled:
            return kernel(*args)
        before = torch._C._get_mkldnn_enabled()  # of the CPU alone
        torch._C._set_mkldnn_enabled(False)  # the context manager warns of something else
        try:
            return operator.decompose(*args)
        finally:
            torch._C._set_mkldnn_enabled(before)

    return run


_KINDS = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "rnn", "rnn_relu": "rnn"}
KERNELS = {
    f"{name}.{overload}": _where_enabled(getattr(getattr(torch.ops.aten, name), overload), make(kind))
    for name, kind in _KINDS.items()
    for overload, make in (("input", cuda_rnn), ("data", cuda_packed_rnn))
}
