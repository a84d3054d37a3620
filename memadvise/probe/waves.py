"""The shadows of one pass of the probe: which tensors are watched at once, and what happens when memory runs out.

All shadows together hold at most a given number of bytes. Where the tensors need more, the run is repeated from its
start, on the same batches with the same random numbers, and each pass watches its share of them. Where memory runs out
all the same, half of the tensors in flight are dropped and watched in a later pass; what they recorded is kept until
then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from memadvise.errors import UsageError
from memadvise.ledger import Parameter
from memadvise.plan.schema import Setting
from memadvise.probe.shadow import Moment, Need, TensorShadows, bytes_needed, watched
from memadvise.probe.training import Moments, is_out_of_memory, release_memory
from memadvise.units import format_bytes

SHADOW_BYTES = 2**32  # the limit unless told otherwise


def plan_waves(needs: Mapping[str, Need], limit: int) -> list[list[str]]:
    """The tensors of each pass: as few passes as the limit allows, each with tensors from all over the model.

    Raises:
        UsageError: one tensor alone needs more.
    """
    for name, need in needs.items():
        if need.held_bytes + need.transient_bytes > limit:
            raise UsageError(
                f"the shadows of {name} need {format_bytes(need.held_bytes + need.transient_bytes)}, more than the "
                f"limit of {format_bytes(limit)}",
                hint="raise --probe-memory, or scan with --no-probe",
            )
    names = list(needs)
    count = 1
    while count <= len(names):
        waves = [names[first::count] for first in range(count)]
        if all(wave_bytes([needs[name] for name in wave]) <= limit for wave in waves):
            return waves
        count += 1
    return []


def wave_bytes(needs: Sequence[Need]) -> int:
    """Most bytes of shadows that run side by side: what all hold, and the temporaries of one at a time."""
    return sum(need.held_bytes for need in needs) + max((need.transient_bytes for need in needs), default=0)


def needs_of(parameters: Sequence[Parameter], settings: Mapping[str, Sequence[Setting]]) -> dict[str, Need]:
    """Name -> bytes for every parameter with a candidate to be watched."""
    return {p.name: bytes_needed(p, settings[p.name]) for p in parameters if watched(settings.get(p.name, ()))}


@dataclass
class Wave:
    """The shadows of one pass.

    Args:
        parameters: to be watched, at most what the limit allows.
        settings: candidates by name.
        betas, eps: of AdamW.
        seed: of samples.

    Attributes:
        results: what every tensor has recorded, those dropped included.
        dropped: names to be watched in a later pass.
        failed: name -> why it cannot be watched at all.
    """

    parameters: Sequence[Parameter]
    settings: Mapping[str, Sequence[Setting]]
    betas: tuple[float, float]
    eps: float
    seed: int = 0
    results: dict[str, TensorShadows] = field(default_factory=dict, init=False)
    dropped: list[str] = field(default_factory=list, init=False)
    failed: dict[str, str] = field(default_factory=dict, init=False)
    most_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._in_flight = {p.name: p for p in self.parameters}

    def start(self, tensors: Mapping[str, Tensor], moments: Moments) -> None:
        """From a checkpoint: make the shadows of all tensors that have live moments already."""
        for name, parameter in list(self._in_flight.items()):
            moment = moments.of(tensors[name]) if name in tensors else None
            if moment is not None:
                self._guarded(name, lambda p=parameter, m=moment: self._make(p, m[1], m))  # type: ignore[misc]

    def after_step(
        self, tensors: Mapping[str, Tensor], moments: Moments, step: int, *, record: bool, begin: bool, end: bool
    ) -> None:
        """Step the shadows of every tensor that has a gradient; arguments as :meth:`TensorShadows.step`."""
        for name in list(self._in_flight):
            tensor = tensors.get(name)
            if name not in self._in_flight or tensor is None or tensor.grad is None:
                continue
            moment = moments.of(tensor)
            if moment is None:
                continue

            def go(name: str = name, gradient: Tensor = tensor.grad, moment: Moment = moment) -> None:
                if name not in self.results:
                    self._make(self._in_flight[name], gradient, None)
                self.results[name].step(gradient, moment, step, record=record, begin=begin, end=end)

            self._guarded(name, go)

    def _make(self, parameter: Parameter, first: Tensor, moment: Moment | None) -> None:
        self.results[parameter.name] = TensorShadows(
            parameter,
            self.settings[parameter.name],
            self.betas,
            self.eps,
            first,
            seed=self.seed,
            moment=moment,
        )
        self.most_bytes = max(self.most_bytes, sum(s.nbytes for s in self.results.values() if s.shadows))

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            exhausted = True
        else:
            exhausted = False
        if exhausted:  # outside the except clause: the traceback holds the tensors that were too many
            self._halve(name)

    def shed(self) -> None:
        """Free the state of all shadows; what they recorded stays."""
        for found in self.results.values():
            found.shed()

    def relieve(self) -> bool:
        """Drop half of the tensors in flight; False if there were none to drop."""
        if not self._in_flight:
            return False
        self._halve(None)
        return True

    def _halve(self, culprit: str | None) -> None:
        """Drop half of those in flight, ``culprit`` among them; the last one of all will not be tried again."""
        names = [name for name in self._in_flight if name != culprit]
        if culprit is not None and not names:
            self.failed[culprit] = "out of memory while measuring its candidates"
        keep = len(self._in_flight) // 2
        for name in [*names[keep:], *([culprit] if culprit else [])]:
            del self._in_flight[name]
            if name not in self.failed:
                self.dropped.append(name)
            if name in self.results:
                self.results[name].shed()
        release_memory()
