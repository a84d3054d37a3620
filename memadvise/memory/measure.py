"""Measure the memory of a real training step on the CPU from the allocator events of torch.profiler.

The oracle for the estimate: the peak is exact for what the CPU allocator handed out. The events become the same
kind of trace as a fake one, so categories follow from the same rules. What the profiler does not say stays
unsaid: no source lines, and memory that libraries take past torch's allocator does not appear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from memadvise.ledger import MemoryLedger
from memadvise.memory.allocator_log import MEMORY, AllocatorLog, allocator_log
from memadvise.memory.events import Storage, Trace
from memadvise.memory.phases import Phases
from memadvise.memory.replay import build_ledger
from memadvise.memory.semantics import random_state_kept
from memadvise.memory.session import own_copy, tensors_of
from memadvise.memory.tensors import (
    default_optimizer,
    garbage_collection_paused,
    model_tensors,
    optimizer_name,
    state_bytes,
    state_tensors,
    storage_parts,
)
from memadvise.memory.trace import MakeOptimizer
from memadvise.names import canonical_name
from memadvise.plan.schema import Switches
from memadvise.switches import apply_checkpoint, train_step
from memadvise.target import Target

_AS_IT_IS = Switches()
_MARK = "memadvise::"
_FACTORIES = ("aten::empty", "aten::resize_", "aten::set_")


def measure_cpu(
    target: Target, *, optimizer: MakeOptimizer | None = None, switches: Switches = _AS_IT_IS
) -> MemoryLedger:
    """Run two real training steps on the CPU and report the second from the allocator's own events.

    Args:
        target: the model, its batches and its step; everything is computed and allocated.
        optimizer: ``model -> torch.optim.Optimizer``; default ``torch.optim.AdamW``.
        switches: checkpointing and micro-batches.

    Raises:
        TargetError, TargetRaised: the target's code is at fault. UsageError: switches that do not fit the target.
    """
    with random_state_kept(), garbage_collection_paused():
        batches = [own_copy(batch) for batch in target.batches(2)]
        model = target.model()
        if switches.checkpoint:
            apply_checkpoint(model, switches.checkpoint)
        made = (optimizer or default_optimizer)(model)
        train_step(target, model, batches[0], made, micro_batches=switches.micro_batches)
        reader = _Reader(model, made, batches[1])
        with allocator_log() as log, reader.marking():
            train_step(target, model, batches[1], made, micro_batches=switches.micro_batches)
        trace = reader.read(log)
    trace.assumptions.append("Measured: torch's CPU allocator, step 2 of 2; exact bytes.")
    return build_ledger(trace, source="measure", optimizer=trace.optimizer, switches=switches)


class _Reader:
    """Knows what is alive before the step, sets marks while it runs, and reads the profiler's events afterwards."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        self._model = model
        self._optimizer = optimizer
        self._owners: dict[torch.Tensor, str] = {
            parameter: canonical_name(name).rpartition(".")[0] for name, parameter in model.named_parameters()
        }
        self._trace = Trace(device="cpu", granularity=1, optimizer=optimizer_name(optimizer, "cpu"))
        self._alive: dict[int, int] = {}  # address -> storage number
        self._trace.mark("setup")
        for kind, owner, tensor in model_tensors(model):
            self._hold(tensor, kind, owner)
        for parameter, owner in self._owners.items():
            if parameter.grad is not None:
                self._hold(parameter.grad, "gradients", owner)
        for holder, tensor in state_tensors(optimizer):
            self._hold(tensor, "optimizer_state", self._owners.get(holder, "") if holder is not None else "")
        for tensor in tensors_of(batch):
            self._hold(tensor, "inputs", "")

    def _hold(self, tensor: torch.Tensor, kind: str, owner: str) -> None:
        for part in storage_parts(tensor):
            storage = part.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self._alive:
                record = Storage(storage.nbytes(), "", owner, "setup", kind=kind)
                self._alive[storage.data_ptr()] = self._trace.born(record)

    def marking(self) -> Any:
        """A context in which phases, modules and gradients leave marks among the profiler's events."""
        return _marks(self._model, self._owners)

    def read(self, log: AllocatorLog) -> Trace:
        """The trace of the logged step."""
        trace = self._trace
        self._add_strangers(log.nodes)
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
                origin = module or _origin(node, origins, phase)
                self._allocate(node, phase, origin, recomputing=phase == "backward" and module != "")
            elif phase == "forward":
                number = getattr(node.extra_fields, "sequence_number", -1)
                if number is not None and number >= 0:
                    origins[number] = module
        for parameter, tensor in state_tensors(self._optimizer):
            owner = self._owners.get(parameter, "") if parameter is not None else ""
            for part in storage_parts(tensor):
                self._rename(part.untyped_storage().data_ptr(), "optimizer_state", owner)
        trace.stop = len(trace.events)
        trace.mark("setup")
        trace.state_bytes = state_bytes(self._optimizer)
        return trace

    def _add_strangers(self, nodes: list[Any]) -> None:
        """What is freed during the step without having been allocated in it was alive before, whatever it is."""
        known = set(self._alive)
        for node in nodes:
            if node.name == MEMORY:
                size, address = node.extra_fields.alloc_size, node.extra_fields.ptr
                if size > 0:
                    known.add(address)
                elif address in known:
                    known.remove(address)
                else:
                    self._alive[address] = self._trace.born(Storage(-size, "", "", "setup", kind="buffers"))

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


def _marks(model: nn.Module, owners: dict[torch.Tensor, str]) -> Any:
    def leave(text: str) -> None:
        with record_function(_MARK + text):
            pass

    def gradient(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            for part in storage_parts(parameter.grad):
                leave(f"gradient={part.untyped_storage().data_ptr()}:{owners.get(parameter, '')}")

    phases = Phases(
        model, on_phase=lambda phase: leave(f"phase={phase}"), on_module=lambda module: leave(f"module={module}")
    )

    @contextlib.contextmanager
    def marking() -> Iterator[None]:
        hooks = [p.register_post_accumulate_grad_hook(gradient) for p in owners if p.requires_grad]
        try:
            with phases.hooked():
                phases.enter("forward")
                yield
        finally:
            for hook in hooks:
                hook.remove()

    return marking()


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
