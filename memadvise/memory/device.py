"""What NVML says of the GPUs a training run here would use; nothing here needs torch.

``total_bytes`` is the board's (or the MIG instance's) memory as NVML counts it; the driver keeps some of it, so
``free_bytes`` on an idle GPU is smaller. A CUDA context takes a few hundred MiB more once training starts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from memadvise.errors import EnvironmentProblem

_HINT = "give the budget as a size, for example --budget 12GiB"


def device_free_bytes() -> int:
    """Bytes free now on the GPU that ``cuda:0`` would be, other processes taken into account.

    Raises:
        EnvironmentProblem: no NVIDIA driver, no GPU, or none visible.
    """
    with _nvml() as (nvml, problem):
        facts = _facts(nvml) if nvml is not None else []
    if not facts:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if problem is None and hidden is not None:
            problem = f"CUDA_VISIBLE_DEVICES={hidden!r} leaves none"
        raise EnvironmentProblem(f"no NVIDIA GPU to ask for its free memory ({problem or 'none found'})", hint=_HINT)
    return int(facts[0]["free_bytes"])


def device_facts() -> list[dict[str, Any]]:
    """One record per visible GPU or MIG instance, in CUDA's order; empty when there is none."""
    with _nvml() as (nvml, _):
        return _facts(nvml) if nvml is not None else []


@dataclass(frozen=True)
class DeviceUse:
    """Memory of one device as NVML counts it now; ``own_bytes`` is this process's, None where NVML cannot say."""

    total_bytes: int
    used_bytes: int
    own_bytes: int | None


def device_use(uuid: str | None = None) -> DeviceUse | None:
    """What is in use on the visible device with this UUID, as torch or NVML spells it; None when NVML does not answer.

    Without a UUID it is the device that ``cuda:0`` would be.
    """
    with _nvml() as (nvml, _):
        for handle, _ in _visible(nvml) if nvml is not None else ():
            memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
            known = _text(_ask(nvml, nvml.nvmlDeviceGetUUID, handle)) or ""
            if memory is None or (uuid is not None and not known.endswith(uuid)):  # torch leaves out "GPU-" and "MIG-"
                continue
            running = _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
            own = [process.usedGpuMemory for process in running if process.pid == os.getpid()]
            return DeviceUse(int(memory.total), int(memory.used), int(own[0]) if own and own[0] is not None else None)
    return None


@contextlib.contextmanager
def _nvml() -> Iterator[tuple[Any, str | None]]:
    """The initialised NVML module, or None and why not."""
    try:
        import pynvml
    except ImportError:
        yield None, "the package nvidia-ml-py is not installed"
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield None, str(error)
        return
    try:
        yield pynvml, None
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _facts(nvml: Any) -> list[dict[str, Any]]:
    driver = _ask(nvml, nvml.nvmlSystemGetDriverVersion)
    cuda = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion)
    records: list[dict[str, Any]] = []
    for handle, is_mig in _visible(nvml):
        memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
        if memory is None:
            continue
        records.append(
            {
                "index": len(records),
                "name": _text(_ask(nvml, nvml.nvmlDeviceGetName, handle)),
                "uuid": _text(_ask(nvml, nvml.nvmlDeviceGetUUID, handle)),
                "mig": is_mig,
                "total_bytes": int(memory.total),
                "free_bytes": int(memory.free),
                "used_bytes": int(memory.used),
                "driver": _text(driver),
                "cuda_driver": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda is not None else None,
            }
        )
    return records


def _visible(nvml: Any) -> Iterator[tuple[Any, bool]]:
    """Handles as CUDA would number them: CUDA_VISIBLE_DEVICES is read up to its first invalid entry, as CUDA does.

    Numbers count in PCI order; CUDA does so too with CUDA_DEVICE_ORDER=PCI_BUS_ID or among equal boards.
    """
    count = int(_ask(nvml, nvml.nvmlDeviceGetCount) or 0)
    boards = [handle for i in range(count) if (handle := _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, i)) is not None]
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        for board in boards:
            yield from _instances(nvml, board)
        return
    for entry in (part.strip() for part in listed.split(",")):
        if entry.isdigit() and int(entry) < len(boards):
            yield from _instances(nvml, boards[int(entry)])
        elif entry.startswith(("GPU-", "MIG-")):
            handle = _handle_by_uuid(nvml, boards, entry)
            if handle is None:
                return
            if entry.startswith("MIG-"):
                yield handle, True
            else:
                yield from _instances(nvml, handle)
        else:
            return


def _handle_by_uuid(nvml: Any, boards: list[Any], entry: str) -> Any:
    """The device of a whole UUID or, for boards, of the beginning of one, as CUDA accepts it."""
    handle = _ask(nvml, nvml.nvmlDeviceGetHandleByUUID, entry)
    if handle is None and entry.startswith("GPU-"):
        found = [b for b in boards if (_text(_ask(nvml, nvml.nvmlDeviceGetUUID, b)) or "").startswith(entry)]
        handle = found[0] if len(found) == 1 else None
    return handle


def _instances(nvml: Any, board: Any) -> Iterator[tuple[Any, bool]]:
    """The board itself or, when it is partitioned, its MIG instances: the board's free memory is not a process's."""
    mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, board)
    if not mode or mode[0] != 1:
        yield board, False
        return
    for index in range(int(_ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, board) or 0)):
        instance = _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, board, index)
        if instance is not None:
            yield instance, True


def _ask(nvml: Any, function: Any, *args: Any) -> Any:
    """The answer, or None where this driver, board or instance has none."""
    try:
        return function(*args)
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str | None:
    """Older bindings answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value
