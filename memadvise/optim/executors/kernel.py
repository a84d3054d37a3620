"""One compiled pass over a parameter: a plain function of tensors, traced once and compiled by torch's inductor.

The function is traced with symbolic rows where that is possible, so that all matrices of one width share a kernel, and
handed to inductor directly: no guards are checked at every call (dynamo's cost more than a step of a small matrix).
What tracing did assume of the number of rows is kept, and a kernel answers for which numbers it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from memadvise.optim.tracing import kernel_tracing

Function = Callable[..., Any]
LARGEST_INT32 = 2**31 - 1  # beyond this a kernel needs wider indices than those of one made for less
# Inductor keeps an expression that is long, or reads much, in a tensor of its own: the parameter's size once more.
# Without any limit it would take minutes over nested ones, as it writes them out at every use.
_INLINED = {"realize_reads_threshold": 12, "realize_opcount_threshold": 64}
_UNCHECKED = {"size_asserts": False}  # sizes and strides are compared before a kernel is chosen; twice takes its time


class Kernel:
    """``function`` compiled for tensors like ``examples``.

    Args:
        function: of tensors; may write into them, returns a tuple of tensors (perhaps empty).
        examples: real tensors, for their shapes, strides, dtypes and devices.
        rows: of each example, how often its first axis holds the number of rows, which may vary from call to call; 0
            where that axis has nothing to do with it.

    Raises:
        Exception: whatever tracing or the compiler says; it is for the caller to fall back.
    """

    def __init__(self, function: Function, examples: Sequence[Tensor], rows: Sequence[int]) -> None:
        from torch._inductor.compile_fx import compile_fx

        self._shapes = ShapeEnv(duck_shape=False)
        mode = FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True)
        self._rows: Any = None
        self._symbol: Any = None
        if any(rows):
            example, times = next((t, n) for t, n in zip(examples, rows, strict=True) if n)
            like = torch.empty(example.shape[0] // times, device="meta")
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            self._rows = mode.from_tensor(like, static_shapes=False, symbolic_context=context).shape[0]
            self._symbol = self._rows.node.expr  # now: what tracing finds out of it would replace it
        with kernel_tracing(), torch.no_grad():
            with mode:
                fakes = [self._fake(*pair) for pair in zip(examples, rows, strict=True)]
                graph = make_fx(function, _allow_non_fake_inputs=True)(*fakes)
            self._run: Any = compile_fx(graph, fakes, config_patches=_INLINED | _UNCHECKED)
        self._holds: dict[int, bool] = {}

    def _fake(self, tensor: Tensor, rows: int) -> Tensor:
        if rows:  # the very same number, not another that happens to be equal
            return torch.empty((self._rows * rows, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    def holds(self, rows: int) -> bool:
        """Whether everything that was assumed in tracing is true of this number of rows."""
        if self._symbol is None:
            return True
        if rows not in self._holds:
            values = {self._symbol: rows}
            self._holds[rows] = all(bool(guard.expr.xreplace(values)) for guard in self._shapes.guards)
        return self._holds[rows]

    def __call__(self, *tensors: Tensor) -> Any:
        return self._run(*tensors)
