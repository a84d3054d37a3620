"""Switches of a plan, executed: activation checkpointing of named modules and micro-batches.

Both leave the mathematics of a step as it is. Checkpointing recomputes a module's forward pass inside the backward
pass; running statistics of batch norms are not updated a second time. Micro-batches split every tensor of a batch
along its first dimension; the losses are weighted so that the gradient equals that of the whole batch whenever the
loss is a mean over the batch and no layer looks across samples (batch norm does).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from memadvise.batches import split_batch
from memadvise.errors import UsageError
from memadvise.names import canonical_name, matches, repeat_pattern

if TYPE_CHECKING:
    from torch import nn

    from memadvise.target import Target


def checkpoint_patterns(model: nn.Module) -> tuple[str, ...]:
    """Globs of the repeated blocks worth checkpointing: the outermost lists of two or more equal modules.

    Blocks are recognised by structure (same class, siblings in a ModuleList or Sequential, with parameters and
    children), never by name.
    """
    from torch import nn

    found: list[str] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(name.startswith(prefix) for prefix in inside):
            continue
        blocks = [
            child for child in module if any(True for _ in child.children()) and any(True for _ in child.parameters())
        ]
        kinds = Counter(type(child) for child in blocks)
        if len(blocks) >= 2 and kinds.most_common(1)[0][1] >= 2:
            found.append(f"{canonical_name(name)}.*" if name else "*")
            inside.append(f"{name}." if name else "")
    return tuple(dict.fromkeys(repeat_pattern(pattern)[0] for pattern in found))


def apply_checkpoint(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Recompute the activations of every module whose dotted name matches one of ``patterns``; returns their names.

    Outermost matches win: a module inside a checkpointed one is left alone. Idempotent.

    Raises:
        UsageError: a pattern matches no module.
    """
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = {n: m for name, m in model.named_modules() if (n := canonical_name(name)) and matches(pattern, n)}
        if not hits:
            raise UsageError(
                f"the checkpoint pattern '{pattern}' matches no module of this model",
                hint="the names are those of model.named_modules(); edit switches.checkpoint in the plan",
            )
        chosen.update(hits)
    outermost = [n for n in chosen if not any(n.startswith(f"{other}.") for other in chosen)]
    for name in outermost:
        _checkpoint_module(chosen[name])
    return outermost


def _checkpoint_module(module: nn.Module) -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    if getattr(module, "_memadvise_checkpointed", False):
        return
    forward = module.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _frozen_running_stats(module)),
            **kwargs,
        )

    module.forward = checkpointed  # type: ignore[method-assign]  # an instance attribute: state_dict is untouched
    module._memadvise_checkpointed = True  # type: ignore[assignment]


@contextlib.contextmanager
def _frozen_running_stats(module: nn.Module) -> Iterator[None]:
    """While recomputing, batch norms normalise by the batch but leave their running statistics alone."""
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
    saved = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        # Momentum 0 keeps the running statistics bit for bit, and autograd saves the same tensors as the first pass.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def train_step(target: Target, model: Any, batch: Any, optimizer: Any, *, micro_batches: int = 1) -> Any:
    """One training step of ``target``, its batch split in ``micro_batches`` parts whose gradients accumulate.

    The same loop for real training, for the probe and under a memory trace. Each part's loss is divided by their
    number, so that the gradient is the mean over the parts.

    Returns:
        what ``target.step`` returns for one part; else the mean loss, a 0-dim tensor (no host read happens here).

    Raises:
        UsageError: the target brings its own ``train_step``, or the batch cannot be split in equal parts.
        TargetRaised, TargetError: the target's code is at fault.
    """
    if micro_batches == 1:
        return target.step(model, batch, optimizer)
    if target.train_step is not None:
        raise UsageError(
            f"{target.spec} has its own train_step, which decides itself how a batch is split",
            hint="accumulate gradients inside train_step, or remove it and let compute_loss(model, batch) do",
        )
    from memadvise.target import user_code

    total: Any = None
    for part in split_batch(batch, micro_batches):
        loss = target.loss(model, part) / micro_batches
        with user_code(f"the backward pass of {target.spec}", target.path):
            loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
        del loss
    target.optimizer_step(model, optimizer)
    return total
