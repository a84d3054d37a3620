"""What one step costs: seconds beside a yardstick, the seconds of the first step, and memory for the time of a step."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.autograd import DeviceType

from bench_support.rows import Row, moved_bytes, torch_adamw
from memadvise.memory.allocator_log import allocator_log
from memadvise.memory.tensors import storage_parts
from memadvise.optim.optimizer import MemadviseOptimizer

LEAST_ROUNDS = 7
PASS_SECONDS = 4.0  # a row that has taken as long is content with LEAST_ROUNDS: some are 50 times slower than others
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Step = Callable[[], object]


@dataclass(frozen=True)
class Pair:
    """Medians: of one optimizer, and of the yardstick in turn with it."""

    seconds: float
    yardstick: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.yardstick


@dataclass(frozen=True)
class Result:
    """What was measured of one row.

    Args:
        cpu: CPU seconds of the process, with one thread; on CUDA the time between two events on the stream.
        wall: wall clock with all threads; None where only one thread was used, and on CUDA.
        first_seconds: of the first step, with its compilation and the making of the state.
        state_bytes: see :func:`held_bytes`.
        kernel_bytes: growth of resident memory within a step by the kernel's high-water mark; None where not known.
        allocator_bytes: the most that torch's allocator held within a step beyond what it held before.
        moved_bytes, yardstick_bytes: see :func:`bench_support.rows.moved_bytes`.
        executors, scratch_bytes: of our optimizers: what stepped, and the largest scratch it says it needs.
        launches, device_seconds: on CUDA: how many kernels a step launches, and what they take together; else 0.
    """

    cpu: Pair
    wall: Pair | None
    first_seconds: float
    state_bytes: int
    kernel_bytes: int | None
    allocator_bytes: int
    moved_bytes: int | None
    yardstick_bytes: int
    executors: str
    scratch_bytes: int | None
    launches: int = 0
    device_seconds: float = 0.0


class Yardstick:
    """torch's fused AdamW on a model with gradients; every row steps an equal copy of it. ``cache``: a folder of
    compiled kernels to use and to fill, where first steps need not be cold.
    """

    def __init__(self, model: nn.Module, device: str, cache: Path | None = None) -> None:
        self.device, self.cache = device, cache
        self.model = with_gradients(model)
        self.count = sum(p.numel() for p in model.parameters())
        self.largest_bytes = max(p.numel() * p.itemsize for p in model.parameters())
        self.optimizer = torch_adamw(self.model, fused=True)
        self.optimizer.step()

    def measure(self, row: Row, *, rounds: int, threads: int, wall_clock: bool = True) -> Result:
        """Step a copy of the model by ``row``, in turn with the yardstick; one thread only without ``wall_clock``.

        Raises:
            RuntimeError: the optimizer's step changes nothing.
        """
        model = copy.deepcopy(self.model)
        pairs = [(p, q.grad.clone()) for p, q in zip(model.parameters(), self.model.parameters(), strict=True)]
        with cold_compiler() if self.cache is None else warm_compiler(self.cache):
            torch.set_num_threads(threads if wall_clock else 1)
            optimizer = row.make(model)

            def step() -> None:
                for p, g in pairs:  # some peers take the gradients away
                    if p.grad is None:
                        p.grad = g
                optimizer.step()

            first = seconds_of(step, self.device, time.perf_counter)
            wall = self._in_turn(step, row.period, rounds, time.perf_counter) if wall_clock else None
            kernel = None if self.device == "cuda" else kernel_bytes(step)
            allocator = allocator_bytes(step, self.device)
            torch.set_num_threads(1)
            cpu = self._in_turn(step, row.period, rounds, time.process_time)
            launches, device = on_the_device(step) if self.device == "cuda" else (0, 0.0)
            watched = min(model.parameters(), key=torch.Tensor.numel)
            watched.data.zero_()  # whatever the dtype: any update shows
            step()
            if not watched.any():
                raise RuntimeError("step() changes nothing")
        ours = optimizer.memory() if isinstance(optimizer, MemadviseOptimizer) else ()
        return Result(
            cpu=cpu,
            wall=wall,
            first_seconds=first,
            state_bytes=held_bytes(optimizer),
            kernel_bytes=kernel,
            allocator_bytes=allocator,
            moved_bytes=moved_bytes(optimizer),
            yardstick_bytes=moved_bytes(self.optimizer) or 0,
            executors="+".join(sorted({m.executor for m in ours})),
            scratch_bytes=max((m.scratch_bytes for m in ours), default=None),
            launches=launches,
            device_seconds=device,
        )

    def _in_turn(self, step: Step, period: int, rounds: int, clock: Callable[[], float]) -> Pair:
        def several(one: Step) -> Step:
            return lambda: [one() for _ in range(period)]

        steps = several(step), several(self.optimizer.step)
        for one in steps:  # another number of threads may mean another compilation, and caches are cold
            one()
        times: tuple[list[float], list[float]] = ([], [])
        start = time.perf_counter()
        while len(times[0]) < rounds:
            if len(times[0]) >= LEAST_ROUNDS and time.perf_counter() - start > PASS_SECONDS:
                break
            for seconds, one in zip(times, steps, strict=True):
                seconds.append(seconds_of(one, self.device, clock) / period)
        return Pair(*map(statistics.median, times))


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The storage behind the state: whole, where a view keeps it, and also what projector objects and tensor wrappers
    hold, which a sum over the state's tensors misses (GaLore's and APOLLO's, torchao's).
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: object) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            for part in storage_parts(value):
                storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__") and "rojector" in type(value).__name__:
            visit(vars(value))

    for state in optimizer.state.values():
        visit(state)
    return sum(storages.values())


def with_gradients(model: nn.Module) -> nn.Module:
    """``model``, with a gradient for every parameter."""
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return model


def seconds_of(step: Step, device: str, clock: Callable[[], float]) -> float:
    """What one call takes by ``clock``, or on CUDA between two events on the stream."""
    if device != "cuda":
        start = clock()
        step()
        return clock() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def on_the_device(step: Step) -> tuple[int, float]:
    """How many kernels and copies one call has the device run, and the seconds of all of them together."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    ran = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA and "#" not in e.name]  # no marks
    return len(ran), sum(e.device_time for e in ran) / 1e6


@contextlib.contextmanager
def warm_compiler(folder: Path) -> Iterator[None]:
    """Kernels come from ``folder``, and go there."""
    os.environ.update({"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")})
    torch.compiler.reset()
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def cold_compiler() -> Iterator[None]:
    """Nothing that was compiled before counts: every first step pays for what it needs, whatever ran before it."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    torch.compiler.reset()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        _forget_kernels()
        os.environ.update(dict.fromkeys(names, folder))
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some peers print what they found
                yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
            _forget_kernels()


def _forget_kernels() -> None:
    with contextlib.suppress(ImportError):  # not every torch has it there; first steps may then find kernels
        from torch._inductor.utils import clear_caches

        clear_caches()


# ---------------------------------------------------------------- memory within a step


def kernel_bytes(step: Step) -> int | None:
    """How far resident memory rose within a step above what it was before; None without Linux's /proc."""
    release_free_memory()  # or a step would live on what malloc kept of earlier ones, unseen
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")  # the high-water mark is set to what is resident now
        before = _resident("VmRSS")
        step()
        return max(0, _resident("VmHWM") - before)
    except (OSError, KeyError):
        step()
        return None


def release_free_memory() -> None:
    """Give back to the system what malloc holds free, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise KeyError(name)
    return 1024 * int(found[1])


def allocator_bytes(step: Step, device: str) -> int:
    """The most that a step holds beyond what is there before it, as torch's allocator counts."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with allocator_log() as log:
        step()
    level = peak = 0
    for size in log.sizes():
        level += size
        peak = max(peak, level)
    return peak


def copy_bandwidth(device: str, num_bytes: int = 2**30) -> float:
    """Bytes a second of a copy within the device's memory: read and written ones count."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    times = [seconds_of(lambda: destination.copy_(source), device, time.perf_counter) for _ in range(9)]
    return 2 * num_bytes / statistics.median(times[2:])


def available_bytes(device: str) -> int | None:
    """Memory that can still be had; None where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
        return 1024 * int(found[1]) if found else None
    return None
