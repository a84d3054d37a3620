"""``memadvise scan``: trace a training step, probe the model, write the scan file, print the report."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memadvise.cli import common, whatif
from memadvise.errors import OptimizerError, UsageError
from memadvise.units import parse_bytes

if TYPE_CHECKING:
    from memadvise.ledger import Scan


DEFAULT = Path("memadvise.scan.json")


class Tensors(StrEnum):
    """What the steps are traced on."""

    auto = "auto"
    fake = "fake"
    real = "real"


class SnrRule(StrEnum):
    """How the axes to average are derived from the SNR."""

    cutoff = "cutoff"
    official = "official"


def scan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="file.py, file.py:name, package.module:name or hf:DIR_OR_CONFIG_JSON. The file is executed.",
        ),
    ],
    output: common.Output = DEFAULT,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Trace only: no weights, no training steps.")] = False,
    device: common.DeviceOption = common.Device.cuda,
    arch: common.Arch = None,
    attention: common.Attention = None,
    assume: common.Assume = None,
    measured: Annotated[
        bool, typer.Option("--measure", help="Run real steps, too, on the --device at hand, and measure them.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Bound the step under torch.compile, too; nothing is compiled for it.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option("--shard", metavar="fsdp2|ddp", help="Trace one rank of a run spread over --world-size GPUs."),
    ] = None,
    world_size: Annotated[int | None, typer.Option("--world-size", min=2, help="GPUs of a --shard run.")] = None,
    probe_steps: Annotated[
        int, typer.Option("--probe-steps", min=1, help="AdamW steps of the probe; each other optimizer takes up to 20.")
    ] = 60,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Learning rate of the probe: 1e-3, or the checkpoint's.")
    ] = None,
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
    micro_batches: whatif.MicroBatches = None,
    recompute: whatif.Recompute = None,
    fused: whatif.Fused = False,
    foreach: whatif.Foreach = False,
    release: whatif.Release = False,
    weights: whatif.Weights = None,
    plan: whatif.PlanFile = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="FILE", help="Probe from here: a model's and an AdamW's state dicts."),
    ] = None,
    probe_memory: Annotated[
        str, typer.Option("--probe-memory", metavar="SIZE", help="Most that shadow optimizers hold at once.")
    ] = "4GiB",
    snr_rule: Annotated[
        SnrRule, typer.Option("--snr-rule", help="Axes above the cutoff: the most compression, or the official code's.")
    ] = SnrRule.cutoff,
    resume: Annotated[
        bool, typer.Option("--resume", help="Complete the interrupted scan in the output file, as it was begun.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Samples in a batch.")] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=1, help="Tokens in a sample, where the target takes it.")
    ] = None,
    dtype: common.Dtype = None,
    extrapolate_depth: Annotated[
        bool,
        typer.Option("--extrapolate-depth", help="Trace 2, 3 and 4 of the repeated blocks, verify, derive the rest."),
    ] = False,
    tensors: Annotated[
        Tensors,
        typer.Option("--tensors", help="Traced on fake tensors, on real ones, or real where fake ones cannot go on."),
    ] = Tensors.auto,
    force: common.Force = False,
    format: common.FormatOption = common.Format.text,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """Show where the bytes of a training step go."""
    common.configure(format=format, quiet=quiet, verbose=verbose, no_progress=no_progress)
    assumed = common.device_model(device, arch, attention, assume, at_hand=measured)
    check_numbers(lr=lr, weight_decay=weight_decay, betas=betas)
    if output.exists() and output.resolve() == Path(target.partition(":")[0]).resolve():
        raise UsageError(f"{output} is the target itself", hint="give another file with -o")
    common.check_writable(output, force=force, ours=is_scan_file, kind="a scan file of memadvise")
    if (shard is None) != (world_size is None):
        raise UsageError(
            "--shard and --world-size go together", hint="for example --shard fsdp2 --world-size 8, or neither"
        )
    asked = whatif.what_if(
        micro_batches=micro_batches,
        recompute=recompute,
        fused=fused,
        foreach=foreach,
        release=release,
        weights=weights,
        plan=plan,
    )
    if shard is not None and asked is not None:
        raise UsageError(
            "what-ifs are of one device; a sharded run is traced as it stands, and with checkpointing",
            hint="leave out --shard, or --micro-batches, --recompute, --fused, --foreach, --release, --weights, --plan",
        )
    if shard is not None and measured:
        raise UsageError("--measure runs on one device; a sharded run is only traced", hint="leave --measure out")

    from memadvise.ledger import to_json, write_whole
    from memadvise.scan import ProbeOptions, resume_scan, run_scan

    options: dict[str, Any] = {"batch_size": batch_size, "seq_len": seq_len, "dtype": dtype}
    probe = ProbeOptions(
        num_steps=probe_steps,
        lr=lr,
        weight_decay=weight_decay,
        betas=betas,
        seed=seed,
        hessian=not no_hessian,
        optimizers=_optimizers(optimizers),
        snr_rule=snr_rule.value,
        checkpoint=None if checkpoint is None else str(checkpoint),
        shadow_bytes=parse_bytes(probe_memory),
    )
    target_options = {name: value for name, value in options.items() if value is not None}
    begun = _begun(output, target) if resume else None
    interrupt = common.Interrupt()
    with common.interruptible(interrupt), common.show_progress() as report:
        progress = interrupt.polite_while("probing", report)
        if begun is not None:
            result = resume_scan(begun, progress=progress, stop=interrupt.asked)
        elif shard is not None and world_size is not None:
            from memadvise.memory.sharding import Sharding
            from memadvise.scan import run_sharded_scan

            result = run_sharded_scan(
                target,
                Sharding(shard, world_size),
                target_options=target_options,
                device=assumed,
                progress=progress,
            )
        else:
            result = run_scan(
                target,
                target_options=target_options,
                device=assumed,
                probe=None if no_probe else probe,
                measured=measured,
                compiled=compiled,
                asked=asked,
                extrapolate_depth=extrapolate_depth,
                tensors=tensors.value,
                progress=progress,
                stop=interrupt.asked,
            )
    if result.probe is not None and not result.probe.complete and not result.probe.recorded_steps:
        common.note(common.INTERRUPTED.strip())  # and nothing measured that would be worth one
        raise typer.Exit(130)
    document = to_json(result)
    write_whole(output, document)
    if result.probe is not None and not result.probe.complete:
        common.note(f"interrupted; what was measured is in {output}")
        common.note(f"to go on: memadvise scan {target} --resume" + (f" -o {output}" if output != DEFAULT else ""))
        raise typer.Exit(130)
    if format is common.Format.json:
        common.print_result(document)
    else:
        from memadvise.report.text import scan_renderables

        common.print_renderables(scan_renderables(result))
    common.note(f"\nWrote {output}")
    scan_flag = "" if str(output) == "memadvise.scan.json" else f" --scan {output}"
    if result.measured is not None:
        common.note(f"estimate beside measurement: memadvise compare-ledgers {output}")
    if shard is None:
        common.note(f"next: memadvise recommend --budget 12GB{scan_flag}")


def _begun(path: Path, target: str) -> Scan:
    """The scan in ``path`` that is to be completed."""
    from memadvise.ledger import load_scan

    scan = load_scan(path)
    if scan.target != target:
        raise UsageError(f"{path} is a scan of {scan.target}, not of {target}", hint="give the file with -o")
    return scan


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


def check_numbers(*, lr: float | None, weight_decay: float, betas: tuple[float, float]) -> None:
    """Raises UsageError for hyper-parameters out of range."""
    if lr is not None and not 0 < lr < float("inf"):
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
