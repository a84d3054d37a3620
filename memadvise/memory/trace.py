"""Trace the memory of a training step on fake tensors: every storage, who made it, and when it goes.

The recorder is a dispatch mode. It sees each operation's outputs, follows their storages by weak references, and
so knows every birth and every end, whatever autograd, the optimizer or the user's own code keeps alive.
"""

from __future__ import annotations

import bisect
import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from memadvise.memory.callers import user_line
from memadvise.memory.events import Storage, Trace
from memadvise.memory.phases import Phases
from memadvise.memory.scratch import KernelScratch, kept_bytes
from memadvise.memory.session import FakeSession, fake_session, map_tensors, tensors_of
from memadvise.memory.tensors import (
    default_optimizer,
    garbage_collection_paused,
    model_tensors,
    optimizer_name,
    state_bytes,
    state_tensors,
    storage_parts,
)
from memadvise.optim.method import assume_device
from memadvise.plan.schema import Switches
from memadvise.switches import apply_checkpoint, train_step
from memadvise.target import Target

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
_DEVICE = torch.ops.prim.device.default
_aten = torch.ops.aten
# Backward formulas that fill zeros in place write a second tensor wherever a dispatch mode looks on (the "composite
# compliance" branches of FunctionsManual.cpp): indexing, gather, sort, topk, max ... Here they are put back in place.
_MAKES_ZEROS = {_aten.new_zeros.default, _aten.zeros.default, _aten.zeros_like.default}
_FILLS_ZEROS = {
    _aten.index_put.default: _aten.index_put_.default,
    _aten.index_add.default: _aten.index_add_.default,
    _aten.scatter_add.default: _aten.scatter_add_.default,
    _aten.scatter.src: _aten.scatter_.src,
    _aten.put.default: _aten.put_.default,
    _aten.masked_scatter.default: _aten.masked_scatter_.default,
}
_NUM_STEPS = 2
_AS_IT_IS = Switches()


def trace_step(
    target: Target,
    *,
    device: str = "cuda",
    make_optimizer: MakeOptimizer | None = None,
    switches: Switches = _AS_IT_IS,
    batch: Any = None,
) -> Trace:
    """Trace two training steps of ``target``; the second, with optimizer state and warm caches, is the steady one.

    Args:
        target: the model, its batches and its step; nothing of it is computed and no memory is taken for it.
        device: "cuda" (kernels and allocator granularity of CUDA) or "cpu" (exact bytes).
        make_optimizer: ``model -> optimizer``; default AdamW as a user gets it.
        switches: checkpointing and micro-batches.
        batch: a batch of real tensors to use for both steps; default the target's first two batches.

    Raises:
        TargetError, TargetRaised: the target's code is at fault. UsageError: switches that do not fit the target.
    """
    make_optimizer = make_optimizer or default_optimizer
    with fake_session(target, device, batches=[batch] * _NUM_STEPS if batch is not None else _NUM_STEPS) as session:
        model = session.model
        if switches.checkpoint:
            apply_checkpoint(model, switches.checkpoint)
        recorder = Recorder(session)
        with assume_device(device), garbage_collection_paused(), recorder.recording():
            optimizer = make_optimizer(model)  # in here: hooks of its own on gradients come after the recorder's
            for batch in session.batches:
                with recorder.step(optimizer, batch) as own_batch:
                    train_step(target, model, own_batch, optimizer, micro_batches=switches.micro_batches)
        trace = recorder.trace
        trace.state_bytes = state_bytes(optimizer)
        trace.optimizer = optimizer_name(optimizer, device)
        trace.assumptions += [
            *session.semantics.assumptions(),
            *recorder.scratch.assumptions(),
            f"Optimizer: {trace.optimizer}.",
            f"The steady state: step {_NUM_STEPS} of {_NUM_STEPS} traced.",
        ]
        if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
            trace.assumptions.append("torch.compile is left out: the memory is that of eager execution.")
        if device == "cuda" and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            trace.warnings.append(
                "what cuDNN keeps of recurrent layers for the backward pass is not counted: expect a higher peak."
            )
        trace.warnings += list(session.host_values.guesses)
        return trace


class Recorder(TorchDispatchMode):
    """Writes a :class:`Trace` while :meth:`recording`."""

    def __init__(self, session: FakeSession) -> None:
        super().__init__()
        semantics = session.semantics
        self.trace = Trace(device=semantics.device, granularity=semantics.granularity)
        self._cuda = semantics.device == "cuda"
        self.scratch = KernelScratch(semantics.device)
        self._model = session.model
        self._phases = Phases(session.model, on_phase=self.trace.mark, on_stepped=self._label_state)
        self._owners: dict[torch.Tensor, str] = {}
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._zeros: weakref.ref[torch.Tensor] | None = None  # what the operation before made, if it made zeros
        # What ran in the forward pass, by autograd sequence number: a node of the backward pass finds its origin.
        self._sequence: list[int] = []
        self._origins: list[tuple[str, str | None]] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Take stock of what the model holds, then record everything that runs."""
        self.trace.mark("setup")
        for kind, owner, tensor in model_tensors(self._model):
            self._label(tensor, kind, owner)
            if kind == "weights":
                self._owners.setdefault(tensor, owner)
        hooks = [
            parameter.register_post_accumulate_grad_hook(self._label_gradient)
            for parameter in self._owners
            if parameter.requires_grad
        ]
        try:
            with self._phases.hooked(), self._random_states_seen(), self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _random_states_seen(self) -> Iterator[None]:
        """Checkpointing keeps the generator's state per module: host memory that no dispatched operation makes."""
        if self._cuda:
            yield
            return
        get_rng_state = torch.get_rng_state

        def seen() -> torch.Tensor:
            state = get_rng_state()
            self._see(state, "torch.get_rng_state")
            return state

        torch.get_rng_state = seen
        try:
            yield
        finally:
            torch.get_rng_state = get_rng_state

    @contextlib.contextmanager
    def step(self, optimizer: torch.optim.Optimizer, batch: Any) -> Iterator[Any]:
        """One training step; the last one recorded is the steady one. Yields the batch to use."""
        trace = self.trace
        self._sequence.clear()
        self._origins.clear()
        self._phases.enter("setup")
        trace.start = len(trace.events)
        held = map_tensors(batch, lambda tensor: tensor.detach())  # same memory and values, an end of its own
        inputs = [self._label(tensor, "inputs", "") for tensor in tensors_of(held)]
        self._phases.enter("forward")
        yield held
        for parameter in self._owners:
            if parameter.grad is not None:
                self._label_gradient(parameter)
        self._label_state(optimizer)
        trace.stop = len(trace.events)
        self._phases.enter("setup")
        for number in {number for numbers in inputs for number in numbers}:
            self._died(number)

    # ------------------------------------------------------------ labels

    def _label(self, tensor: torch.Tensor, kind: str, owner: str, *, on_device: bool = True) -> list[int]:
        """Say what a tensor is; its storage is entered if it existed before the recording."""
        numbers = []
        for part in storage_parts(tensor):
            number = self._see(part, None, on_device=on_device)
            if number is not None:
                storage = self.trace.storages[number]
                if storage.kind is None:
                    storage.kind, storage.module = kind, owner
                numbers.append(number)
        return numbers

    def _label_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._label(parameter.grad, "gradients", self._owners.get(parameter, ""))

    def _label_state(self, optimizer: torch.optim.Optimizer) -> None:
        # Step counts are host scalars unless the implementation runs without the host.
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        for parameter, tensor in state_tensors(optimizer):
            owner = self._owners.get(parameter, "") if parameter is not None else ""
            self._label(tensor, "optimizer_state", owner, on_device=on_device)

    # ------------------------------------------------------------ operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device if type(args[0]) is FakeTensor else func(*args)
        if func in _FILLS_ZEROS and self._phases.phase == "backward" and self._zeros and self._zeros() is args[0]:
            func = _FILLS_ZEROS[func]
        taken = [self._take_scratch(func, size) for size in self.scratch(func, args, kwargs)]
        out = func(*args, **kwargs) if kwargs else func(*args)
        out = self.scratch.completed(func, args, out)
        self._zeros = weakref.ref(out) if func in _MAKES_ZEROS else None
        if isinstance(out, torch.Tensor):
            self._see(out, func, args)
        elif isinstance(out, list | tuple):
            for item in out:
                if isinstance(item, torch.Tensor):
                    self._see(item, func, args)
        for number in taken:
            self.trace.died(number)
        if self._phases.phase == "forward":
            number = torch._C._autograd._get_sequence_nr()
            if not self._sequence or number > self._sequence[-1]:
                self._sequence.append(number)
                modules = self._phases.modules
                self._origins.append((modules[-1] if modules else "", user_line()))
        return out

    def _see(self, tensor: torch.Tensor, func: Any, args: Any = (), *, on_device: bool = False) -> int | None:
        """The number of the tensor's storage, entered now if it is new; None for memory that is not counted."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse: its parts were seen when they were made
            return None
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None and known[1]() is not None:
            return known[0]
        size = max(storage.nbytes(), kept_bytes(func, args))
        if size == 0 or (self._cuda and tensor.ndim == 0 and not (on_device or _on_device(args))):
            return None
        module, where = self._origin() if func is not None else ("", None)
        phases = self._phases
        record = Storage(size, str(func) if func is not None else "", module, phases.phase, where)
        record.recomputed = phases.phase == "backward" and phases.recomputing
        number = self.trace.born(record)
        self._alive[key] = (number, weakref.ref(storage, lambda _: self._gone(key, number)))
        return number

    def _gone(self, key: int, number: int) -> None:
        known = self._alive.get(key)
        if known is not None and known[0] == number:
            del self._alive[key]
            self.trace.died(number)

    def _died(self, number: int) -> None:
        """The end of a storage whose memory the tracer itself still holds."""
        for key, (other, _) in self._alive.items():
            if other == number:
                self._gone(key, number)
                return

    def _take_scratch(self, func: Any, size: int) -> int:
        module, where = self._origin()
        return self.trace.born(Storage(size, str(func), module, self._phases.phase, where, kind="workspace"))

    def _origin(self) -> tuple[str, str | None]:
        """Module and user line of the running operation; in the backward pass those of the forward operation."""
        phases = self._phases
        if phases.modules:
            return phases.modules[-1], user_line()
        if phases.phase == "backward" and self._sequence:
            node = torch._C._current_autograd_node()
            if node is not None:
                at = bisect.bisect_right(self._sequence, node._sequence_nr())
                return self._origins[min(at, len(self._origins) - 1)]
        return "", user_line()


def _on_device(args: Iterable[Any]) -> bool:
    """Whether a 0-dim result was computed from tensors of the device; constants and counters live on the host."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.ndim:
                return True
        elif isinstance(arg, list | tuple) and _on_device(arg):
            return True
    return False
