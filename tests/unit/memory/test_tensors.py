"""Whose a tensor is and how many bytes it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memadvise.memory.tensors import state_bytes, storage_parts


class Codes(torch.Tensor):
    """A float tensor to the outside, one byte an element and one scale per 4 elements inside."""

    codes: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scales: torch.Tensor) -> Codes:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.codes, made.scales = codes, scales
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], _: Any, size: Any, stride: Any) -> Codes:
        return Codes(inner["codes"], inner["scales"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def test_state_that_is_a_wrapper_subclass_counts_what_it_wraps() -> None:
    model = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    codes = Codes(torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(8))
    assert codes.numel() * codes.element_size() == 128  # what it says of itself
    optimizer.state[model.weight] = {"exp_avg": codes, "again": codes, "step": torch.zeros(()), "names": ["x"]}
    assert state_bytes(optimizer) == 32 + 8 * 4 + 4
    assert [tuple(part.shape) for part in storage_parts(codes)] == [(4, 8), (8,)]


def test_sparse_state_counts_indices_and_values() -> None:
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.state[model.weight] = {"last": torch.tensor([[0.0, 1.0], [0.0, 0.0]]).to_sparse()}
    assert state_bytes(optimizer) == 2 * 8 + 4
