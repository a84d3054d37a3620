"""Repeated blocks of a model: which they are, whether they are alike in everything that is seen, and fewer of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from memadvise.errors import MemadviseError
from memadvise.names import canonical_name

_SCALARS = (bool, int, float, str, type(None))


class NotRepeated(MemadviseError):
    """The depth of this model cannot be extrapolated; the message says why."""


@dataclass(frozen=True)
class Blocks:
    """``count`` equal blocks in a row: the children ``first`` to ``first + count - 1`` of the list called ``name``."""

    name: str
    first: int
    count: int


def find_blocks(model: nn.Module, *, at_least: int) -> tuple[nn.Module, Blocks]:
    """The list (ModuleList or Sequential) with the most parameters in equal blocks in a row, and which they are.

    Equal: the same classes, parameters, buffers and plain attributes throughout, but for attributes that number the
    blocks.

    Raises:
        NotRepeated: there are no ``at_least`` such blocks.
    """
    best: tuple[int, nn.Module, Blocks] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < at_least:
            continue
        first, count = _longest_run(list(module.children()))
        size = sum(p.numel() for p in module[first].parameters()) * (count - 1)
        if count >= at_least and size and (best is None or size > best[0]):
            best = size, module, Blocks(canonical_name(name), first, count)
    if best is None:
        raise NotRepeated(f"there are no {at_least} equal blocks in a row")
    return best[1], best[2]


def _longest_run(children: list[nn.Module]) -> tuple[int, int]:
    """(first, count) of the longest run of children that are alike."""
    best = (0, 1)
    first = 0
    for at in range(1, len(children) + 1):
        if at == len(children) or not _alike(children[first], first, children[at], at):
            best = max(best, (first, at - first), key=lambda run: run[1])
            first = at
    return best


def _alike(one: nn.Module, one_index: int, other: nn.Module, other_index: int) -> bool:
    parts, other_parts = list(one.named_modules()), list(other.named_modules())
    if [(name, type(part)) for name, part in parts] != [(name, type(part)) for name, part in other_parts]:
        return False
    return all(
        _tensors(part) == _tensors(other_part) and _same_attributes(part, one_index, other_part, other_index)
        for (_, part), (_, other_part) in zip(parts, other_parts, strict=True)
    )


def _tensors(module: nn.Module) -> list[Any]:
    named = [*module._parameters.items(), *module._buffers.items()]
    return [(name, t.shape, t.dtype, t.requires_grad) if t is not None else (name,) for name, t in named]


def _same_attributes(one: nn.Module, one_index: int, other: nn.Module, other_index: int) -> bool:
    values, other_values = _scalars(one), _scalars(other)
    return values.keys() == other_values.keys() and all(
        value == other_values[name] or _counts_blocks(value, other_values[name], other_index - one_index)
        for name, value in values.items()
    )


def _counts_blocks(value: Any, other: Any, distance: int) -> bool:
    """Whether two values number the blocks they are found in, wherever the numbers begin."""
    return type(value) is int and type(other) is int and other - value == distance


def _scalars(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, _SCALARS)}


def leave_blocks(container: nn.Module, blocks: Blocks, count: int) -> dict[str, nn.Module | None]:
    """Leave only ``count`` of the blocks in their list; what follows them moves up. Returns all its children by name,
    as they were: ``container._modules``.
    """
    children = container._modules
    kept = list(children.values())
    del kept[blocks.first + count : blocks.first + blocks.count]
    container._modules = {str(i): child for i, child in enumerate(kept)}
    return children
