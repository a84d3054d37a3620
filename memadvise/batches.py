"""Batches of another size: split in micro-batches, asked for from the target, or repeated and cut.

A target's ``build_batches`` that has a keyword ``batch_size`` or ``seq_len`` is asked for batches of that size; hf:
targets have both. Without ``batch_size`` the tensors of a batch are repeated or cut along their common first
dimension, which the numbers then say. A sequence length cannot be changed without the keyword.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from memadvise.errors import TargetError, UsageError

if TYPE_CHECKING:
    import torch

BuildBatches = Callable[..., Iterable[Any]]
SIZES = ("batch_size", "seq_len")


def batch_size(batch: Any) -> int | None:
    """The common first dimension of the batch's tensors; None when there is none."""
    sizes = {t.shape[0] if t.ndim else None for t in tensors_in(batch)}
    return sizes.pop() if len(sizes) == 1 else None


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Split every tensor of ``batch`` in ``parts`` equal slices along its first dimension (views, no copies).

    Raises:
        UsageError: the tensors have no common first dimension, or ``parts`` does not divide it.
    """
    if parts == 1:
        return [batch]
    size = batch_size(batch)
    if size is None or size % parts:
        raise UsageError(
            f"a batch of {size if size is not None else 'tensors without a common first dimension'}"
            f"{' samples' if size is not None else ''} cannot be split in {parts} equal micro-batches",
            hint="use a number of micro-batches that divides the batch size",
        )
    step = size // parts
    return [_mapped(batch, lambda t, i=i: t[i * step : (i + 1) * step]) for i in range(parts)]  # type: ignore[misc]


def resized(batch: Any, size: int) -> Any:
    """``batch`` with ``size`` samples: its own, from the start, as often as needed.

    Raises:
        TargetError: its tensors have no common first dimension.
    """
    have = batch_size(batch)
    if not have:
        raise TargetError(
            "the tensors of a batch have no common first dimension, so it cannot be made larger or smaller",
            hint="give build_batches a keyword batch_size: def build_batches(batch_size=8)",
        )

    def change(tensor: torch.Tensor) -> torch.Tensor:
        import torch

        return tensor[:size] if size <= have else tensor[torch.arange(size, device=tensor.device) % have]

    return batch if size == have else _mapped(batch, change)


def takes(build_batches: BuildBatches, name: str) -> bool:
    """Whether ``build_batches`` has the keyword ``name``."""
    return name in _keywords(build_batches)


def default_size(build_batches: BuildBatches, name: str) -> int | None:
    """The default of the keyword ``name`` of ``build_batches``; None where it has none that is a number."""
    if isinstance(build_batches, functools.partial) and name in build_batches.keywords:
        return int(build_batches.keywords[name])  # it was asked for before
    keyword = _keywords(build_batches).get(name)
    return keyword.default if keyword is not None and isinstance(keyword.default, int) else None


def with_sizes(build_batches: BuildBatches, sizes: Mapping[str, int], spec: str) -> tuple[BuildBatches, list[str]]:
    """``build_batches`` of other sizes, and what that assumes.

    Args:
        build_batches: as the target has it.
        sizes: ``batch_size`` and ``seq_len``, or one of them.
        spec: the target's name, for messages.

    Raises:
        TargetError: a sequence length, and no keyword for it.
    """
    if "seq_len" in sizes and not takes(build_batches, "seq_len"):
        raise TargetError(
            f"build_batches of {spec} cannot be asked for another sequence length",
            hint="give it a keyword: def build_batches(batch_size=8, seq_len=512)",
        )
    asked = {name: size for name, size in sizes.items() if takes(build_batches, name)}
    build: BuildBatches = functools.wraps(build_batches)(functools.partial(build_batches, **asked))
    size = sizes.get("batch_size")
    if size is None or "batch_size" in asked:
        return build, []

    @functools.wraps(build_batches)
    def build_resized(**others: int) -> Any:
        source = build(**others)
        is_batches = isinstance(source, Iterable) and not isinstance(source, Mapping | str | bytes)
        # What is no iterable of batches is for the target to complain about.
        return _Resized(source, size) if is_batches and not hasattr(source, "shape") else source

    assumed = (
        f"Batches of another size are those of {spec}, repeated or cut along the first dimension of their tensors."
    )
    return build_resized, [assumed]


class _Resized:
    def __init__(self, source: Iterable[Any], size: int) -> None:
        self._source, self._size = source, size

    def __iter__(self) -> Iterator[Any]:
        for batch in self._source:
            yield resized(batch, self._size)


def _keywords(build_batches: BuildBatches) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        found = inspect.signature(build_batches).parameters
    except (TypeError, ValueError):  # a callable written in C
        return {}
    return {name: parameter for name, parameter in found.items() if name in SIZES and parameter.kind in kinds}


def tensors_in(batch: Any) -> list[torch.Tensor]:
    """Every tensor of a batch: of tuples, lists and mappings within one another."""
    import torch

    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in tensors_in(value)]
    if isinstance(batch, tuple | list):
        return [t for value in batch for t in tensors_in(value)]
    return []


def _mapped(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    import torch

    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_mapped(value, change) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
