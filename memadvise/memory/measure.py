"""Measure the memory of a real training step from the events of torch's own allocator, as torch.profiler logs them.

The oracle for the estimate: the peak is exact for what the allocator handed out, on the CPU and, with the allocator's
counters beside it (:mod:`.meter`), which have the last word, on CUDA. The events become the same kind of trace as a
fake one, so categories follow from the same rules. What the profiler does not say stays unsaid: no source lines, and
memory that libraries take past torch's allocator does not appear.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from memadvise.ledger import MemoryLedger
from memadvise.memory.allocator_log import MEMORY, AllocatorLog
from memadvise.memory.counted import as_counted
from memadvise.memory.events import Storage, Trace
from memadvise.memory.meter import Meter, open_meter
from memadvise.memory.phases import Phases
from memadvise.memory.replay import build_ledger
from memadvise.memory.semantics import random_state_kept
from memadvise.memory.session import describe_batch, own_copy, tensors_of
from memadvise.memory.tensors import (
    default_optimizer,
    dtype_name,
    garbage_collection_paused,
    model_tensors,
    optimizer_name,
    state_bytes,
    state_tensors,
    stepping_optimizers,
    storage_parts,
)
from memadvise.memory.trace import MakeOptimizer, Prepare, check_release
from memadvise.names import canonical_name
from memadvise.plan.schema import Switches
from memadvise.switches import apply_checkpoint, train_step
from memadvise.target import Target

_AS_IT_IS = Switches()
_MARK = "memadvise::"
_FACTORIES = ("aten::empty", "aten::resize_", "aten::set_")


def measure(
    target: Target,
    *,
    device: str = "cpu",
    optimizer: MakeOptimizer | None = None,
    prepare: Prepare | None = None,
    switches: Switches = _AS_IT_IS,
    meter: Meter | None = None,
) -> MemoryLedger:
    """Run real training steps and report the steady one, the highest of those measured.

    On the CPU the second of two steps; on CUDA the highest of three after two, with the batch of each step, and no
    other, on the device for as long as the step takes.

    Args:
        target: the model, its batches and its step; everything is computed and allocated.
        device: "cpu" or "cuda", the device at hand.
        optimizer: ``model -> torch.optim.Optimizer``; default ``torch.optim.AdamW``.
        prepare: called with the new model, to hold its weights in other forms.
        switches: checkpointing and micro-batches are done here; ``optimizer`` and ``prepare`` do the others.
        meter: the device's counters; default those of ``device``.

    Raises:
        TargetError, TargetRaised: the target's code is at fault. UsageError: switches that do not fit the target.
        EnvironmentProblem: there is no such device, or the step does not fit on it.
    """
    meter = meter or open_meter(device)
    steps = meter.warm_up_steps + meter.measured_steps
    measured: list[tuple[Trace, dict[str, int]]] = []
    with (
        random_state_kept(),
        garbage_collection_paused(),
        meter.running(),
        stepping_optimizers() as stepped,
        contextlib.ExitStack() as marks,
    ):
        waiting = [own_copy(batch) for batch in target.batches(steps)]
        # From before the model is built: what is alive in the steady step has been seen, whoever holds it.
        with meter.history() as history:
            model = meter.move(target.model())
            if prepare is not None:
                prepare(model)
            gc.collect()  # what building has left in cycles
            if switches.checkpoint:
                apply_checkpoint(model, switches.checkpoint)
            marks.enter_context(_gradients_marked(model))  # before the optimizer, whose own hooks may free gradients
            made = (optimizer or default_optimizer)(model)
            check_release(made, switches)
            for waits in waiting[: meter.warm_up_steps]:
                train_step(target, model, meter.place(waits), made, micro_batches=switches.micro_batches)
        for waits in waiting[meter.warm_up_steps :]:
            batch = meter.place(waits)
            reader = _Reader(model, [made, *stepped], batch, meter, history)
            measured.append(_logged_step(target, model, batch, made, switches.micro_batches, meter, reader))
            del batch, reader
    peaks: list[int] = []
    ledgers: list[MemoryLedger] = []
    for trace, metered in measured:
        ledger = build_ledger(trace, source="measure", optimizer=trace.optimizer, switches=switches)
        ledgers.append(as_counted(ledger, metered))
        peaks.append(max(metered.values(), default=ledger.peak_bytes))
    highest = max(ledgers, key=lambda ledger: ledger.peak_bytes)
    overhead, said = meter.overhead()
    told = f"Measured: {meter.name}, step {steps} of {steps}; exact bytes."
    if len(ledgers) > 1:
        each = ", ".join(f"{peak:,}" for peak in peaks)
        told = f"Measured: {meter.name}, the highest of {len(ledgers)} steps after {meter.warm_up_steps}: {each} bytes."
    return replace(
        highest,
        assumptions=(told, *highest.assumptions, *said),
        reserved=meter.reserved(max(peaks)),
        overhead=overhead,
    )


def measure_cpu(
    target: Target,
    *,
    optimizer: MakeOptimizer | None = None,
    prepare: Prepare | None = None,
    switches: Switches = _AS_IT_IS,
) -> MemoryLedger:
    """:func:`measure` on the CPU."""
    return measure(target, optimizer=optimizer, prepare=prepare, switches=switches)


def _logged_step(
    target: Target,
    model: nn.Module,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    micro_batches: int,
    meter: Meter,
    reader: _Reader,
) -> tuple[Trace, dict[str, int]]:
    """One step's trace, and the peak of each phase by the device's own counters (empty where it has none)."""
    peaks = _PhasePeaks(meter)
    with meter.logged() as log, reader.marking(peaks.enter):
        train_step(target, model, batch, optimizer, micro_batches=micro_batches)
        meter.settle()
    peaks.enter("")
    trace = reader.read(log)
    trace.batch = describe_batch(batch)
    return trace, peaks.peaks


class _PhasePeaks:
    """The highest bytes of each phase by the device's own counters."""

    def __init__(self, meter: Meter) -> None:
        self.peaks: dict[str, int] = {}
        self._meter = meter
        self._phase = ""

    def enter(self, phase: str) -> None:
        """Note the peak of the phase that ends here and count anew."""
        peak = self._meter.peak()
        if self._phase and peak is not None:
            self.peaks[self._phase] = max(peak, self.peaks.get(self._phase, 0))
        self._meter.reset()
        self._phase = phase


class _Reader:
    """Knows what is alive before the step, sets marks while it runs, and reads the profiler's events afterwards."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        batch: Any,
        meter: Meter,
        history: AllocatorLog | None,
    ) -> None:
        meter.settle()
        self._device = meter.device
        self._level = meter.level()
        self._history = history.nodes if history is not None else []
        self._model = model
        self._optimizers = optimizers
        self._owners = _owners(model)
        name = optimizer_name(optimizers[0], meter.device)
        self._trace = Trace(device=meter.device, granularity=meter.granularity, optimizer=name)
        self._alive: dict[int, int] = {}  # address -> storage number
        self._trace.mark("setup")
        for kind, owner, tensor in model_tensors(model):
            self._hold(tensor, kind, owner)
        for parameter, owner in self._owners.items():
            if parameter.grad is not None:
                self._hold(parameter.grad, "gradients", owner)
        for holder, tensor in state_tensors(*optimizers):
            self._hold(tensor, "optimizer_state", self._owners.get(holder, "") if holder is not None else "")
        for tensor in tensors_of(batch):
            self._hold(tensor, "inputs", "")

    def _hold(self, tensor: torch.Tensor, kind: str, owner: str) -> None:
        for part in storage_parts(tensor):
            storage = part.untyped_storage()
            here = storage.device.type == self._device
            if here and storage.nbytes() and storage.data_ptr() not in self._alive:
                record = Storage(storage.nbytes(), "", owner, "setup", kind=kind, dtype=dtype_name(part.dtype))
                self._alive[storage.data_ptr()] = self._trace.born(record)

    def marking(self, on_phase: Callable[[str], None]) -> Any:
        """A context in which phases and modules leave marks among the profiler's events."""
        return _marks(self._model, on_phase)

    def read(self, log: AllocatorLog) -> Trace:
        """The trace of the logged step."""
        trace = self._trace
        self._add_strangers(log.nodes)
        self._add_rest()
        trace.start = len(trace.events)
        phase, module = "forward", ""
        trace.mark(phase)
        origins: dict[int, str] = {}
        for node in log.nodes:
            name = node.name
            if name.startswith(_MARK):
                what, _, value = name.removeprefix(_MARK).partition("=")
                if what == "phase":
                    phase = value
                    trace.mark(phase)
                elif what == "module":
                    module = value
                else:  # gradient=ADDRESS:OWNER
                    address, _, owner = value.partition(":")
                    self._rename(int(address), "gradients", owner)
            elif name == MEMORY:
                if node.extra_fields.device.type != self._device:
                    continue
                origin = module or _origin(node, origins, phase)
                self._allocate(node, phase, origin, recomputing=phase == "backward" and module != "")
            elif phase == "forward":
                number = getattr(node.extra_fields, "sequence_number", -1)
                if number is not None and number >= 0:
                    origins[number] = module
        for parameter, tensor in state_tensors(*self._optimizers):
            owner = self._owners.get(parameter, "") if parameter is not None else ""
            for part in storage_parts(tensor):
                self._rename(part.untyped_storage().data_ptr(), "optimizer_state", owner)
        trace.stop = len(trace.events)
        trace.mark("setup")
        trace.state_bytes = state_bytes(*self._optimizers)
        return trace

    def _add_strangers(self, nodes: list[Any]) -> None:
        """What was alive before the step though neither model, optimizers nor batch hold it: by the history, where
        there is one, and what is freed during the step without having been allocated in it.
        """
        alive: dict[int, int] = {}
        for node in self._history:
            if node.name == MEMORY and node.extra_fields.device.type == self._device:
                if node.extra_fields.alloc_size > 0:
                    alive[node.extra_fields.ptr] = node.extra_fields.alloc_size
                else:
                    alive.pop(node.extra_fields.ptr, None)
        for address, size in alive.items():
            if address not in self._alive:
                self._alive[address] = self._trace.born(Storage(size, "", "", "setup", kind="buffers"))
        known = set(self._alive)
        for node in nodes:
            if node.name == MEMORY and node.extra_fields.device.type == self._device:
                size, address = node.extra_fields.alloc_size, node.extra_fields.ptr
                if size > 0:
                    known.add(address)
                elif address in known:
                    known.remove(address)
                else:
                    self._alive[address] = self._trace.born(Storage(-size, "", "", "setup", kind="buffers"))

    def _add_rest(self) -> None:
        """What the device counted before the step and nobody here holds: workspaces of libraries, spare of blocks."""
        trace = self._trace
        held = sum(trace.size(number) for number in range(len(trace.storages)))
        if self._level is not None and self._level > held:
            trace.born(Storage(self._level - held, "alive before the step", "", "setup", kind="workspace"))
        elif self._level is not None and self._level < held:
            trace.warnings.append(
                f"before the step the allocator counted {self._level:,} bytes, and the tensors that it should hold "
                f"take {held:,}: some lie in memory that it did not hand out"
            )

    def _allocate(self, node: Any, phase: str, module: str, recomputing: bool) -> None:
        size, address = node.extra_fields.alloc_size, node.extra_fields.ptr
        if size > 0:
            # Modules run inside the backward pass only to be computed again.
            record = Storage(size, _operation(node), module, phase, recomputed=recomputing)
            self._alive[address] = self._trace.born(record)
        elif address in self._alive:
            self._trace.died(self._alive.pop(address))

    def _rename(self, address: int, kind: str, owner: str) -> None:
        number = self._alive.get(address)
        if number is not None and self._trace.storages[number].kind is None:
            self._trace.storages[number].kind = kind
            self._trace.storages[number].module = owner


def _owners(model: nn.Module) -> dict[torch.Tensor, str]:
    """Parameter -> the name of its module."""
    return {parameter: canonical_name(name).rpartition(".")[0] for name, parameter in model.named_parameters()}


def _leave(text: str) -> None:
    with record_function(_MARK + text):
        pass


@contextlib.contextmanager
def _gradients_marked(model: nn.Module) -> Iterator[None]:
    """While open, every gradient that is complete leaves a mark."""
    owners = _owners(model)

    def mark(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            for part in storage_parts(parameter.grad):
                _leave(f"gradient={part.untyped_storage().data_ptr()}:{owners[parameter]}")

    hooks = [p.register_post_accumulate_grad_hook(mark) for p in owners if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _marks(model: nn.Module, on_phase: Callable[[str], None]) -> Iterator[None]:
    def phase_begins(phase: str) -> None:
        on_phase(phase)
        _leave(f"phase={phase}")

    phases = Phases(model, on_phase=phase_begins, on_module=lambda module: _leave(f"module={module}"))
    with phases.hooked():
        phases.enter("forward")
        yield


def _operation(node: Any) -> str:
    """The operation that asked for the memory: the innermost one that is more than an allocation."""
    parent = node.parent
    while parent is not None:
        if parent.name.startswith("aten::") and not parent.name.startswith(_FACTORIES):
            return str(parent.name)
        parent = parent.parent
    return ""


def _origin(node: Any, origins: dict[int, str], phase: str) -> str:
    """In the backward pass the module of the forward operation, by the profiler's sequence numbers."""
    if phase != "backward":
        return ""
    parent = node.parent
    while parent is not None:
        number = getattr(parent.extra_fields, "sequence_number", -1)
        if number in origins:
            return origins[number]
        parent = parent.parent
    return ""
