"""``memadvise scan``: trace a training step, probe the model, write the scan file, print the report."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from memadvise.cli import common
from memadvise.errors import OptimizerError, UsageError


class Device(StrEnum):
    """A kind of device whose memory can be predicted."""

    cuda = "cuda"
    cpu = "cpu"


def scan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="file.py, file.py:name, package.module:name or hf:DIR_OR_CONFIG_JSON. The file is executed.",
        ),
    ],
    output: common.Output = Path("memadvise.scan.json"),
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Trace only: no weights, no training steps.")] = False,
    device: Annotated[
        Device, typer.Option("--device", help="Whose memory to predict; no such device is needed.")
    ] = Device.cuda,
    probe_steps: Annotated[
        int, typer.Option("--probe-steps", min=1, help="AdamW steps of the probe; each other optimizer takes up to 20.")
    ] = 60,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of the probe.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Weight decay of the probe.")] = 0.0,
    betas: Annotated[
        tuple[float, float], typer.Option("--betas", metavar="B1 B2", help="Of AdamW in the probe; SNR depends on B2.")
    ] = (0.9, 0.999),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the probe.")] = 0,
    no_hessian: Annotated[bool, typer.Option("--no-hessian", help="Skip the Hessian's block structure.")] = False,
    optimizers: Annotated[
        str,
        typer.Option("--optimizers", help="Tried beside AdamW: quick (all but the slow ones), all, none, or a,b,c."),
    ] = "quick",
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="For hf: targets.")] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=1, help="For hf: targets.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="For hf: targets, such as bfloat16.")] = None,
    force: common.Force = False,
    format: common.FormatOption = common.Format.text,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """Show where the bytes of a training step go."""
    common.configure(format=format, quiet=quiet, verbose=verbose, no_progress=no_progress)
    _check_numbers(lr=lr, weight_decay=weight_decay, betas=betas)
    if output.exists() and output.resolve() == Path(target.partition(":")[0]).resolve():
        raise UsageError(f"{output} is the target itself", hint="give another file with -o")
    common.check_writable(output, force=force, ours=is_scan_file, kind="a scan file of memadvise")

    from memadvise.ledger import to_json, write_whole
    from memadvise.scan import ProbeOptions, run_scan

    options: dict[str, Any] = {"batch_size": batch_size, "seq_len": seq_len, "dtype": dtype}
    probe = ProbeOptions(
        num_steps=probe_steps,
        lr=lr,
        weight_decay=weight_decay,
        betas=betas,
        seed=seed,
        hessian=not no_hessian,
        optimizers=_optimizers(optimizers),
    )
    with common.interruptible(), common.show_progress() as progress:
        result = run_scan(
            target,
            target_options={name: value for name, value in options.items() if value is not None},
            device=device.value,
            probe=None if no_probe else probe,
            progress=progress,
        )
    document = to_json(result)
    write_whole(output, document)
    if format is common.Format.json:
        common.print_result(document)
    else:
        from memadvise.report.text import scan_renderables

        common.print_renderables(scan_renderables(result))
    common.note(f"\nWrote {output}")
    scan_flag = "" if str(output) == "memadvise.scan.json" else f" --scan {output}"
    common.note(f"next: memadvise recommend --budget 12GB{scan_flag}")


def _optimizers(text: str) -> tuple[str, ...] | None:
    """The names that ``--optimizers`` asks for; None for the quick ones."""
    from memadvise.optim.registry import list_methods, method_info

    if text in ("quick", "all", "none"):
        return {"quick": None, "all": list_methods(), "none": ()}[text]
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        try:
            method_info(name)
        except OptimizerError as error:
            raise UsageError(f"--optimizers: {error.message}", hint=error.hint) from error
    return names


def _check_numbers(*, lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
    if not 0 < lr < float("inf"):
        raise UsageError(f"--lr {lr}: a learning rate is a positive number", hint="for example --lr 1e-3")
    if not 0 <= weight_decay < float("inf"):
        raise UsageError(f"--weight-decay {weight_decay}: it cannot be negative", hint="for example --weight-decay 0.1")
    if not all(0 <= beta < 1 for beta in betas):
        raise UsageError(f"--betas {betas[0]} {betas[1]}: each lies in [0, 1)", hint="for example --betas 0.9 0.95")


def is_scan_file(path: Path) -> bool:
    """Whether ``path`` is a scan file, of any version, so that a new scan may replace it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and {"schema_version", "fingerprint", "memory"} <= value.keys()
