"""The trace of a deep model from the traces of shallow ones: exact, and verified, where its blocks are equal.

Seen without the blocks' numbers, a trace is a string of events in which every block adds the same runs at the same
places: its parameters, its forward pass, its backward pass, its part of the optimizer's lists. The runs are what the
trace with one more block has more (:func:`_insertions`); repeated further, they give the trace of any depth. That is
replayed like any other trace, so peaks, phases, modules, timeline and allocator are all those of the deep model.

It holds only if the trace with yet another block is predicted in every event, storage and mark.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import is_fake

from memadvise.errors import TargetError
from memadvise.memory.events import Storage, Trace
from memadvise.memory.repeats import Blocks, NotRepeated, find_blocks, leave_blocks
from memadvise.target import Target

TRACED = (2, 3, 4)  # the runs from the first two; the third must come out
_MAX_TRIES = 10_000
_FIELDS = [f.name for f in fields(Storage)]
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def trace_by_depth(target: Target, trace: Callable[[Target], Trace]) -> Trace:
    """``trace(target)`` from traces with 2, 3 and 4 of the model's repeated blocks.

    Args:
        target: its blocks have to be treated alike, also by the optimizer.
        trace: traces a target whole.

    Raises:
        NotRepeated: the model has no row of equal blocks, does not run with fewer of them, or a trace is not what
            those with fewer blocks predict.
    """
    found: list[Blocks] = []
    traces = []
    for count in TRACED:
        with contextlib.ExitStack() as undone:

            def build_model(count: int = count, undone: contextlib.ExitStack = undone) -> nn.Module:
                model = target.model()
                found.append(_shorten(model, count, undone))
                return model

            try:
                traces.append(trace(replace(target, build_model=build_model)))
            except TargetError as error:
                raise NotRepeated(f"it does not run with {count} blocks ({error.message})") from error
    return extend(traces, found[0])


def _shorten(model: nn.Module, count: int, undone: contextlib.ExitStack) -> Blocks:
    """Leave ``count`` blocks in a model: for ``undone``, if it was built before and is used again; else for good, so
    that nothing is left of the others.
    """
    container, blocks = find_blocks(model, at_least=TRACED[-1] + 1)
    first_left_out = weakref.ref(container[blocks.first + count])  # type: ignore[index]
    children = leave_blocks(container, blocks, count)
    if not all(is_fake(p) for p in model.parameters()):
        undone.callback(setattr, container, "_modules", children)
        return blocks
    del children
    if first_left_out() is not None:  # blocks that hold themselves in a cycle
        gc.collect()
    return blocks


def extend(traces: Sequence[Trace], blocks: Blocks) -> Trace:
    """The trace of a model with ``blocks.count`` equal blocks from the traces of it with 2, 3 and 4 of them.

    Raises:
        NotRepeated: the trace with 4 blocks is not what those with 2 and 3 predict.
    """
    vocabulary = _Vocabulary()
    strings = [_read(trace, blocks, count, vocabulary) for trace, count in zip(traces, TRACED, strict=True)]
    runs = _insertions(*(string.tokens for string in strings))
    places = _places(strings[1], strings[2])

    def grown(count: int) -> Trace:
        copies = count - TRACED[0]  # of each run; the trace with 3 blocks has one
        tokens: list[int] = []
        done = 0
        for start, stop in runs:
            tokens += strings[1].tokens[done:start]
            tokens += strings[1].tokens[start:stop] * copies
            done = stop
        tokens += strings[1].tokens[done:]
        return _write(tokens, places, blocks, count, vocabulary, like=traces[-1])

    check, last = grown(TRACED[-1]), traces[-1]
    for part in ("events", "storages", "marks", "start", "stop"):
        if getattr(check, part) != getattr(last, part):
            raise NotRepeated(f"with {TRACED[-1]} blocks the step has other {part} than those with fewer predict")
    whole = grown(blocks.count)
    whole.state_bytes = _linear([trace.state_bytes for trace in traces], blocks.count, "bytes of optimizer state")
    whole.assumptions = _linear_text([trace.assumptions for trace in traces], blocks.count)
    whole.warnings = _linear_text([trace.warnings for trace in traces], blocks.count)
    listed = f"{blocks.name}.{blocks.first} to {blocks.first + blocks.count - 1}".lstrip(".")
    whole.assumptions.append(
        f"Depth extrapolated: traced with 2, 3 and 4 of the {blocks.count} equal blocks {listed}; every event of "
        "the third trace is what the first two predict."
    )
    return whole


# ---------------------------------------------------------------- traces as strings


class _Vocabulary:
    """Numbers for tokens: a birth of some kind, a death among those of its kind, a mark."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}
        self.tokens: list[Hashable] = []

    def number(self, token: Hashable) -> int:
        if token not in self.numbers:
            self.numbers[token] = len(self.tokens)
            self.tokens.append(token)
        return self.numbers[token]


@dataclass(frozen=True)
class _Birth:
    """A storage but for the number of its block, which is ``*`` in ``module``: the values of all its fields."""

    module: str
    values: tuple[Any, ...]

    @classmethod
    def of(cls, storage: Storage, module: str) -> _Birth:
        return cls(module, tuple(None if name == "module" else getattr(storage, name) for name in _FIELDS))

    def storage(self, module: str) -> Storage:
        return Storage(**{**dict(zip(_FIELDS, self.values, strict=True)), "module": module})


@dataclass(frozen=True)
class _Death:
    """The end of a storage of kind ``birth``: that which is ``rank`` births before the newest alive (0), or, below 0,
    the oldest (-1).
    """

    birth: int
    rank: int


@dataclass
class _String:
    """``tokens`` of a trace, and of each kind of birth in a block, the blocks in the order of births."""

    tokens: list[int] = field(default_factory=list)
    blocks: dict[int, list[int]] = field(default_factory=dict)


def _read(trace: Trace, blocks: Blocks, count: int, vocabulary: _Vocabulary) -> _String:
    string = _String()
    marks = iter([*trace.marks, (len(trace.events) + 1, "")])
    mark_at, phase = next(marks)
    kinds: dict[int, int] = {}
    alive: dict[int, list[int]] = {}
    for at in range(len(trace.events) + 1):
        while mark_at <= at:
            string.tokens.append(vocabulary.number(("mark", phase)))
            mark_at, phase = next(marks)
        for name, place in (("start", trace.start), ("stop", trace.stop)):
            if place == at:
                string.tokens.append(vocabulary.number(name))
        if at == len(trace.events):
            break
        event = trace.events[at]
        if event >= 0:
            storage = trace.storages[event]
            module, block = _split(storage.module, blocks, count)
            kind = vocabulary.number(_Birth.of(storage, module))
            kinds[event] = kind
            alive.setdefault(kind, []).append(event)
            if block is not None:
                string.blocks.setdefault(kind, []).append(block)
            string.tokens.append(kind)
        else:
            kind = kinds[~event]
            peers = alive[kind]
            rank = len(peers) - 1 - peers.index(~event)
            del peers[len(peers) - 1 - rank]
            if rank and rank == len(peers):
                rank = -1
            string.tokens.append(vocabulary.number(_Death(kind, rank)))
    return string


def _write(
    tokens: Sequence[int],
    places: dict[int, list[_Pass]],
    blocks: Blocks,
    count: int,
    vocabulary: _Vocabulary,
    like: Trace,
) -> Trace:
    """The trace that a string of tokens stands for, in a model with ``count`` blocks."""
    trace = replace(like, storages=[], events=[], marks=[])
    in_order = {kind: itertools.chain.from_iterable(p.blocks(count) for p in passes) for kind, passes in places.items()}
    alive: dict[int, list[int]] = {}
    for number in tokens:
        token = vocabulary.tokens[number]
        if isinstance(token, _Birth):
            block = next(in_order[number], None) if number in in_order else None
            if number in in_order and block is None:
                raise NotRepeated(f"{token.module} takes part in the step in other blocks at other depths")
            born = trace.born(token.storage(_join(token.module, block, blocks, count)))
            alive.setdefault(number, []).append(born)
        elif isinstance(token, _Death):
            peers = alive.get(token.birth, [])
            if len(peers) <= token.rank or not peers:
                raise NotRepeated("a tensor would have to be freed that is not there")
            trace.died(peers.pop(0 if token.rank < 0 else len(peers) - 1 - token.rank))
        elif token == "start":
            trace.start = len(trace.events)
        elif token == "stop":
            trace.stop = len(trace.events)
        else:
            assert isinstance(token, tuple)
            trace.marks.append((len(trace.events), token[1]))
    if any(next(left, None) is not None for left in in_order.values()):
        raise NotRepeated("with more blocks, blocks take part in the step less often")
    return trace


def _split(module: str, blocks: Blocks, count: int) -> tuple[str, int | None]:
    """A module's name without its block's number, and that number; behind the blocks, numbers count from their end."""
    prefix = f"{blocks.name}." if blocks.name else ""
    if not module.startswith(prefix):
        return module, None
    index, dot, rest = module[len(prefix) :].partition(".")
    if not index.isdecimal() or int(index) < blocks.first:
        return module, None
    behind = int(index) - blocks.first - count
    if behind >= 0:
        return f"{prefix}+{behind}{dot}{rest}", None
    return f"{prefix}*{dot}{rest}", int(index) - blocks.first


def _join(module: str, block: int | None, blocks: Blocks, count: int) -> str:
    """The inverse of :func:`_split`."""
    prefix = f"{blocks.name}." if blocks.name else ""
    if block is not None:
        return f"{prefix}{blocks.first + block}{module[len(prefix) + 1 :]}"
    if module.startswith(f"{prefix}+"):
        index, dot, rest = module[len(prefix) + 1 :].partition(".")
        return f"{prefix}{blocks.first + count + int(index)}{dot}{rest}"
    return module


# ---------------------------------------------------------------- what another block adds


def _insertions(first: Sequence[int], second: Sequence[int], third: Sequence[int]) -> list[tuple[int, int]]:
    """The runs of ``second``, as (start, stop), without which it is ``first`` and with each of which twice ``third``.

    The three strings are read side by side. Where they part, a run begins: one that is there in ``second`` and twice
    in ``third``, and after which they agree again. Where several lengths would do, the shortest is tried first.

    Raises:
        NotRepeated: there are no such runs.
    """

    def agree(at: int, offset: int) -> int:
        """How far they agree from ``first[at]`` on, with ``offset`` inserted once and twice before it."""
        end = min(len(first), len(second) - offset, len(third) - 2 * offset)
        while at < end and first[at] == second[at + offset] == third[at + 2 * offset]:
            at += 1
        return at

    def lengths(at: int, offset: int) -> Iterator[int]:
        """Lengths of a run that may begin here."""
        begin, twice = at + offset, at + 2 * offset
        for length in range(1, total - offset + 1):
            run = second[begin : begin + length]
            if third[twice + length] == run[0] and third[twice : twice + 2 * length] == [*run, *run]:
                after = at + 1 if at < len(first) else at
                if agree(at, offset + length) >= after:
                    yield length

    total = len(second) - len(first)
    if len(third) - len(second) != total:
        raise NotRepeated("another block does not add the same each time")
    at = agree(0, 0)
    choices = [(at, 0, lengths(at, 0))]  # of the runs so far: where each begins, what was inserted before, lengths left
    runs: list[tuple[int, int]] = []
    for _ in range(_MAX_TRIES):
        at, offset, left = choices[-1]
        if at == len(first) and offset == total:
            return runs
        length = next(left, None)
        if length is not None:
            runs.append((at + offset, at + offset + length))
            at, offset = agree(at, offset + length), offset + length
            choices.append((at, offset, lengths(at, offset)))
        elif runs:
            runs.pop()
            choices.pop()
        else:
            break
    raise NotRepeated("another block does not only add to the step, the same each time")


@dataclass(frozen=True)
class _Pass:
    """A kind of birth in one block after the other, ``times`` in each: from block ``first`` (below 0: counted from the
    last block's successor) in steps of +1 or -1 to ``last``.
    """

    first: int
    last: int
    step: int
    times: int

    def blocks(self, count: int) -> Iterator[int]:
        first, last = (end + count if end < 0 else end for end in (self.first, self.last))
        for block in range(first, last + self.step, self.step):
            yield from itertools.repeat(block, self.times)


def _places(one: _String, more: _String) -> dict[int, list[_Pass]]:
    """For each kind of birth in a block, the passes over the blocks in which it happens."""
    count = TRACED[1]
    places: dict[int, list[_Pass]] = {}
    for kind, order in more.blocks.items():
        fewer, passes = _monotone(one.blocks.get(kind, [])), _monotone(order)
        if [times for *_, times in fewer] != [times for *_, times in passes]:
            raise NotRepeated("with another block, other blocks take part in the step")
        places[kind] = [
            _Pass(_end(a[0], b[0], count), _end(a[1], b[1], count), b[2], b[3])
            for a, b in zip(fewer, passes, strict=True)
        ]
    return places


def _end(fewer: int, more: int, count: int) -> int:
    """A block's number that stays the same with another block, or moves with the last one: then from the end."""
    if more == fewer:
        return more
    if more == fewer + 1:
        return fewer - count
    raise NotRepeated("with another block, other blocks take part in the step")


def _monotone(order: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(first, last, step, times) of each stretch that goes up or down by one, with as many of each number."""
    groups = [(block, len(list(run))) for block, run in itertools.groupby(order)]
    found = []
    at = 0
    while at < len(groups):
        first, times = groups[at]
        last, step = first, 0
        at += 1
        while at < len(groups) and groups[at][1] >= times and groups[at][0] - last == (step or groups[at][0] - last):
            if abs(groups[at][0] - last) != 1:
                break
            step = groups[at][0] - last
            last = groups[at][0]
            if groups[at][1] > times:  # the next stretch begins where this one turns
                groups[at] = (last, groups[at][1] - times)
                break
            at += 1
        found.append((first, last, step or 1, times))
    return found


# ---------------------------------------------------------------- numbers and sentences


def _linear(values: Sequence[int], count: int, what: str) -> int:
    growth = values[1] - values[0]
    if values[2] - values[1] != growth:
        raise NotRepeated(f"{what}: {values[0]}, {values[1]}, {values[2]} with 2, 3, 4 blocks do not lie on a line")
    return values[2] + growth * (count - TRACED[2])


def _linear_text(texts: Sequence[Sequence[str]], count: int) -> list[str]:
    """Sentences whose numbers grow with the depth, as they would read at ``count`` blocks."""
    said = []
    for lines in itertools.zip_longest(*texts, fillvalue=""):
        if len({_NUMBER.sub("#", line) for line in lines}) > 1:
            raise NotRepeated(f"it says '{lines[-1]}' with {TRACED[-1]} blocks only")
        words = _NUMBER.split(lines[-1])
        columns = zip(*(_NUMBER.findall(line) for line in lines), strict=True)
        numbers = [
            c[0] if len(set(c)) == 1 else str(_linear([*map(_whole, c)], count, f"'{lines[-1]}'")) for c in columns
        ]
        said.append("".join(itertools.chain.from_iterable(zip(words, [*numbers, ""], strict=True))))
    return said


def _whole(number: str) -> int:
    if not number.isdecimal():
        raise NotRepeated(f"a size in a sentence about the step, {number}, grows with the depth")
    return int(number)
