"""The result of a scan: frozen records, JSON in and out. The only currency between measuring and showing.

Bytes are integers. Nothing here imports torch: dtypes are their torch names (``"float32"``), shapes are tuples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from memadvise.errors import FileFormatError, UsageError
from memadvise.plan.schema import Switches

SCHEMA_VERSION = 2
ESTIMATOR_VERSION = 1  # raised whenever the same target gives other bytes: baselines are not comparable across it
CATEGORIES = (
    "weights", "gradients", "optimizer_state", "activations", "temporaries", "buffers", "inputs", "workspace",
    "unsharded_weights", "unsharded_gradients", "prefetched_weights", "gradient_buckets",
)  # fmt: skip
PHASES = ("forward", "backward", "step")


@dataclass(frozen=True)
class Segment:
    """Rows ``start:stop`` of the fan-out axis of a fused parameter (one of q, k, v), with its own role and heads."""

    role: str
    start: int
    stop: int
    heads: int | None = None


@dataclass(frozen=True)
class Parameter:
    """One trainable or frozen tensor, and what it *is* (see :mod:`memadvise.roles`).

    ``fan_in`` and ``fan_out`` are axis numbers of ``shape``: for ``nn.Linear`` ``(1,)`` and ``(0,)``, swapped for
    a transposed Conv1D, ``(1, 2, 3)`` and ``(0,)`` for a convolution, empty for vectors.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    trainable: bool
    role: str
    module: str
    module_type: str
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()
    heads: int | None = None
    segments: tuple[Segment, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class PhasePeak:
    """The highest live bytes while a phase ran, and what they were; ``by_module`` is module -> category -> bytes."""

    phase: str
    peak_bytes: int
    by_category: dict[str, int]
    by_module: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class LiveTensor:
    """One storage alive at the peak; ``where`` is the ``file:line`` of the user's code that made it, if known."""

    num_bytes: int
    category: str
    module: str
    op: str
    phase: str
    where: str | None = None
    dtype: str = ""


@dataclass(frozen=True)
class LiveGroup:
    """Storages alive at the peak that are alike: ``count`` of them, ``num_bytes`` together.

    ``op`` made them (``""``: they were there before); ``dtype`` is that of the tensor first seen on them, if known.
    """

    category: str
    module: str
    op: str
    dtype: str
    where: str | None
    count: int
    num_bytes: int


@dataclass(frozen=True)
class Reservation:
    """What the CUDA caching allocator takes from the device, simulated by replaying every traced event in it.

    Attributes:
        settings: "default", or as in ``PYTORCH_CUDA_ALLOC_CONF``: "expandable_segments:True".
        peak_reserved_bytes: the highest ``torch.cuda.memory_reserved`` from the first tensor of the model on.
        peak_allocated_bytes: ``torch.cuda.max_memory_allocated`` of the steady step. Above ``peak_bytes`` by the rests
            of blocks that are too small to be split off.
        num_segments: pieces of device memory held at the end.
        num_steps: how many training steps that is over; 0 if not known.
    """

    settings: str
    peak_reserved_bytes: int
    peak_allocated_bytes: int
    num_segments: int
    num_steps: int = 0


@dataclass(frozen=True)
class Overhead:
    """Memory of the device that no tensor of the step accounts for, as a range; ``source`` says where it comes from."""

    name: str
    low_bytes: int
    high_bytes: int
    source: str


@dataclass(frozen=True)
class MemoryLedger:
    """Where the bytes of one steady training step go.

    ``by_category`` and ``by_module`` (module -> category -> bytes) describe the moment of the peak and each add up
    to ``peak_bytes``; so does each of ``phases`` for its own. ``timeline`` is (event number, live bytes), thinned but
    keeping the maxima. ``live_groups`` is everything alive at the peak, largest first; ``live_at_peak`` its largest
    single storages. ``batch`` has dtype and shape of every tensor of the step's batch, such as ``int64[8, 64]``.
    ``reserved`` and ``overhead`` are of CUDA only; the first of ``reserved`` has the allocator's default settings.
    ``assumed`` is what was taken for granted of the device, by the names of ``--assume``: enough to trace again in the
    same way.
    """

    source: str  # "estimate", "measure", or a bound: "bound" is no less, "lower bound" no more than the step takes
    device: str
    optimizer: str
    micro_batches: int
    checkpoint: tuple[str, ...]
    peak_bytes: int
    peak_phase: str
    state_bytes: int
    by_category: dict[str, int]
    by_module: dict[str, dict[str, int]]
    phases: tuple[PhasePeak, ...]
    live_at_peak: tuple[LiveTensor, ...]
    timeline: tuple[tuple[int, int], ...]
    num_events: int
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    reserved: tuple[Reservation, ...] = ()
    overhead: tuple[Overhead, ...] = ()
    live_groups: tuple[LiveGroup, ...] = ()
    batch: tuple[str, ...] = ()
    assumed: dict[str, str] = field(default_factory=dict)
    gradient_release: bool = False
    weights: str | None = None  # the form that switches.weights asked for
    sharding: str = ""  # "fsdp2 x 8": what rank 0 of so many holds
    on_real: bool = False  # an estimate whose steps were run on real tensors, as fake ones could not go on

    @property
    def switches(self) -> Switches:
        """The switches it was traced or measured under."""
        return Switches(self.micro_batches, self.checkpoint, self.gradient_release, self.weights)

    @property
    def allocated_bytes(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` says of the step: the peak, and on CUDA the rests of blocks that
        are too small to be split off.
        """
        return max(self.peak_bytes, self.reserved[0].peak_allocated_bytes) if self.reserved else self.peak_bytes

    @property
    def needed_bytes(self) -> int:
        """Device memory below which the step cannot run: what is allocated at the peak and the least overhead. The
        allocator gives back what it caches before it gives up, so fragmentation only counts in part.
        """
        return self.allocated_bytes + sum(line.low_bytes for line in self.overhead)

    @property
    def comfortable_bytes(self) -> int:
        """Device memory with which the allocator, at default settings, never has to give anything back."""
        reserved = self.reserved[0].peak_reserved_bytes if self.reserved else self.peak_bytes
        return max(reserved, self.peak_bytes) + sum(line.high_bytes for line in self.overhead)

    def phase(self, name: str) -> PhasePeak:
        """The record of one phase; KeyError if that phase never ran."""
        for record in self.phases:
            if record.phase == name:
                return record
        raise KeyError(name)


@dataclass(frozen=True)
class SnrValue:
    """SNR of the second moment along ``axes``, averaged over slices, then over the recorded steps (2503.01843).

    ``median`` is the median over slices, averaged over steps; ``error`` the mean of 1/(1+SNR): the share of the
    squared norm of v that its mean loses. None where no slice was finite.
    """

    axes: tuple[int, ...]
    snr: float | None
    median: float | None
    error: float | None


@dataclass(frozen=True)
class FidelityValue:
    """What one candidate would do to AdamW's update of one tensor, averaged over the recorded steps.

    ``abs_d1`` = 1/2 sum (u_c - u)^2 sqrt(v_hat): the update error in Adam's own metric, learning rate factored out; it
    ranks candidates that keep the momentum, and nothing else. For those that drop it there are, over windows of 24
    steps, ``displacement_ratio`` = ||sum u_c|| / ||sum u||; ``lr_multiplier``, its inverse: the factor on the learning
    rate with which the candidate moves the weights as far as AdamW; and ``abs_d24`` = 1/2 sum (x_c - x)^2 sqrt(v_hat)
    with x = (sum u) / 24 and the candidate's taken times that factor. None: not measured, as where steps were too few.

    ``half_scores``: the mean of ``abs_d1`` over the first and over the second half of the recorded steps.
    """

    candidate: str
    abs_d1: float
    one_minus_cos: float
    abs_d24: float | None = None
    displacement_ratio: float | None = None
    lr_multiplier: float | None = None
    half_scores: tuple[float, float] | None = None


@dataclass(frozen=True)
class HessianValue:
    """Block structure of the Hessian for one partition: 1 = perfectly block diagonal, 0 = chance, <0 = worse."""

    partition: str
    score: float
    stderr: float
    chance: float
    estimator: str  # "gradient-covariance" or "hessian-vector-products"
    num_samples: int


@dataclass(frozen=True)
class ParameterProbe:
    """Everything measured for one parameter; empty tuples mean not measured, ``unknown`` says why.

    ``snr_axes``: what the probe's SNR rule averages the second moment over, None to keep it dense. ``partition``: the
    blocks that share a second moment by the Hessian's structure ("head", "row", "column", "head_column"), or the static
    prior; ``partition_evidence`` says which of the two it was, and ``partition_measured`` is True for the first.
    ``sampled``: how many elements stood for the whole tensor in the shadows, None for all of them. ``num_recorded``:
    recorded steps behind ``fidelity``; fewer than the probe's where it ended early.
    """

    name: str
    snr: tuple[SnrValue, ...] = ()
    fidelity: tuple[FidelityValue, ...] = ()
    hessian: tuple[HessianValue, ...] = ()
    unknown: str | None = None
    snr_axes: tuple[int, ...] | None = None
    partition: str | None = None
    partition_evidence: str | None = None
    partition_measured: bool = False
    sampled: int | None = None
    num_recorded: int = 0


@dataclass(frozen=True)
class OptimizerRun:
    """Short training from the common start with one bundled optimizer on every parameter."""

    method: str
    options: dict[str, Any]
    lr: float
    num_steps: int
    first_loss: float | None
    last_loss: float | None
    state_bytes: int
    step_seconds: float | None
    problem: str | None = None


@dataclass(frozen=True)
class ProbeLedger:
    """Statistics of the short probe runs.

    ``shadow_bytes``: most bytes that shadow optimizers held at once, at most ``shadow_limit_bytes``; ``passes``: how
    often the run was repeated from its start to stay below that. ``rank_agreement``: Spearman's correlation of the
    candidates' scores in the two halves of the window, None where there are too few; ``checkpoint``: the file whose
    weights and moments the probe started from. ``complete``: False where Ctrl-C ended it (``scan --resume`` goes on,
    with the same ``options``).
    ``notes``: what was done, in sentences; ``warnings``: what makes the numbers doubtful.
    """

    num_steps: int
    recorded_steps: tuple[int, ...]
    lr: float
    losses: tuple[float, ...]
    parameters: tuple[ParameterProbe, ...]
    runs: tuple[OptimizerRun, ...]
    warnings: tuple[str, ...] = ()
    shadow_bytes: int = 0
    shadow_limit_bytes: int = 0
    passes: int = 0
    rank_agreement: float | None = None
    snr_rule: str = "cutoff"
    checkpoint: str | None = None
    complete: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scan:
    """A scan file. ``memory`` holds one ledger per what-if traced; the first is the target as it stands, with AdamW.

    ``measured`` is the same step run for real, ``compiled`` the bound for the same step under ``torch.compile``, and
    ``asked`` the step under the switches that the scan was asked for.
    """

    target: str
    target_sha256: str | None
    environment: dict[str, str]
    fingerprint: str
    parameters: tuple[Parameter, ...]
    memory: tuple[MemoryLedger, ...]
    probe: ProbeLedger | None = None
    target_options: dict[str, Any] = field(default_factory=dict)
    measured: MemoryLedger | None = None
    compiled: MemoryLedger | None = None
    asked: MemoryLedger | None = None
    schema_version: int = SCHEMA_VERSION


# ---------------------------------------------------------------- JSON

T = TypeVar("T")


def to_json(record: Any) -> str:
    """One JSON document, keys in declared order, NaN refused."""
    return json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False, ensure_ascii=True) + "\n"


def _build(kind: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _build(next(a for a in args if a is not type(None)), value, path)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise FileFormatError(f"{path}: expected an object, found {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        known = {f.name: f for f in dataclasses.fields(kind)}
        for key in value:
            if key not in known:
                raise FileFormatError(f"{path}: unknown key '{key}'")
        missing = [n for n, f in known.items() if n not in value and _required(f)]
        if missing:
            raise FileFormatError(f"{path}: missing {', '.join(repr(m) for m in missing)}")
        return kind(**{k: _build(hints[k], v, f"{path}.{k}") for k, v in value.items()})
    if origin is tuple:
        if not isinstance(value, list):
            raise FileFormatError(f"{path}: expected a list, found {type(value).__name__}")
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise FileFormatError(f"{path}: expected {len(kinds)} items, found {len(value)}")
        return tuple(_build(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise FileFormatError(f"{path}: expected an object, found {type(value).__name__}")
        return {k: _build(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FileFormatError(f"{path}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def from_dict(kind: type[T], value: Any, where: str = "file") -> T:
    """Build a record from parsed JSON, strictly: an unknown, missing or mistyped key is a FileFormatError."""
    return typing.cast(T, _build(kind, value, where))


def load_scan(path: str | Path) -> Scan:
    """Read a scan file.

    Raises:
        FileFormatError: missing, truncated, foreign, or written by a newer memadvise.
    """
    path = Path(path)
    hint = "write it with: memadvise scan TARGET"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"cannot read the scan file {path}: {error.strerror}", hint=hint) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} is not a whole JSON document ({error})", hint=hint) from error
    version = value.get("schema_version") if isinstance(value, dict) else None
    if not isinstance(version, int):
        raise FileFormatError(f"{path} is not a memadvise scan file", hint=hint)
    if version != SCHEMA_VERSION:
        raise FileFormatError(
            f"{path} has schema version {version}; this memadvise reads version {SCHEMA_VERSION}",
            hint="scan again with this version, or update memadvise",
        )
    return from_dict(Scan, value, str(path))


def write_whole(path: str | Path, text: str, *, force: bool = True, flag: str = "-o") -> None:
    """Write a file whole or not at all: a temporary name in the same folder, flushed, then renamed.

    Its permissions are those of the file it replaces, or those any new file would get. ``flag`` is the option with
    which the user names another file.

    Raises:
        UsageError: the file exists and ``force`` is False, it is no regular file, or the folder cannot be written.
    """
    path = Path(path)
    check_regular(path, flag=flag)
    if not force and path.exists():
        raise UsageError(f"{path} exists already", hint=f"give another name with {flag}, or --force to replace it")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}; what was there before is untouched",
            hint=f"give a writable file with {flag}",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            temporary.unlink()


def check_regular(path: Path, *, flag: str = "-o") -> None:
    """Renaming over a device or a pipe would destroy it, and reading one need not end.

    Raises:
        UsageError: ``path`` exists and is no regular file.
    """
    if path.exists() and not path.is_file():
        raise UsageError(
            f"{path} is not a regular file", hint=f"name a file with {flag}; --format json prints the result on stdout"
        )
