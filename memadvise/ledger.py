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

SCHEMA_VERSION = 1
CATEGORIES = ("weights", "gradients", "optimizer_state", "activations", "temporaries", "buffers", "inputs", "workspace")
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
    """The highest live bytes while a phase ran, and what they were."""

    phase: str
    peak_bytes: int
    by_category: dict[str, int]


@dataclass(frozen=True)
class LiveTensor:
    """One storage alive at the peak; ``where`` is the ``file:line`` of the user's code that made it, if known."""

    num_bytes: int
    category: str
    module: str
    op: str
    phase: str
    where: str | None = None


@dataclass(frozen=True)
class MemoryLedger:
    """Where the bytes of one steady training step go.

    ``by_category`` and ``by_module`` (module -> category -> bytes) describe the moment of the peak and each add up
    to ``peak_bytes``. ``timeline`` is (event number, live bytes), thinned but keeping the maxima.
    """

    source: str  # "estimate" or "measure"
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

    ``abs_d1`` = 1/2 sum (u_c - u)^2 sqrt(v_hat): the update error in Adam's own metric, learning rate factored out.
    """

    candidate: str
    abs_d1: float
    one_minus_cos: float


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
    """Everything measured for one parameter; empty tuples mean not measured, ``unknown`` says why."""

    name: str
    snr: tuple[SnrValue, ...] = ()
    fidelity: tuple[FidelityValue, ...] = ()
    hessian: tuple[HessianValue, ...] = ()
    unknown: str | None = None


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
    """Statistics of the short probe runs."""

    num_steps: int
    recorded_steps: tuple[int, ...]
    lr: float
    losses: tuple[float, ...]
    parameters: tuple[ParameterProbe, ...]
    runs: tuple[OptimizerRun, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scan:
    """A scan file. ``memory`` holds one ledger per what-if traced; the first is the target as it stands, with AdamW."""

    target: str
    target_sha256: str | None
    environment: dict[str, str]
    fingerprint: str
    parameters: tuple[Parameter, ...]
    memory: tuple[MemoryLedger, ...]
    probe: ProbeLedger | None = None
    target_options: dict[str, Any] = field(default_factory=dict)
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


def write_whole(path: str | Path, text: str, *, force: bool = True) -> None:
    """Write a file whole or not at all: a temporary name in the same folder, flushed, then renamed.

    Its permissions are those of the file it replaces, or those any new file would get.

    Raises:
        UsageError: the file exists and ``force`` is False, it is no regular file, or the folder cannot be written.
    """
    path = Path(path)
    check_regular(path)
    if not force and path.exists():
        raise UsageError(f"{path} exists already", hint="give another name with -o, or --force to replace it")
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
            hint="give a writable file with -o",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            temporary.unlink()


def check_regular(path: Path) -> None:
    """Renaming over a device or a pipe would destroy it, and reading one need not end.

    Raises:
        UsageError: ``path`` exists and is no regular file.
    """
    if path.exists() and not path.is_file():
        raise UsageError(
            f"{path} is not a regular file", hint="name a file with -o; --format json prints the result on stdout"
        )
