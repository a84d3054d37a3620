"""Run the Hessian estimators on a real model: which samples, which entries, and how much memory.

The screen keeps ``samples * min(entries, max_entries) * 4`` bytes per matrix and works on as many matrices at once as
fit ``memory_limit``; each such group costs one backward pass per sample. Larger matrices are represented by a principal
submatrix of the Hessian: random rows (among those that receive gradient) and random columns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memadvise.batches import batch_size, split_batch
from memadvise.errors import MemadviseError
from memadvise.ledger import HessianValue, Parameter
from memadvise.probe.hessian import MIN_SAMPLES, gradient_covariance, sign_pairs
from memadvise.probe.partitions import COLUMNS, ROWS, Layout, layout
from memadvise.probe.training import fresh

Loss = Callable[[Any], Tensor]
MAX_ENTRIES = 2**18  # of a matrix, in the screen: 512 x 512
MEMORY_LIMIT = 2**29  # bytes of stored gradients at once
MAX_CONFIRMED = 6
_SIDE = 512
_TOUCH_SAMPLES = 4
_HVP_SAMPLES = 4
_ROLES = (
    "attention_query", "attention_qkv", "attention_value", "attention_output", "mlp_up", "mlp_down",
    "token_embedding", "tied_embedding", "head", "attention_key",
)  # fmt: skip


@contextlib.contextmanager
def measuring(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Dropout off and batch norms still (evaluation mode) while inside; every module's own mode restored after."""
    modes = [(module, module.training) for module in model.modules()]
    if not training:
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.RNNBase):  # cuDNN has no backward pass in evaluation mode
                module.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def make_samples(batches: Sequence[Any], count: int, *, split: bool = True) -> list[Any]:
    """Up to ``count`` different samples: single ones cut from the batches, or whole batches where that is impossible.

    A batch that is repeated because the iterable ended counts once: two equal gradients would pass for agreement.
    """
    samples: list[Any] = []
    for batch in {id(batch): batch for batch in batches}.values():
        size = batch_size(batch) if split else None
        samples += split_batch(batch, size) if size else [batch]
        if len(samples) >= count:
            return samples[:count]
    return samples


def usable_samples(
    model: nn.Module, loss: Loss, batches: Sequence[Any], count: int
) -> tuple[list[Any], bool, str | None]:
    """Samples on which the loss can be computed, whether the model must stay in training mode for it, and a warning.

    Raises:
        MemadviseError: the loss cannot be computed even on a whole batch in training mode.
    """
    problem: MemadviseError | None = None
    for split, training in ((True, False), (False, False), (False, True)):
        samples = make_samples(batches, count, split=split)
        try:
            with measuring(model, training=training):
                loss(fresh(samples[0]))
        except MemadviseError as error:
            problem = error
            continue
        note = "the loss needs training mode: dropout, if any, adds noise to the block structure" if training else None
        return samples, training, note
    assert problem is not None
    raise problem


def screen(
    model: nn.Module,
    loss: Loss,
    samples: Sequence[Any],
    parameters: Sequence[tuple[Parameter, Tensor]],
    *,
    training: bool = False,
    max_entries: int = MAX_ENTRIES,
    memory_limit: int = MEMORY_LIMIT,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[tuple[str, tuple[HessianValue, ...]]]:
    """Gradient-covariance scores of every matrix, group by group (a generator: what is done is kept on a failure).

    Args:
        model: its gradients (``.grad``) are left alone.
        loss: sample -> scalar.
        samples: different samples, at least MIN_SAMPLES; with fewer nothing is yielded.
        parameters: ledger record and tensor; vectors are passed over.
        training: leave the model in training mode.
        max_entries: larger matrices are represented by a submatrix of about this many entries.
        memory_limit: bytes of stored gradients at once.
        seed: of the choice of submatrices.
        progress: called with (matrices done, matrices in all).
    """
    found = [
        (p, t, lay)
        for p, t in parameters
        if t.is_floating_point() and (lay := layout(p)) is not None and lay.partitions
    ]
    if len(samples) < MIN_SAMPLES:
        return
    done = 0
    with measuring(model, training=training):
        for group in _groups(found, len(samples), max_entries, memory_limit):
            tensors = [tensor for _, tensor, _ in group]
            subsets = _subsets(loss, samples, group, max_entries, seed)
            stored: list[list[Tensor]] = [[] for _ in group]
            for sample in samples:
                for keep, (_, _, lay), rows_columns, gradient in zip(
                    stored, group, subsets, _gradients(loss, sample, tensors), strict=True
                ):
                    if gradient is not None:
                        keep.append(_restrict(lay.matrix(gradient), rows_columns).float().contiguous())
            for (parameter, _, lay), keep, rows_columns in zip(group, stored, subsets, strict=True):
                done += 1
                if len(keep) >= MIN_SAMPLES:
                    partitions = [p.select(rows_columns[p.axis].to(p.labels.device)) for p in lay.partitions]
                    stack = torch.stack(keep)
                    keep.clear()
                    yield parameter.name, gradient_covariance(stack, [p for p in partitions if p.num_blocks > 1])
                if progress is not None:
                    progress(done, len(found))


def _groups(
    found: Sequence[tuple[Parameter, Tensor, Layout]], samples: int, max_entries: int, memory_limit: int
) -> Iterator[list[tuple[Parameter, Tensor, Layout]]]:
    group: list[tuple[Parameter, Tensor, Layout]] = []
    used = 0
    for item in found:
        need = samples * 4 * min(item[0].numel, max_entries)
        if group and used + need > memory_limit:
            yield group
            group, used = [], 0
        group.append(item)
        used += need
    if group:
        yield group


def _gradients(loss: Loss, sample: Any, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    gradients = torch.autograd.grad(loss(fresh(sample)), tensors, allow_unused=True)
    return tuple(g.to_dense() if g is not None and g.is_sparse else g for g in gradients)


def _subsets(
    loss: Loss, samples: Sequence[Any], group: Sequence[tuple[Parameter, Tensor, Layout]], max_entries: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns to keep of every matrix: all of them, or a random choice among rows that receive gradient."""
    big = [i for i, (parameter, _, _) in enumerate(group) if parameter.numel > max_entries]
    touched = {i: torch.zeros(group[i][2].rows, dtype=torch.bool) for i in big}
    for sample in samples[:_TOUCH_SAMPLES] if big else ():
        for i, gradient in zip(big, _gradients(loss, sample, [group[i][1] for i in big]), strict=True):
            if gradient is not None:
                touched[i] |= (group[i][2].matrix(gradient) != 0).any(1).cpu()
    generator = torch.Generator().manual_seed(seed)
    subsets = []
    for i, (_, tensor, lay) in enumerate(group):
        rows, columns = torch.arange(lay.rows), torch.arange(lay.columns)
        if i in touched:
            width = min(lay.columns, max(_SIDE, max_entries // lay.rows))
            height = max(2, max_entries // width)
            candidates = rows[touched[i]] if int(touched[i].sum()) > 1 else rows
            rows = candidates[torch.randperm(len(candidates), generator=generator)[:height]].sort().values
            columns = columns[torch.randperm(lay.columns, generator=generator)[:width]].sort().values
        subsets.append((rows.to(tensor.device), columns.to(tensor.device)))
    return subsets


def _restrict(matrix: Tensor, subset: tuple[Tensor, Tensor]) -> Tensor:
    for axis in (ROWS, COLUMNS):
        if len(subset[axis]) < matrix.shape[axis]:
            matrix = matrix.index_select(axis, subset[axis])
    return matrix


# ---------------------------------------------------------------- confirmation


def to_confirm(parameters: Sequence[Parameter], limit: int = MAX_CONFIRMED) -> list[Parameter]:
    """At most ``limit`` float32 or float64 matrices, one of each role, from the middle of the network."""
    by_role: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        if parameter.dtype in ("float32", "float64") and len(parameter.shape) >= 2 and layout(parameter) is not None:
            by_role.setdefault(parameter.role, []).append(parameter)
    order = sorted(by_role, key=lambda role: _ROLES.index(role) if role in _ROLES else len(_ROLES))
    return [by_role[role][len(by_role[role]) // 2] for role in order[:limit]]


def confirmation_batch(batch: Any) -> Any:
    """At most four samples of a batch, if it divides: a double backward pass holds 2 to 3 times the activations."""
    size = batch_size(batch)
    if not size:
        return batch
    parts = next(parts for parts in range(1, size + 1) if size % parts == 0 and size // parts <= _HVP_SAMPLES)
    return split_batch(batch, parts)[0]


def confirm(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    parameter: Parameter,
    tensor: Tensor,
    *,
    training: bool = False,
    num_probes: int = 8,
    seed: int = 0,
) -> tuple[HessianValue, ...]:
    """Scores of one matrix by Hessian-vector products on one fixed batch; empty if the loss is linear in it.

    Raises:
        RuntimeError: an operation of the model has no double backward pass.
    """
    lay = layout(parameter)
    if lay is None or not lay.partitions:
        return ()
    with measuring(model, training=training), _only(model, tensor), sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(loss(fresh(batch)), tensor, create_graph=True)
        if not gradient.requires_grad:
            return ()

        def hvp(direction: Tensor) -> Tensor:
            along = lay.tensor(direction, tensor.shape)
            (product,) = torch.autograd.grad(gradient, tensor, along, retain_graph=True, allow_unused=True)
            return torch.zeros_like(direction) if product is None else lay.matrix(product)

        like = lay.matrix(torch.zeros_like(tensor))
        return sign_pairs(hvp, like, lay.partitions, num_probes=num_probes, seed=seed)


@contextlib.contextmanager
def _only(model: nn.Module, tensor: Tensor) -> Iterator[None]:
    """Only ``tensor`` requires a gradient while inside."""
    others = [p for p in model.parameters() if p.requires_grad and p is not tensor]
    for other in others:
        other.requires_grad_(False)
    try:
        yield
    finally:
        for other in others:
            other.requires_grad_(True)


def combine_checkpoints(early: Sequence[HessianValue], late: Sequence[HessianValue]) -> tuple[HessianValue, ...]:
    """One value per partition from two moments of the run: the mean, with half their distance added to its error."""
    first = {value.partition: value for value in early}
    combined = []
    for value in late:
        other = first.pop(value.partition, None)
        if other is None:
            combined.append(value)
            continue
        stderr = math.hypot(value.stderr / 2, other.stderr / 2, (value.score - other.score) / 2)
        combined.append(
            HessianValue(
                value.partition,
                (value.score + other.score) / 2,
                stderr,
                (value.chance + other.chance) / 2,
                value.estimator,
                value.num_samples + other.num_samples,
            )
        )
    return (*combined, *first.values())
