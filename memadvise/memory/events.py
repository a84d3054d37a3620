"""The records of a trace: storages, the list of allocations and frees, and marks where a phase begins.

Categories are not stored: :mod:`memadvise.memory.replay` decides them afterwards, when every lifetime is known.
The same records come from a fake trace and from the allocator events of a measured step.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Storage:
    """One block of memory.

    Attributes:
        num_bytes: bytes as asked for, before the allocator's rounding.
        op: the operation that made it, ``""`` if it existed before.
        module: dotted name of the module that ran, ``""`` if none did.
        phase: the phase in which it was born: "setup", or one of ``ledger.PHASES``.
        where: ``file:line`` of the user's code, None if no user frame was on the stack.
        kind: its identity when known: weights, gradients, optimizer_state, buffers, inputs, workspace; else None.
        recomputed: born while a checkpointed module was computed again inside the backward pass.
        communication: born as a buffer of a collective: its category, else ``""``.
        dtype: torch's name of the dtype of the tensor first seen on it, ``""`` if unknown.
    """

    num_bytes: int
    op: str
    module: str
    phase: str
    where: str | None = None
    kind: str | None = None
    recomputed: bool = False
    communication: str = ""
    dtype: str = ""


@dataclass
class Trace:
    """What happened in memory over two training steps; the second one is the steady state.

    ``events`` holds ``i`` for the birth of ``storages[i]`` and ``~i`` for its end. ``marks`` holds
    ``(index into events, phase)``: the phase of the events from that index on. ``start`` and ``stop`` delimit the
    steady step. ``granularity`` is the allocator's rounding in bytes (1 = none), ``assumed`` what is taken for granted
    of the device (:meth:`.architecture.DeviceModel.to_assumed`).
    """

    device: str
    granularity: int
    storages: list[Storage] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    start: int = 0
    stop: int = 0
    optimizer: str = ""
    state_bytes: int = 0
    batch: tuple[str, ...] = ()
    assumptions: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    assumed: dict[str, str] = field(default_factory=dict)
    sharding: str = ""
    on_real: bool = False

    def born(self, storage: Storage) -> int:
        """Record a birth; returns the storage's number."""
        number = len(self.storages)
        self.storages.append(storage)
        self.events.append(number)
        return number

    def died(self, number: int) -> None:
        """Record the end of a storage."""
        self.events.append(~number)

    def mark(self, phase: str) -> None:
        """The phase of the events from here on."""
        if not self.marks or self.marks[-1][1] != phase:
            self.marks.append((len(self.events), phase))

    def size(self, number: int) -> int:
        """Bytes the allocator hands out for a storage: at least one granule, rounded up to whole granules."""
        granule = self.granularity
        return -(-self.storages[number].num_bytes // granule) * granule
