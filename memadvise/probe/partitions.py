"""Candidate block partitions of a parameter, and the rule that picks one from measured scores.

Every candidate groups the rows or the columns of the parameter seen as a matrix ``[rows, columns]``: rows are fan-out
units (tokens, for embeddings), columns fan-in units. A partition is its group labels along one of the two axes, so it
costs as much memory as one side of the matrix, not as the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memadvise.ledger import HessianValue, Parameter

ROWS, COLUMNS = 0, 1
_TABLES = frozenset({"token_embedding", "position_embedding", "tied_embedding"})
HESSIAN_VECTOR_PRODUCTS = "hessian-vector-products"
GRADIENT_COVARIANCE = "gradient-covariance"
_ENOUGH = 0.5  # a score that is not surely above this is no block structure worth one learning rate per block
_TIE = 0.05


@dataclass(frozen=True, eq=False)
class Partition:
    """Blocks that are groups of rows (``axis`` 0) or columns (1); ``labels`` is int64, one group number per line."""

    name: str
    axis: int
    labels: Tensor

    @property
    def num_blocks(self) -> int:
        return int(self.labels.unique().numel())

    def lines_per_block(self) -> Tensor:
        """How many rows (or columns) each block has; int64 ``[num_blocks]``."""
        counts: Tensor = torch.bincount(self.labels)
        return counts[counts > 0]

    def chance(self, other: int) -> float:
        """Share of off-diagonal energy in a random grouping of equal sizes; ``other`` is the size of the other axis."""
        sizes = [lines * other for lines in self.lines_per_block().tolist()]
        total = sum(sizes)
        return sum(size * (size - 1) for size in sizes) / (total * (total - 1)) if total > 1 else 1.0

    def select(self, lines: Tensor) -> Partition:
        """The same blocks restricted to some rows (or columns)."""
        return Partition(self.name, self.axis, self.labels[lines])

    def expand(self, per_block: Tensor) -> Tensor:
        """One value per block as a ``[rows, 1]`` or ``[1, columns]`` tensor that broadcasts over the matrix."""
        return per_block[self.labels].unsqueeze(1 - self.axis)


@dataclass(frozen=True, eq=False)
class Layout:
    """A parameter as a matrix, and its candidate partitions; ``row_axes`` and ``column_axes`` are axes of its shape."""

    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]
    rows: int
    columns: int
    partitions: tuple[Partition, ...]

    def matrix(self, tensor: Tensor) -> Tensor:
        """``tensor`` (of the parameter's shape) as ``[rows, columns]``; a view where strides allow."""
        return tensor.permute(*self.row_axes, *self.column_axes).reshape(self.rows, self.columns)

    def tensor(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of :meth:`matrix`."""
        order = (*self.row_axes, *self.column_axes)
        inverse = [order.index(axis) for axis in range(len(order))]
        return matrix.reshape([shape[axis] for axis in order]).permute(inverse)


def layout(parameter: Parameter) -> Layout | None:
    """The matrix view of a parameter and the partitions worth scoring; None for vectors.

    ``row`` (output neuron, token), ``column`` (input feature), ``head`` (rows of one attention head; for a fused QKV
    the rows of one head of q and of k, single rows of v) and ``head_column`` (columns of one head, for the attention
    output). The whole tensor and single coordinates are not listed: their score is 0 by definition.
    """
    shape = parameter.shape
    if len(shape) < 2:
        return None
    if parameter.role in _TABLES:
        rows: tuple[int, ...] = tuple(range(len(shape) - 1))
    elif parameter.fan_out:
        rows = parameter.fan_out
    else:
        rows = (0,)
    columns = tuple(axis for axis in range(len(shape)) if axis not in rows)
    if not columns:
        return None
    num_rows, num_columns = (math.prod(shape[axis] for axis in axes) for axes in (rows, columns))
    found = [
        Partition("row", ROWS, torch.arange(num_rows)),
        Partition("column", COLUMNS, torch.arange(num_columns)),
    ]
    heads = _head_labels(parameter, num_rows)
    if heads is not None:
        found.insert(0, Partition("head", ROWS, heads))
    if parameter.role == "attention_output" and parameter.heads and num_columns % parameter.heads == 0:
        labels = torch.arange(parameter.heads).repeat_interleave(num_columns // parameter.heads)
        found.insert(0, Partition("head_column", COLUMNS, labels))
    lines = (num_rows, num_columns)
    # One block is the whole tensor; blocks of one entry are coordinates; heads of one row are rows.
    useful = []
    for partition in found:
        blocks, own, other = partition.num_blocks, lines[partition.axis], lines[1 - partition.axis]
        if blocks > 1 and blocks < own * other and (blocks < own or not partition.name.startswith("head")):
            useful.append(partition)
    return Layout(rows, columns, num_rows, num_columns, tuple(useful))


def _head_labels(parameter: Parameter, num_rows: int) -> Tensor | None:
    if parameter.segments:
        labels = torch.arange(num_rows)
        for segment in parameter.segments:
            count = segment.stop - segment.start
            # Values are kept per row, as Adam-mini does: their rows of one head are no dense block.
            if segment.role != "attention_value" and segment.heads and count % segment.heads == 0:
                rows = torch.arange(count)
                labels[segment.start : segment.stop] = segment.start + rows - rows % (count // segment.heads)
        return labels
    if parameter.role == "attention_output" or not parameter.heads or num_rows % parameter.heads:
        return None
    return torch.arange(parameter.heads).repeat_interleave(num_rows // parameter.heads)


def partition_sizes(parameter: Parameter) -> dict[str, int]:
    """Number of blocks of every candidate of :func:`layout`, for :func:`choose_partition`."""
    found = layout(parameter)
    return {p.name: p.num_blocks for p in found.partitions} if found else {}


def prior_partition(parameter: Parameter) -> str:
    """What the papers use without measuring (2406.16793): heads for queries and keys, rows for other matrices."""
    sizes = partition_sizes(parameter)
    if not sizes:
        return "coordinate"
    by_head = parameter.role in {"attention_query", "attention_key", "attention_qkv"} and "head" in sizes
    return "head" if by_head else "row" if "row" in sizes else next(iter(sizes))


def choose_partition(
    values: Sequence[HessianValue], sizes: Mapping[str, int], *, prior: str = "row"
) -> tuple[str, str, bool]:
    """The finest partition with clear block structure; the evidence in a sentence; whether it was measured.

    Clear is a score that stays at 0.5 or above two standard errors below (0 is chance). Of those within max(one
    standard error, 0.05) of the best, the one with the most blocks is taken: the smallest dense blocks of the Hessian
    (2406.16793, Principle 1). Where there are Hessian-vector products, they decide; the screen reads low early on.

    Args:
        values: of one parameter, any estimators.
        sizes: number of blocks by partition (:func:`partition_sizes`); partitions not in it are left aside.
        prior: taken when nothing is clear (:func:`prior_partition`).
    """
    screened = {v.partition: v for v in values if v.estimator == GRADIENT_COVARIANCE and v.partition in sizes}
    confirmed = {v.partition: v for v in values if v.estimator == HESSIAN_VECTOR_PRODUCTS and v.partition in sizes}
    best_known = confirmed or screened  # never compared with each other: their scales differ
    if not best_known:
        return prior, f"block structure was not measured; {prior} is the static prior", False
    clear = [v for v in best_known.values() if v.score - 2 * v.stderr >= _ENOUGH]
    top = max(best_known.values(), key=lambda value: value.score)
    if not clear:
        what = "is unclear" if top.score + 2 * top.stderr >= _ENOUGH else "is weak"
        return prior, f"block structure {what} (best: {_text(top)}); {prior} is the static prior", False
    best = max(clear, key=lambda value: value.score)
    near = [v for v in clear if v.score >= best.score - max(best.stderr, _TIE)]
    chosen = max(near, key=lambda value: (sizes[value.partition], value.score))
    others = [_text(v) for name, v in best_known.items() if name != chosen.partition]
    source = "Hessian-vector products" if chosen.estimator == HESSIAN_VECTOR_PRODUCTS else "gradient covariance"
    evidence = f"{_text(chosen)} by {source}, clear" + (f"; {', '.join(others)}" if others else "")
    return chosen.partition, evidence, True


def _text(value: HessianValue) -> str:
    return f"{value.partition} {value.score:.2f} +- {value.stderr:.2f}"
