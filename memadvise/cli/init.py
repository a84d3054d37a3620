"""``memadvise init``: a commented target to start from, which runs as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memadvise.cli import common
from memadvise.errors import UsageError

STUB = '''\
"""A target for memadvise: what it needs to know of your training run.

    memadvise scan {name}        where the bytes of a step go, and what compression would cost
    memadvise recommend --budget 12GB

Replace the bodies; the names of the functions stay. `python {name}` trains it.
"""

import torch
from torch import nn


def build_model():
    """The model, freshly initialised. Called several times: seed it, so that every call gives the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))


def build_batches():
    """An iterable of batches: tensors, or tuples, lists or dicts of tensors. Use your real data and batch size."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        inputs = torch.randn(32, 64, generator=generator)
        yield inputs, inputs[:, :10].argmax(dim=1)


def compute_loss(model, batch):
    """One scalar. Leave this function out if model(batch) returns the loss, or an output with .loss."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


# Optional: your own whole step, if it is more than loss, backward, step, zero_grad (autocast, clipping, ...).
#
# def train_step(model, batch, optimizer):
#     with torch.autocast("cuda", dtype=torch.bfloat16):
#         loss = compute_loss(model, batch)
#     loss.backward()
#     torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
#     optimizer.step()
#     optimizer.zero_grad()
#
# Optional: what runs are compared by (memadvise verify, memadvise recommend --trials), on data held out.
#
# def validation_loss(model):
#     return compute_loss(model, held_out_batch)


if __name__ == "__main__":
    model = build_model()
    # With a plan: optimizer = memadvise.create_optimizer(model, "memadvise.yaml", lr=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(20):
        for batch in build_batches():
            loss = compute_loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {{epoch}}: loss {{loss.item():.4f}}")
'''


def init(
    path: Annotated[Path, typer.Argument(metavar="FILE.py", help="The file to write, for example model.py.")],
    force: common.Force = False,
    format: common.FormatOption = common.Format.text,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """Write a commented target file to start from."""
    common.configure(format=format, quiet=quiet, verbose=verbose, no_progress=no_progress)
    from memadvise.ledger import write_whole

    if path.suffix != ".py":
        raise UsageError(f"'{path}' does not end in .py", hint="a target is a Python file, for example model.py")
    # Whatever is there is somebody's own work: no file counts as ours.
    if path.exists() and not force and not path.is_dir():
        raise UsageError(f"{path} exists already", hint="give another name, or --force to replace it")
    common.check_writable(path, force=force, ours=lambda _: False, kind="a new file")
    write_whole(path, STUB.format(name=path.name))
    if format is common.Format.json:
        common.print_result(common.to_json({"written": str(path)}))
    common.note(f"Wrote {path}\nnext: memadvise scan {path}")
