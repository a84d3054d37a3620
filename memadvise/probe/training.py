"""The short training loop of the probe: seeded, warmed up, watched for NaN and for running out of memory."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from memadvise.errors import MemadviseError, TargetError
from memadvise.target import Target

_MEMORY_TEXTS = ("can't allocate memory", "out of memory", "not enough memory")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that memory ran out (Python, torch on CPU, torch on a device)."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_TEXTS):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def private_rng(seed: int) -> Iterator[None]:
    """Seed torch, ``random`` and NumPy (if it is loaded); give every generator its state back at the end."""
    numpy = sys.modules.get("numpy.random")
    saved = random.getstate(), numpy.get_state() if numpy else None
    with torch.random.fork_rng(devices=devices()):
        try:
            seed_all(seed)
            yield
        finally:
            random.setstate(saved[0])
            if numpy:
                numpy.set_state(saved[1])


def devices() -> list[int]:
    """Indices of the CUDA devices whose generators may have been used."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def seed_all(seed: int) -> None:
    """Seed torch (every device), ``random`` and NumPy if it is loaded."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(seed % 2**32)


class Snapshot:
    """The weights and buffers of a model on the CPU, to start several runs from the same point."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _tensors(model).items()}

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Copy everything back, in place; gradients are dropped."""
        for name, tensor in _tensors(model).items():
            if name in self._tensors:
                tensor.copy_(self._tensors[name])
        drop_gradients(model)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    # Not state_dict(): that leaves out non-persistent buffers, and user code may override it.
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def drop_gradients(model: nn.Module) -> None:
    """Free all gradients and what the garbage collector and the device's cache still hold."""
    for parameter in model.parameters():
        parameter.grad = None
    release_memory()


def release_memory() -> None:
    """Free what the garbage collector and the device's cache still hold."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def collecting_new_garbage() -> Iterator[None]:
    """While inside, the garbage collector passes over what existed before: half a million objects of imported modules.

    Collecting between runs frees the memory of the run before; looking through all of torch each time would take
    longer than a short run.
    """
    if gc.get_freeze_count():  # somebody else's choice
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Stopped(Exception):
    """The user wants to stop: raised between two steps, so that what was measured can be kept."""


@dataclass
class TrainingLog:
    """What happened in a run, readable when it ends early.

    ``problem`` says why it stopped before its last step, ``loss_problem`` why losses are not known; ``updates`` counts
    the optimizer's steps, ``idle_updates`` those with a learning rate of 0.
    """

    num_steps: int = 0
    losses: list[float] = field(default_factory=list)
    problem: str | None = None
    loss_problem: str | None = None
    updates: int = 0
    idle_updates: int = 0


def train(
    target: Target,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Any],
    *,
    lr: float,
    log: TrainingLog,
    start: int = 0,
    warmup: int | None = None,
    loss_at: Collection[int] = (),
    after_step: Callable[[int], None] | None = None,
    relieve: Callable[[], bool] | None = None,
) -> None:
    """One step per batch; stops with ``log.problem`` set at the first loss that is not finite.

    The learning rate rises linearly over the first tenth of the steps, then stays: Adam's very first updates have full
    size whatever the gradient, and statistics shall not depend on that jolt; a decay would only matter in a long run.
    A ``train_step`` of the user's that sets the rate itself has the last word.
    Memory that runs out ends the run and is noted in the log, too, unless something else can be given up for it.

    Args:
        target: its ``step`` is what runs.
        model: trained in place.
        optimizer: its groups' ``lr`` is set before every step, times their ``lr_factor``.
        batches: in order.
        lr: after warm-up.
        log: filled step by step.
        start: the number of the first step, above 0 where a run goes on.
        warmup: steps until ``lr`` is reached; None: a tenth of the batches.
        loss_at: a target whose own ``train_step`` returns no loss is evaluated only before step 0 and these.
        after_step: called with the step's number, from ``start``.
        relieve: called when memory runs out; the step is tried again as long as this returns True.

    Raises:
        TargetError: the user's code or the optimizer raised.
    """
    warmup = max(1, len(batches) // 10) if warmup is None else warmup
    guard = optimizer.register_step_pre_hook(_refuse_fakes)
    counter = optimizer.register_step_pre_hook(lambda optimizer, *_: _count(optimizer, log))
    silent = target.train_step is not None
    try:
        for step, batch in enumerate(batches, start=start):
            for group in optimizer.param_groups:
                rate = lr * group.get("lr_factor", 1.0)
                group["lr"] = rate * min(1.0, (step + 1) / warmup) if warmup else rate
            known = _loss(target, model, batch, log) if silent and (step == start or step in loss_at) else None
            returned = _step(target, model, batch, optimizer, relieve)
            if returned is not None:
                known, silent = float(returned), False
            if known is not None:
                if not math.isfinite(known):
                    log.problem = f"the loss became {known} at step {step}"
                    return
                log.losses.append(known)
            log.num_steps = step + 1
            if after_step is not None:
                after_step(step)
            guard.remove()
    except Exception as error:
        if is_out_of_memory(error):
            log.problem = f"out of memory at step {log.num_steps}"
        elif isinstance(error, RuntimeError):
            raise TargetError(
                f"a training step of {target.spec} with {type(optimizer).__name__} failed: {error}",
                hint="sparse gradients are not supported; otherwise please report this",
            ) from error
        else:
            raise
    finally:
        guard.remove()
        counter.remove()


def _step(
    target: Target, model: nn.Module, batch: Any, optimizer: Optimizer, relieve: Callable[[], bool] | None
) -> Tensor | float | None:
    """One step, again and again while memory runs out and something can be given up for it."""
    while True:
        try:
            return target.step(model, fresh(batch), optimizer)
        except Exception as error:
            if relieve is None or not is_out_of_memory(error):
                raise
            problem = error.with_traceback(None)  # it holds the tensors of the step
        drop_gradients(model)
        if not relieve():
            raise problem


def _count(optimizer: Optimizer, log: TrainingLog) -> None:
    log.updates += 1
    rates = [group["lr"] for group in optimizer.param_groups]
    log.idle_updates += all(not isinstance(rate, Tensor) and rate == 0 for rate in rates)


def _refuse_fakes(optimizer: Optimizer, *_: Any) -> None:
    """The target ran on fake tensors before; one that a global of it kept would turn this run into nothing."""
    if any(isinstance(p.grad, FakeTensor) for group in optimizer.param_groups for p in group["params"]):
        raise TargetError(
            "the target keeps tensors in a global from one run to the next (a GradScaler, say), and those of the "
            "memory trace hold no numbers",
            hint="make such objects in build_model(), or name the target as file.py, which is loaded anew",
        )


def fresh(batch: Any) -> Any:
    """A shallow copy of a dict: user code may pop its labels, and the batch is used again."""
    return copy.copy(batch) if isinstance(batch, Mapping) else batch


def _loss(target: Target, model: nn.Module, batch: Any, log: TrainingLog) -> float | None:
    with torch.random.fork_rng(devices=devices()):
        try:
            return target.loss(model, fresh(batch)).item()
        except MemadviseError as error:
            log.loss_problem = error.message
            return None


class StepTimer:
    """Seconds spent in ``optimizer.step()``, on the device too; the first step (state is allocated) is left out."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._seconds: list[float] = []
        self._start = 0.0
        devices = {p.device.type for group in optimizer.param_groups for p in group["params"]}
        self._synchronize = torch.cuda.synchronize if "cuda" in devices else lambda: None
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        self._synchronize()
        self._start = time.perf_counter()

    def _after(self, *_: Any) -> None:
        self._synchronize()
        self._seconds.append(time.perf_counter() - self._start)

    def median(self) -> float | None:
        """None before the second step."""
        return statistics.median(self._seconds[1:]) if len(self._seconds) > 1 else None


class Moments:
    """``exp_avg`` and ``exp_avg_sq`` of a running ``torch.optim.AdamW``, in float32.

    Read from the optimizer's state without a copy where that is float32 or wider. torch keeps the moments of bfloat16
    and float16 parameters in their own precision, in which a second moment with beta2 = 0.999 cannot decay; for those a
    float32 pair is kept beside it, fed with the gradients each step sees (after clipping).
    """

    def __init__(self, optimizer: torch.optim.AdamW) -> None:
        self._optimizer = optimizer
        self._own: dict[Tensor, tuple[Tensor, Tensor, int]] = {}
        optimizer.register_step_pre_hook(self._update)

    @torch.no_grad()
    def _update(self, *_: Any) -> None:
        for group in self._optimizer.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None or not _narrow(p):
                    continue
                g = p.grad.float()
                m, v, step = self._own.get(p) or (torch.zeros_like(g), torch.zeros_like(g), 0)
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                self._own[p] = (m, v, step + 1)

    def start(self, parameter: Tensor, m: Tensor, v: Tensor, step: int) -> None:
        """Go on from moments of a checkpoint; copied."""
        if _narrow(parameter):
            copies = [t.to(parameter.device, torch.float32, copy=True) for t in (m, v)]
            self._own[parameter] = (copies[0], copies[1], step)

    def of(self, parameter: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """``(exp_avg, exp_avg_sq, step)``; None while the parameter has received no gradient."""
        if _narrow(parameter):
            return self._own.get(parameter)
        state = self._optimizer.state.get(parameter)
        return (state["exp_avg"], state["exp_avg_sq"], int(state["step"])) if state else None


def _narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, nested ones included."""

    def count(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, Mapping):
            return sum(count(item) for item in value.values())
        return sum(count(item) for item in value) if isinstance(value, list | tuple) else 0

    return sum(count(state) for state in optimizer.state.values())
