"""The baseline of ``memadvise check``: one committed JSON file, sorted, one line a module: diffs can be reviewed.

An entry says what one target took with one plan. Its ``environment`` is what the bytes depend on beside the target
itself: numbers from another one are not comparable. Its ``information`` (hash of the file, dtype, optimizer) may change
with the target; it is told when the bytes do. Modules with equal bytes share a line, ``h.{0..11}.mlp``, and the line's
bytes are those of each.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from memadvise.compare import operation
from memadvise.errors import FileFormatError, Mark, UsageError
from memadvise.ledger import CATEGORIES, MemoryLedger, check_regular, from_dict, write_whole
from memadvise.names import expand_ranges, fold_ranges

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: two writers at once may lose an entry there, never the file
    fcntl = None

BASELINE_VERSION = 1
DEFAULT_BASELINE = "memadvise.baseline.json"
UPDATE_HINT = "write it with: memadvise check TARGET --update-baseline"
_WITHOUT_OP = ("weights", "gradients", "optimizer_state", "inputs")  # what they are matters, not which op made them

_WHOLE = ("estimate", "measure")  # other ledgers are bounds, and no number to compare these with
_EDITED = "the file was edited or badly merged: run memadvise check TARGET --update-baseline"
T = TypeVar("T")

Bytes = dict[str, dict[str, dict[str, int]]]
"""module -> category -> maker -> bytes; a maker is an operation and a dtype (``"gelu float32"``), or a dtype alone."""


@dataclass(frozen=True)
class Entry:
    """What one target takes with one plan; bytes are those alive at the peak, ``by_phase`` the peak of each phase.

    ``other_phases`` has module -> category -> bytes at the peaks of the phases that are not the highest: should one of
    them become the highest, it is compared with itself.
    ``tolerance`` is the entry's own, set by hand in the file and kept by updates: ``"1%"`` or ``"1%,16MiB"``, say.
    """

    target: str
    plan: str | None
    batch: tuple[str, ...]
    source: str
    environment: dict[str, str]
    information: dict[str, str]
    peak_bytes: int
    peak_phase: str
    state_bytes: int
    by_phase: dict[str, int]
    by_category: dict[str, int]
    by_module: Bytes
    other_phases: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: str | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        """Which entry of the file is this one's predecessor. A target has one batch shape, which may change."""
        return _identity(self.target, self.plan, self.options, self.source, self.environment.get("device", ""))

    @property
    def title(self) -> str:
        """Target, plan and batch as people say it."""
        given = ", ".join(f"{name} {value}" for name, value in sorted(self.options.items()))
        parts = (self.plan or self.information.get("optimizer", ""), given, "measured" * (self.source == "measure"))
        return f"{self.target} ({'; '.join(part for part in (*parts, ', '.join(self.batch)) if part)})"


def _identity(target: str, plan: str | None, options: Mapping[str, Any], source: str, device: str) -> tuple[str, ...]:
    lane = "measure" if source == "measure" else "estimate"  # a lower bound is an estimate that went less far
    return target, plan or "", json.dumps(options, sort_keys=True), lane, device


@dataclass(frozen=True)
class Observation:
    """An entry just made, the user's line behind every (module, category, maker) that has one, and warnings."""

    entry: Entry
    places: dict[tuple[str, str, str], str]
    warnings: tuple[str, ...] = ()


def observe(
    ledger: MemoryLedger,
    *,
    target: str,
    plan: str | None,
    options: Mapping[str, Any],
    environment: Mapping[str, str],
    information: Mapping[str, str],
) -> Observation:
    """The entry of a ledger; ``information`` is added to what the ledger itself knows, ``environment`` has "device"."""
    by_module: Bytes = defaultdict(lambda: defaultdict(Counter))
    largest: dict[tuple[str, str, str], tuple[int, str]] = {}
    dtypes = set()
    for group in ledger.live_groups:
        maker = _maker(group.op, group.dtype, group.category)
        by_module[group.module][group.category][maker] += group.num_bytes
        if group.where and group.num_bytes > largest.get(key := (group.module, group.category, maker), (0, ""))[0]:
            largest[key] = group.num_bytes, group.where
        if group.category == "weights":
            dtypes.add(group.dtype)
    entry = Entry(
        target=target,
        plan=plan,
        batch=ledger.batch,
        source=ledger.source,
        environment={**environment, **({} if ledger.source in _WHOLE else {"source": ledger.source})},
        information={"dtype": ", ".join(sorted(dtypes)), "optimizer": ledger.optimizer, **information},
        peak_bytes=ledger.peak_bytes,
        peak_phase=ledger.peak_phase,
        state_bytes=ledger.state_bytes,
        by_phase={phase.phase: phase.peak_bytes for phase in ledger.phases},
        by_category=dict(ledger.by_category),
        by_module={
            module: {category: dict(makers) for category, makers in categories.items()}
            for module, categories in by_module.items()
        },
        other_phases={
            phase.phase: phase.by_module
            for phase in ledger.phases
            if phase.phase != ledger.peak_phase and phase.by_module
        },
        options=dict(options),
    )
    return Observation(entry, {key: where for key, (_, where) in largest.items()}, ledger.warnings)


def _maker(op: str, dtype: str, category: str) -> str:
    """``aten.gelu.default`` and float32 -> ``"gelu float32"``; the same for the profiler's ``aten::gelu``."""
    if category in _WITHOUT_OP:
        return dtype or "-"
    return " ".join(part for part in (operation(op), dtype) if part) or "-"


# ---------------------------------------------------------------- the file


class Baseline:
    """The entries of a baseline file by identity. Those not asked for are kept as they are, and not decoded."""

    def __init__(self, path: Path, raw: Mapping[tuple[str, ...], dict[str, Any]]) -> None:
        self.path = path
        self._raw = dict(raw)

    def __len__(self) -> int:
        return len(self._raw)

    def find(self, entry: Entry) -> Entry | None:
        """The predecessor of ``entry``; else one of the same target and plan from another device; else None.

        Raises:
            FileFormatError: it is there and broken.
        """
        raw = self._raw.get(entry.identity)
        if raw is None:
            others = sorted(identity for identity in self._raw if identity[:4] == entry.identity[:4])
            raw = self._raw[others[0]] if others else None
        return None if raw is None else _decode(raw, self.path)

    def put(self, entry: Entry) -> None:
        """Add an entry or replace its predecessor, whose tolerance it keeps."""
        before = self._raw.get(entry.identity, {})
        kept = {"tolerance": before["tolerance"]} if before.get("tolerance") is not None else {}
        self._raw[entry.identity] = {**_encode(entry), **kept}

    def text(self) -> str:
        """The whole file."""
        entries = ",\n".join(_entry_text(self._raw[identity]) for identity in sorted(self._raw))
        body = f"[\n{entries}\n ]" if entries else "[]"
        return f'{{\n "schema_version": {BASELINE_VERSION},\n "entries": {body}\n}}\n'


def load_baseline(path: str | Path) -> Baseline:
    """Read a baseline file.

    Raises:
        FileFormatError: missing, truncated, foreign, written by a newer memadvise, or badly merged.
        UsageError: not a regular file.
    """
    path = Path(path)
    check_regular(path, flag="--baseline")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileFormatError(f"there is no baseline file {path}", hint=UPDATE_HINT) from error
    except OSError as error:
        raise FileFormatError(f"cannot read the baseline file {path}: {error.strerror}", hint=UPDATE_HINT) from error
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not a JSON document in UTF-8 ({error})", hint=_restore(path)) from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if text else ""
        conflict = line.startswith(("<<<<<<<", "=======", ">>>>>>>"))
        raise FileFormatError(
            f"{path} {'holds a merge conflict' if conflict else f'is not a whole JSON document ({error.msg})'}",
            where=Mark(str(path), error.lineno, error.colno, line),
            hint="take either side and run memadvise check TARGET --update-baseline" if conflict else _restore(path),
        ) from error
    except (RecursionError, ValueError) as error:  # nested without end; a number of thousands of digits
        raise FileFormatError(f"{path} is not a baseline file of memadvise", hint=_restore(path)) from error
    version = value.get("schema_version") if isinstance(value, dict) else None
    if type(version) is not int or not isinstance(entries := value.get("entries"), list):
        raise FileFormatError(f"{path} is not a baseline file of memadvise", hint=_restore(path))
    if version != BASELINE_VERSION:
        raise FileFormatError(
            f"{path} has schema version {version}; this memadvise reads version {BASELINE_VERSION}",
            hint="update memadvise" if version > BASELINE_VERSION else "write it anew with --update-baseline",
        )
    raw: dict[tuple[str, ...], dict[str, Any]] = {}
    for number, item in enumerate(entries):
        identity = _raw_identity(item, f"{path}: entry {number + 1}")
        if identity in raw:
            raise FileFormatError(
                f"{path}: two entries for {identity[0]}{f' with {identity[1]}' if identity[1] else ''}",
                hint="a merge kept both sides: delete one, and run memadvise check TARGET --update-baseline",
            )
        raw[identity] = item
    return Baseline(path, raw)


def update_baseline(path: str | Path, entries: Iterable[Entry]) -> bool:
    """Put ``entries`` into the file, which is made if need be; whether it changed.

    The file is read again under a lock, so that of two writers at once neither loses what the other wrote, and
    replaced whole, so that a full disk leaves the old one.

    Raises:
        FileFormatError: what is there is no baseline. UsageError: the folder cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link is followed, not replaced
    with _locked(path.parent):
        baseline = load_baseline(path) if path.exists() else Baseline(path, {})
        before = baseline.text() if path.exists() else None
        for entry in entries:
            baseline.put(entry)
        after = baseline.text()
        if after == before and path.read_text(encoding="utf-8") == after:
            return False
        write_whole(path, after, flag="--baseline")
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time. The lock is on the folder: a file beside the baseline would want to be committed."""
    if fcntl is None:
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(
            f"cannot open the folder {folder}: {error.strerror}", hint="name a file in another folder with --baseline"
        ) from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks: the file is still written whole
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _restore(path: Path) -> str:
    return f"restore it (git checkout {path}), or delete it and {UPDATE_HINT}"


def _raw_identity(item: Any, where: str) -> tuple[str, ...]:
    if isinstance(item, dict):
        target, plan, options = item.get("target"), item.get("plan"), item.get("options", {})
        source, environment = item.get("source"), item.get("environment")
        if isinstance(target, str) and isinstance(source, str) and isinstance(options, dict):
            if isinstance(plan, str | None) and isinstance(environment, dict):
                return _identity(target, plan, options, source, str(environment.get("device", "")))
    raise FileFormatError(f"{where} is none of memadvise's", hint="delete it, and " + UPDATE_HINT)


def _encode(entry: Entry) -> dict[str, Any]:
    raw: dict[str, Any] = {"target": entry.target, "plan": entry.plan, "options": _sorted(entry.options)}
    raw |= {"batch": list(entry.batch), "source": entry.source}
    raw |= {"environment": _sorted(entry.environment), "information": _sorted(entry.information)}
    raw |= {"peak_bytes": entry.peak_bytes, "peak_phase": entry.peak_phase, "state_bytes": entry.state_bytes}
    raw |= {
        "by_phase": entry.by_phase,
        "by_category": _sorted(entry.by_category),
        "by_module": _folded(entry.by_module),
    }
    raw["other_phases"] = {phase: _folded(modules) for phase, modules in entry.other_phases.items()}
    return raw if entry.tolerance is None else {**raw, "tolerance": entry.tolerance}


def _folded(by_module: Mapping[str, Any]) -> dict[str, Any]:
    """Modules with equal content as one key."""
    same: dict[str, list[str]] = {}
    for module, content in by_module.items():
        same.setdefault(json.dumps(_sorted(content)), []).append(module)
    return _sorted({word: json.loads(text) for text, modules in same.items() for word in fold_ranges(modules)})


def _unfolded(by_module: Mapping[str, T], where: str) -> dict[str, T]:
    found: dict[str, T] = {}
    for word, content in by_module.items():
        try:
            names = expand_ranges(word)
        except ValueError as error:
            raise FileFormatError(f"{where}: {error}", hint=_EDITED) from error
        found.update(dict.fromkeys(names, content))
    return found


def _sorted(value: Any) -> Any:
    return {key: _sorted(value[key]) for key in sorted(value)} if isinstance(value, dict) else value


def _decode(raw: dict[str, Any], path: Path) -> Entry:
    where = f"{path}: {raw['target']}"
    try:
        entry = from_dict(Entry, raw, where)
    except FileFormatError as error:
        raise FileFormatError(error.message, hint=_EDITED) from error
    by_module = _unfolded(entry.by_module, where)
    totals: Counter[str] = Counter()
    for categories in by_module.values():
        for category, makers in categories.items():
            totals[category] += sum(makers.values())
    sums = {"its modules": totals.total(), "its categories": sum(entry.by_category.values())}
    other_phases = {phase: _unfolded(modules, where) for phase, modules in entry.other_phases.items()}
    peaks = {phase: sum(sum(c.values()) for c in modules.values()) for phase, modules in other_phases.items()}
    whole = dict(totals) == entry.by_category and totals.total() == entry.peak_bytes
    if not whole or any(entry.by_phase.get(phase) != peak for phase, peak in peaks.items()):
        told = ", ".join(f"{what} to {size}" for what, size in sums.items())
        raise FileFormatError(
            f"{where}: the bytes do not add up ({told}, the peak is {entry.peak_bytes}; by phase {entry.by_phase})",
            hint=_EDITED,
        )
    return replace(entry, by_module=by_module, other_phases=other_phases)


def _entry_text(raw: Mapping[str, Any]) -> str:
    """An entry with one line a module: what a reviewer reads."""
    lines = []
    for key, value in raw.items():
        if key == "by_module" and isinstance(value, dict):
            lines.append(f'   "by_module": {_module_lines(value, 4)}')
        elif key == "other_phases" and isinstance(value, dict):
            phases = (f"    {json.dumps(phase)}: {_module_lines(modules, 5)}" for phase, modules in value.items())
            inner = ",\n".join(phases)
            lines.append(f'   "other_phases": {{\n{inner}\n   }}' if inner else '   "other_phases": {}')
        else:
            lines.append(f"   {json.dumps(key)}: {json.dumps(value)}")
    return "  {\n" + ",\n".join(lines) + "\n  }"


def _module_lines(modules: Mapping[str, Any], indent: int) -> str:
    if not isinstance(modules, dict) or not modules:
        return json.dumps(modules)
    inner = ",\n".join(f"{' ' * indent}{json.dumps(name)}: {json.dumps(modules[name])}" for name in sorted(modules))
    return f"{{\n{inner}\n{' ' * (indent - 1)}}}"


def ordered_categories(found: Iterable[str]) -> list[str]:
    """Categories in the order of the ledger, unknown ones last."""
    names = set(found)
    return [name for name in CATEGORIES if name in names] + sorted(names - set(CATEGORIES))
