"""Trace the memory of a training step on fake tensors: every storage, who made it, and when it goes.

The recorder is a dispatch mode. It sees each operation's outputs, follows their storages by weak references, and
so knows every birth and every end, whatever autograd, the optimizer or the user's own code keeps alive.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from memadvise.errors import UsageError
from memadvise.memory.accumulation import ADD_IN_PLACE, accumulates, held_by_the_engine_alone
from memadvise.memory.alike import Courses
from memadvise.memory.architecture import DeviceModel, device_model
from memadvise.memory.callers import user_line
from memadvise.memory.events import Storage, Trace
from memadvise.memory.growth import growth_warnings
from memadvise.memory.phases import Phases
from memadvise.memory.real import real_session, scratch_by_values
from memadvise.memory.scratch import KernelScratch, kept_bytes
from memadvise.memory.session import Session, describe_batch, fake_session, map_tensors, tensors_of
from memadvise.memory.sharding import Sharding, replicate, shard, simulated_world, watched
from memadvise.memory.sharding import assumptions as sharding_assumptions
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
from memadvise.memory.workspace import CublasWorkspaces
from memadvise.optim.method import assume_device
from memadvise.optim.release import ReleasedOptimizer
from memadvise.optim.tracing import repeating
from memadvise.plan.schema import Switches
from memadvise.switches import apply_checkpoint, train_step
from memadvise.target import Target

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Prepare = Callable[[nn.Module], object]
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
_TORCHS_OWN = {"aten", "prim", "prims", "profiler", "inductor", "quantized", "_c10d_functional", "c10d"}
_NUM_STEPS = 2
_AS_IT_IS = Switches()


def trace_step(
    target: Target,
    *,
    device: str | DeviceModel = "cuda",
    make_optimizer: MakeOptimizer | None = None,
    prepare: Prepare | None = None,
    switches: Switches = _AS_IT_IS,
    batch: Any = None,
    sharding: Sharding | None = None,
    tensors: str = "fake",
    gradients_only: bool = False,
) -> Trace:
    """Trace two training steps of ``target``; the second, with optimizer state and warm caches, is the steady one.

    Args:
        target: the model, its batches and its step.
        device: "cuda" (kernels, libraries and allocator granularity of CUDA), "cpu" (exact bytes), or a model of them.
        make_optimizer: ``model -> optimizer``; default AdamW as a user gets it.
        prepare: called with the model before anything is recorded, to hold its weights in other forms.
        switches: checkpointing and micro-batches are done here; ``make_optimizer`` and ``prepare`` do the others.
        batch: a batch of real tensors to use for both steps; default the target's first two batches.
        sharding: trace one rank of a run that is spread over several.
        tensors: "fake": nothing is computed and no memory is taken; "real": the steps are run on the CPU.
        gradients_only: instead of the target's step, give every trainable parameter a gradient and let the optimizer
            step: a lower bound of the step's memory.

    Raises:
        TargetError, TargetRaised: the target's code is at fault. UsageError: switches that do not fit the target.
        NotOnFakes: fake tensors cannot go on. DoesNotFit: real ones take more memory than there is.
    """
    make_optimizer = make_optimizer or default_optimizer
    assumed = device_model(device)
    open_session: Any = {"fake": fake_session, "real": real_session}[tensors]
    with contextlib.ExitStack() as stack:
        if sharding is not None:
            stack.enter_context(simulated_world(sharding))
        batches = [batch] * _NUM_STEPS if batch is not None else _NUM_STEPS
        session: Session = stack.enter_context(open_session(target, assumed, batches=batches))
        model = session.model
        if prepare is not None:
            prepare(model)
        if switches.checkpoint:
            apply_checkpoint(model, switches.checkpoint)
        recorder = Recorder(session)
        if sharding is not None:
            sharded = shard(model, sharding)
            stack.enter_context(watched(recorder, model))
        with (
            assume_device(assumed.device),
            garbage_collection_paused(),
            stepping_optimizers() as stepped,
            recorder.recording(),
        ):
            optimizer = make_optimizer(model)  # in here: hooks of its own on gradients come after the recorder's
            check_release(optimizer, switches)
            if sharding is not None:
                model = replicate(model, sharding, recorder)
            for batch in session.batches:
                with recorder.step(optimizer, batch) as own_batch:
                    if gradients_only:
                        recorder.give_gradients()
                        target.optimizer_step(model, optimizer)
                    else:
                        train_step(target, model, own_batch, optimizer, micro_batches=switches.micro_batches)
        trace = recorder.trace
        trace.state_bytes = state_bytes(optimizer, *stepped)
        trace.optimizer = optimizer_name(optimizer, assumed.device)
        trace.batch = describe_batch(session.batches[-1])
        trace.on_real = tensors == "real"
        if trace.on_real:
            trace.assumptions.append("Real tensors: the steps were run on the CPU and every allocation was followed.")
        trace.assumptions += [
            *target.assumptions,
            *session.semantics.assumptions(),
            *recorder.scratch.assumptions(),
            *recorder.workspaces.assumptions(),
            f"Optimizer: {trace.optimizer}.",
            f"The steady state: step {_NUM_STEPS} of {_NUM_STEPS} traced.",
        ]
        if sharding is not None:
            trace.sharding = str(sharding)
            trace.assumptions += sharding_assumptions(sharding, sharded)
        if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
            trace.assumptions.append("torch.compile is left out: the memory is that of eager execution.")
        if assumed.is_cuda and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            trace.assumptions.append(
                "Recurrent layers run in cuDNN: what it keeps and what it takes while it runs follow rules that were "
                "measured on an H200."
            )
        if session.host_values is not None:
            trace.assumptions += session.host_values.known_reads()
            trace.warnings += session.host_values.guessed_reads()
        trace.warnings += recorder.growth()
        trace.warnings += session.kept_torch.replaced()
        return trace


def check_release(optimizer: torch.optim.Optimizer, switches: Switches) -> None:
    """Raise UsageError if gradients were to be released, and the optimizer does not step in backward."""
    if switches.gradient_release and not isinstance(optimizer, ReleasedOptimizer):
        raise UsageError(
            f"{type(optimizer).__name__} does not step inside backward, which gradient_release asks for",
            hint="make it with create_optimizer(model, plan), or with memadvise.optim.release.attach(model, factory)",
        )


class Recorder(TorchDispatchMode):
    """Writes a :class:`Trace` while :meth:`recording`."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self._real = session.fake_mode is None
        semantics = session.semantics
        assumed = semantics.model
        self.trace = Trace(assumed.device, assumed.granularity, assumed=assumed.to_assumed())
        self._cuda = assumed.is_cuda
        self.scratch = KernelScratch(assumed)
        self.workspaces = CublasWorkspaces(assumed)
        self._phases = Phases(session.model, on_phase=self.trace.mark, on_stepped=self._label_state)
        self.paused = False
        self.communicating = ""
        self._owners: dict[torch.Tensor, str] = {}
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._zeros: weakref.ref[torch.Tensor] | None = None  # what the operation before made, if it made zeros
        # What ran in the forward pass, by autograd sequence number: a node of the backward pass finds its origin.
        self._sequence: list[int] = []
        self._origins: list[tuple[str, str | None]] = []
        self._alone = held_by_the_engine_alone()
        self._node = -1  # the node of the backward pass that runs, by its sequence number, and what it made
        self._made_by_node: set[int] = set()
        self._kept: list[set[int]] = []  # the storages alive after each step
        self._courses = Courses(self.trace, self._place)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Take stock of what the model holds, then record everything that runs."""
        self.trace.mark("setup")
        for kind, owner, tensor in model_tensors(self._session.model):
            self._label(tensor, kind, owner)
            if kind == "weights":
                self._owners.setdefault(tensor, owner)
        # Held by the program, not by the model.
        for storage, dimensions in self._session.built.strangers(lambda storage: storage._cdata in self._alive):
            if storage.nbytes() and (dimensions or not self._cuda):
                self._enter(storage, Storage(storage.nbytes(), "", "", "setup"))
        hooks = [
            parameter.register_post_accumulate_grad_hook(self._label_gradient)
            for parameter in self._owners
            if parameter.requires_grad
        ]
        try:
            with self._phases.hooked(), self._random_states_seen(), repeating(self._repeat), self:
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
        for number in sorted({number for numbers in inputs for number in numbers}):
            self._died(number)
        self._kept.append({number for number, _ in self._alive.values()})

    def _repeat(self, key: Hashable, run: Callable[[], None]) -> None:
        """Follow the step of one parameter of a kind, and let it stand for the others of the same step."""
        if self._real:
            run()
        elif self._courses.repeat((key, len(self._kept)), run):
            self._zeros = None

    def _place(self) -> tuple[str, str | None, str, bool]:
        phases = self._phases
        return *self._origin(), phases.phase, phases.phase == "backward" and phases.recomputing

    def give_gradients(self) -> None:
        """What a backward pass leaves at the least: a gradient for every trainable parameter, hooks called."""
        self._phases.enter("backward")
        for parameter in self._owners:
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
                    hook(parameter)
        self._phases.enter("step")

    def growth(self) -> list[str]:
        """Warnings if the steps leave memory behind."""
        return growth_warnings(self.trace, self._kept, lambda: {number for number, _ in self._alive.values()})

    # ------------------------------------------------------------ labels

    def label(self, tensor: torch.Tensor, kind: str, owner: str) -> None:
        """Say what a tensor that was made while recording is."""
        self._label(tensor, kind, owner)

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
        if self.paused:
            return func(*args, **kwargs) if kwargs else func(*args)
        # Wrappers come again with what they wrap: what a rank holds of a DTensor, or the floats that an int8 weight is
        # turned into for one operation.
        if any(hasattr(t, "__tensor_flatten__") for t in types):
            return NotImplemented
        if func is _DEVICE:
            return args[0].fake_device if type(args[0]) is FakeTensor else func(*args)
        if func in _FILLS_ZEROS and self._phases.phase == "backward" and self._zeros and self._zeros() is args[0]:
            func = _FILLS_ZEROS[func]
        elif self._phases.in_engine and (into := accumulates(func, args, kwargs, self._alone)) is not None:
            if not self._of_this_node(args[0]):
                func, args = ADD_IN_PLACE, into
        for name, size in self.workspaces.kept(func, in_engine=self._phases.in_engine):
            self.trace.born(Storage(size, name, "(cuBLAS)", self._phases.phase, kind="workspace"))
        scratch = [*self.scratch(func, args, kwargs), *self.workspaces.scratch(func)]
        if self._real and not self._cuda:
            scratch += scratch_by_values(func, args, kwargs or {})
        taken = [self._take_scratch(func, size) for size in scratch]
        if self._real and func.namespace not in _TORCHS_OWN:
            out = self._run_custom(func, args, kwargs or {})
        else:
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

    def _run_custom(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A custom operator on real tensors: what it allocates inside is seen as well."""
        with self:
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)

    def _see(self, tensor: torch.Tensor, func: Any, args: Any = (), *, on_device: bool = False) -> int | None:
        """The number of the tensor's storage, entered now if it is new; None for memory that is not counted."""
        wrapper: Any = tensor
        if type(tensor) is not FakeTensor and is_traceable_wrapper_subclass(wrapper):
            return None  # its storage is a number without memory; what it wraps was seen when it was made
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
        record.dtype = dtype_name(tensor.dtype)
        record.communication = self.communicating
        number = self._enter(storage, record)
        if phases.in_engine:
            self._note_node()
            self._made_by_node.add(number)
        return number

    def _note_node(self) -> None:
        """Begin anew with what a node of the backward pass makes when another one runs."""
        node = torch._C._current_autograd_node()
        running = node._sequence_nr() if node is not None else -1
        if running != self._node:
            self._node = running
            self._made_by_node.clear()

    def _of_this_node(self, tensor: torch.Tensor) -> bool:
        """Whether the running node made it: a sum inside its formula is no sum of the engine's."""
        self._note_node()
        known = self._alive.get(tensor.untyped_storage()._cdata)
        return known is not None and known[0] in self._made_by_node

    def _enter(self, storage: torch.UntypedStorage, record: Storage) -> int:
        key, number = storage._cdata, self.trace.born(record)
        self._alive[key] = (number, weakref.ref(storage, lambda _: self._gone(key, number)))
        return number

    def resized(self, storage: torch.UntypedStorage, resize: Callable[[], None]) -> None:
        """A storage whose memory is freed or taken anew while its tensors stay, as FSDP2 does; ``resize`` does it."""
        known = self._alive.get(storage._cdata)
        resize()
        if known is None or known[1]() is None:
            return
        before = self.trace.storages[known[0]]
        self._gone(storage._cdata, known[0])
        # An empty one stays known: what it was is what it will be.
        record = dataclasses.replace(before, num_bytes=storage.nbytes(), phase=self._phases.phase)
        self._enter(storage, record)

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
