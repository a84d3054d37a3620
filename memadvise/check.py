"""What changed between a baseline entry and now, whether that is a finding, and what caused it. Without torch."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction

from memadvise.baseline import Bytes, Entry, Observation, ordered_categories
from memadvise.errors import MemadviseError, UsageError
from memadvise.ledger import CATEGORIES
from memadvise.names import repeat_pattern, shared_patterns
from memadvise.units import format_bytes, parse_bytes

MEASURE_TOLERANCE = "1%,16MiB"
MEASURE_COMPILED_TOLERANCE = "3%,16MiB"  # autotuning alone moves the allocated peak by so much
_LONGEST_LIVED_FIRST = ("weights", "buffers", "optimizer_state", "gradients")
_SHARE_OF_WEIGHTS = 0.1  # what follows from larger weights, state and logits say, may well be more than they are
_SHARE_OF_CAUSE = 0.9  # a module is named as the cause when so much of the growth lies in it
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
_PERCENT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*%")


class Status(StrEnum):
    """What the check says of one entry, the gravest last.

    A stale baseline is an improvement that is a finding, with ``--strict``.
    """

    same = "same"
    updated = "updated"
    new = "new"
    improved = "improved"
    missing = "missing"
    not_comparable = "not comparable"
    error = "error"
    stale = "stale baseline"
    over_budget = "over budget"
    regression = "regression"


FINDINGS = (Status.stale, Status.over_budget, Status.regression)  # exit 1
UNDECIDED = (Status.missing, Status.not_comparable)  # exit 2


@dataclass(frozen=True)
class Tolerance:
    """Growth that is no finding: the larger of some bytes and a share of the baseline's peak."""

    num_bytes: int = 0
    share: Fraction = Fraction(0)

    def of(self, base_bytes: int) -> int:
        """In bytes, for a baseline of so many."""
        return max(self.num_bytes, int(base_bytes * self.share))


def parse_tolerance(text: str) -> Tolerance:
    """``0``, ``16MiB``, ``1%``, or both with a comma: ``1%,16MiB`` allows the larger of the two.

    Raises:
        UsageError: none of these.
    """
    num_bytes, share = 0, Fraction(0)
    for part in text.split(","):
        percent = _PERCENT.fullmatch(part.strip())
        if percent:
            share = max(share, Fraction(percent[1]) / 100)
        elif not re.fullmatch(r"0+", part.strip()):
            try:
                num_bytes = max(num_bytes, parse_bytes(part))
            except UsageError as error:
                raise UsageError(
                    f"'{text}' is no tolerance", hint="write 0, a size, a percentage, or both: 1%,16MiB"
                ) from error
    return Tolerance(num_bytes, share)


@dataclass(frozen=True)
class Move:
    """One category in modules of one pattern: bytes at the peak before and after."""

    category: str
    pattern: str
    num_modules: int
    before_bytes: int
    after_bytes: int

    @property
    def delta_bytes(self) -> int:
        return self.after_bytes - self.before_bytes


@dataclass(frozen=True)
class Cause:
    """The largest growth: category and module pattern, what was made there, and the user's line that made it."""

    category: str
    module: str
    delta_bytes: int
    detail: str = ""
    where: str | None = None

    def __str__(self) -> str:
        notes = ", ".join(part for part in (self.detail, self.where or "") if part)
        return f"{words(self.category)} of {quoted(self.module)}{f' ({notes})' if notes else ''}"


@dataclass(frozen=True)
class Result:
    """The verdict on one target.

    ``differing`` maps keys of the environment that are not the baseline's (then nothing is compared) or, in
    ``changed``, of what the target itself is (batch, dtype, optimizer, hash) to (before, now).
    """

    title: str
    status: Status
    entry: Entry | None = None
    base: Entry | None = None
    tolerance_bytes: int = 0
    budget_bytes: int | None = None
    causes: tuple[Cause, ...] = ()
    moves: tuple[Move, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    differing: dict[str, tuple[str, str]] = field(default_factory=dict)
    changed: dict[str, tuple[str, str]] = field(default_factory=dict)
    error: MemadviseError | None = None
    place: tuple[str, int] | None = None  # file and line to annotate where no cause has one

    @property
    def delta_bytes(self) -> int | None:
        """Growth of the peak; None without a baseline to compare with."""
        return self.entry.peak_bytes - self.base.peak_bytes if self.entry and self.base else None

    def updated(self) -> Result:
        """The same where the entry is about to be written: what remains is what the budget says."""
        known = self.base is not None and self.entry is not None and self.base.identity == self.entry.identity
        over = Status.over_budget if self.over_budget_bytes else Status.updated
        return replace(self, status=over, base=self.base if known else None, differing={})

    @property
    def over_budget_bytes(self) -> int:
        """How far the peak is above the budget."""
        if self.entry is None or self.budget_bytes is None:
            return 0
        return max(0, self.entry.peak_bytes - self.budget_bytes)

    @property
    def headline(self) -> str:
        """One sentence that names the cause first."""
        entry, base = self.entry, self.base
        if self.status is Status.error:
            return self.error.message if self.error else "failed"
        assert entry is not None
        peak = format_bytes(entry.peak_bytes)
        if self.status is Status.not_comparable:
            keys = "; ".join(f"{k} is {new}, in the baseline {old}" for k, (old, new) in sorted(self.differing.items()))
            return f"not comparable: {keys}"
        if self.status is Status.missing:
            return f"no baseline entry; the peak is {peak}"
        if self.status is Status.over_budget:
            assert self.budget_bytes is not None
            over, budget = format_bytes(self.over_budget_bytes), format_bytes(self.budget_bytes)
            return f"{over} over the budget of {budget}{f': {self.causes[0]}' if self.causes else ''}"
        if base is None:
            return f"{peak}, {'a new entry' if self.status is Status.updated else 'nothing to compare with'}"
        change = growth(base.peak_bytes, entry.peak_bytes)
        if self.status is Status.regression:
            return f"{change}: {self.causes[0] if self.causes else 'the peak'}"
        if self.status in (Status.improved, Status.stale):
            return f"{change}: the baseline is stale, run memadvise check TARGET --update-baseline"
        if self.status is Status.updated:
            return f"{peak} ({'as before' if base.peak_bytes == entry.peak_bytes else change})"
        return f"{peak}{'' if base.peak_bytes == entry.peak_bytes else f' ({change}, within the tolerance)'}"


def compare(
    observation: Observation,
    base: Entry | None,
    *,
    tolerance: Tolerance | None = None,
    budget_bytes: int | None = None,
    strict: bool = False,
    without_baseline: Status = Status.missing,
    place: tuple[str, int] | None = None,
) -> Result:
    """The verdict on one observation.

    Args:
        observation: what was just traced or measured.
        base: its entry in the baseline, None if there is none.
        tolerance: the user's; default the entry's own, else 0 for an estimate and 1 % or 16 MiB for a measurement.
        budget_bytes: an absolute limit on the peak.
        strict: an improvement beyond the tolerance is a finding.
        without_baseline: the status where there is no ``base``.
        place: file and line that stand for the target.

    Raises:
        UsageError: the entry's own tolerance cannot be read.
    """
    entry = observation.entry
    over = budget_bytes is not None and entry.peak_bytes > budget_bytes
    result = Result(entry.title, without_baseline, entry, base, budget_bytes=budget_bytes, place=place)
    differing = _differing(base.environment, entry.environment) if base is not None else {}
    if base is None or differing:
        if over:
            largest = (_largest(observation),)
            return replace(result, status=Status.over_budget, base=None, differing=differing, causes=largest)
        return replace(result, status=Status.not_comparable, differing=differing) if differing else result
    if tolerance is None:
        tolerance = parse_tolerance(base.tolerance or default_tolerance(entry))
    allowed = tolerance.of(base.peak_bytes)
    delta = entry.peak_bytes - base.peak_bytes
    better = Status.stale if strict else Status.improved
    status = Status.regression if delta > allowed else better if delta < -allowed else Status.same
    changed = _differing(base.information, entry.information)
    if base.batch != entry.batch:
        changed["batch"] = (", ".join(base.batch), ", ".join(entry.batch))
    side = base if status is not Status.regression else _same_phase(base, entry)
    moved = _moved_names(side, entry)
    left = {name: makers for name, makers in side.by_module.items() if name not in moved}
    came = {name: makers for name, makers in entry.by_module.items() if name not in moved.values()}
    cells = _cells(left, came)
    causes = _causes(left, came, observation, cells, changed) if status is Status.regression else ()
    if over:
        status = Status.regression if status is Status.regression else Status.over_budget
        causes = causes or (_largest(observation),)
    return replace(
        result,
        status=status,
        tolerance_bytes=allowed,
        causes=causes,
        moves=_moves(cells),
        renamed=_renamed(side, entry, moved),
        changed=changed,
    )


def exit_code(results: Sequence[Result], *, exit_zero: bool = False) -> int:
    """1 if anything is a finding, else the gravest other code: 3 or 2 for what could not be compared, else 0.

    With ``exit_zero`` only what broke counts: targets that raise, files that cannot be read.
    """
    errors = [result.error.exit_code for result in results if result.error is not None]
    if exit_zero:
        return max(errors, default=0)
    if any(result.status in FINDINGS for result in results):
        return 1
    return max([*errors, *(2 for result in results if result.status in UNDECIDED)], default=0)


def default_tolerance(entry: Entry) -> str:
    """An estimate is exact; a measurement is not, and less so where kernels are tuned by trying."""
    if entry.source == "estimate":
        return "0"
    return MEASURE_COMPILED_TOLERANCE if entry.information.get("compiled") == "yes" else MEASURE_TOLERANCE


# ---------------------------------------------------------------- words


def words(category: str) -> str:
    """``optimizer_state`` -> ``optimizer state``."""
    return category.replace("_", " ")


def quoted(module: str) -> str:
    """A module in backticks; the ledger's own words for places outside all modules as they are."""
    return module if module.startswith("(") or module == EVERYWHERE else f"`{module}`"


def signed(size: int) -> str:
    """``+412.0 MiB``, ``-3 B``."""
    return f"{'+' if size > 0 else ''}{format_bytes(size)}"


def growth(before: int, after: int) -> str:
    """``+412 MiB (+6.1 %)``."""
    share = f" ({100 * (after / before - 1):+.1f} %)" if before else ""
    return f"{signed(after - before)}{share}"


EVERYWHERE = "the whole model"

# ---------------------------------------------------------------- what moved

_Cells = dict[tuple[str, str], tuple[int, int]]  # (module, category) -> bytes before and after, where they differ


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {
        key: (before.get(key, "-"), now.get(key, "-"))
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    }


def _same_phase(base: Entry, entry: Entry) -> Entry:
    """The base at its peak in the phase where the new one peaks; what was alive in another phase says little of it.

    Operations are not known there, hence no makers.
    """
    modules = base.other_phases.get(entry.peak_phase)
    if base.peak_phase == entry.peak_phase or modules is None:
        return base
    by_module = {module: {c: {"": size} for c, size in sizes.items()} for module, sizes in modules.items()}
    return replace(base, by_module=by_module)


def _cells(left: Bytes, came: Bytes) -> _Cells:
    cells: _Cells = {}
    for module in {*left, *came}:
        before, after = left.get(module, {}), came.get(module, {})
        for category in {*before, *after}:
            pair = sum(before.get(category, {}).values()), sum(after.get(category, {}).values())
            if pair[0] != pair[1]:
                cells[module, category] = pair
    return cells


def _moves(cells: _Cells) -> tuple[Move, ...]:
    """What grew or shrank by category and pattern, the most bytes first."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, category in sorted(cells):
        groups[category, repeat_pattern(module)[0]].append(module)
    moves = []
    for (category, _), modules in groups.items():
        before, after = (sum(cells[module, category][side] for module in modules) for side in (0, 1))
        if before != after:
            moves.append(Move(category, next(iter(shared_patterns(modules))), len(modules), before, after))
    return tuple(sorted(moves, key=lambda move: (-abs(move.delta_bytes), move.category, move.pattern)))


def _renamed(base: Entry, entry: Entry, moved: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Patterns of names that are gone and of those that came in their place."""
    alike: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for old, new in moved.items():
        if old not in entry.by_module and new not in base.by_module:
            alike[repeat_pattern(old)[0], repeat_pattern(new)[0]].append((old, new))
    names = []
    for pairs in alike.values():
        old, new = (next(iter(shared_patterns(side))) for side in zip(*pairs, strict=True))
        names.append((old, new))
    return tuple(names)


def _moved_names(base: Entry, entry: Entry) -> dict[str, str]:
    """Old name -> new name of modules whose bytes are now another module's: renamed, or renumbered in a list."""

    def unlike(side: Entry, other: Entry) -> dict[tuple[tuple[str, int], ...], list[str]]:
        found: dict[tuple[tuple[str, int], ...], list[str]] = defaultdict(list)
        for module in sorted(side.by_module, key=repeat_pattern):
            if (bytes_now := _category_bytes(side, module)) != _category_bytes(other, module):
                found[bytes_now].append(module)
        return found

    gone, come = unlike(base, entry), unlike(entry, base)
    return {old: new for alike in gone for old, new in zip(gone[alike], come.get(alike, ()), strict=False)}


def _category_bytes(side: Entry, module: str) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((name, sum(makers.values())) for name, makers in side.by_module.get(module, {}).items()))


def _causes(
    left: Bytes, came: Bytes, observation: Observation, cells: _Cells, changed: Mapping[str, tuple[str, str]]
) -> tuple[Cause, ...]:
    """A cause for every category that grew, the largest first."""
    net: Counter[str] = Counter()
    for (_, category), (before, after) in cells.items():
        net[category] += after - before
    order = {category: number for number, category in enumerate(dict.fromkeys((*_LONGEST_LIVED_FIRST, *CATEGORIES)))}
    grown = sorted((c for c in net if net[c] > 0), key=lambda c: (-net[c], order.get(c, len(order))))
    # Weights are what nothing else explains: gradients, state, temporaries and activations follow them.
    follow = sum(net[c] for c in ("weights", "gradients", "optimizer_state") if net[c] > 0)
    if net["weights"] > 0 and follow >= _SHARE_OF_WEIGHTS * sum(net[c] for c in grown):
        grown = ["weights", *(c for c in grown if c != "weights")]
    causes = [_cause(left, came, observation, cells, category, net[category]) for category in grown]
    if causes and "batch" in changed:
        was, now = changed["batch"]
        first = causes[0]
        detail = f"the batch went from {was} to {now}"
        causes[0] = Cause(first.category, first.module, first.delta_bytes, detail, None)
    return tuple(causes)


def _cause(left: Bytes, came: Bytes, observation: Observation, cells: _Cells, category: str, net: int) -> Cause:
    grown = {m: after - before for (m, c), (before, after) in cells.items() if c == category and after > before}
    place, modules = _narrowest(grown)
    before, after = (_makers(side, modules, category) for side in (left, came))
    delta = Counter(after)
    delta.subtract(before)
    maker = min(after, key=lambda name: (-delta[name], name), default="")
    where = _where(observation, modules, category, maker)
    return Cause(category, place, net, _detail(category, maker, before, after), where)


def _narrowest(grown: Mapping[str, int]) -> tuple[str, list[str]]:
    """The deepest place that holds most of the growth, numbers of repeated blocks folded, and the modules in it."""
    needed = _SHARE_OF_CAUSE * sum(grown.values())
    path: tuple[str, ...] = ()
    members = list(grown)
    while True:
        children: dict[str, list[str]] = defaultdict(list)
        for module in members:
            parts = module.split(".")
            if len(parts) > len(path):
                children["*" if parts[len(path)].isdecimal() else parts[len(path)]].append(module)
        best = max(children, key=lambda part: (sum(grown[m] for m in children[part]), part), default=None)
        if best is None or sum(grown[m] for m in children[best]) < needed:
            break
        path, members = (*path, best), children[best]
    if not path:
        return EVERYWHERE, members
    columns = zip(*(module.split(".")[: len(path)] for module in members), strict=True)
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in columns), members


def _makers(side: Bytes, modules: Iterable[str], category: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for module in modules:
        found.update(side.get(module, {}).get(category, {}))
    return found


def _where(observation: Observation, modules: Sequence[str], category: str, maker: str) -> str | None:
    """The user's line behind the most bytes of ``maker`` in ``modules``."""
    lines: Counter[str] = Counter()
    for module in modules:
        line = observation.places.get((module, category, maker))
        if line:
            lines[line] += observation.entry.by_module[module][category][maker]
    return max(lines, key=lambda line: (lines[line], line), default=None)


def _detail(category: str, maker: str, before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """What grew: a tensor that was not there before, or one that became larger."""
    if not maker or maker == "-":
        return ""
    op, _, dtype = maker.rpartition(" ")
    dtype = _SHORT.get(dtype, dtype)
    verb = "saved in " if category == "activations" else "in "
    sizes = f"{format_bytes(before.get(maker, 0))} -> {format_bytes(after[maker])}"
    gone = [name for name in before if name and name not in after]
    if "" in before:  # only their sum is known
        return f"`{op}` {verb}{dtype}: {format_bytes(after[maker])}" if op else f"{dtype}: {format_bytes(after[maker])}"
    if not op:  # a dtype alone, or an operation of unknown dtype
        was = _SHORT.get(gone[0], gone[0]) if len(gone) == 1 and maker not in before else ""
        return f"{was} became {dtype}" if was else f"{dtype}: {sizes}"
    if maker not in before:
        return f"new: `{op}` {verb}{dtype}"
    return f"`{op}` {verb}{dtype}: {sizes}"


def _largest(observation: Observation) -> Cause:
    """The category and place with the most bytes, where there is nothing to compare with."""
    entry = observation.entry
    category = max(ordered_categories(entry.by_category), key=lambda name: entry.by_category[name])
    sizes = {m: sum(c[category].values()) for m, c in entry.by_module.items() if category in c}
    place, modules = _narrowest(sizes)
    makers = _makers(entry.by_module, modules, category)
    maker = min(makers, key=lambda name: (-makers[name], name), default="")
    size = sum(sizes[m] for m in modules)
    detail = f"largest: {format_bytes(size)}"
    return Cause(category, place, size, detail, _where(observation, modules, category, maker))
