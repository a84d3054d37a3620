"""Facts of GPUs, told by a module that stands in for NVML."""

from __future__ import annotations

import os
import sys
import types
from dataclasses import dataclass, field

import pytest

from memadvise.errors import EnvironmentProblem
from memadvise.memory.device import DeviceUse, device_facts, device_free_bytes, device_use

GIB = 2**30


@dataclass
class Memory:
    total: int
    free: int

    @property
    def used(self) -> int:
        return self.total - self.free


@dataclass
class Gpu:
    uuid: str
    memory: Memory
    name: str | bytes = "NVIDIA Test"
    instances: list[Gpu | None] = field(default_factory=list)
    processes: dict[int, int | None] = field(default_factory=dict)


class NVMLError(Exception):
    pass


class FakeNvml(types.ModuleType):
    NVMLError = NVMLError

    def __init__(self, gpus: list[Gpu], *, init_error: str | None = None) -> None:
        super().__init__("pynvml")
        self.gpus, self.init_error, self.open = gpus, init_error, 0

    def nvmlInit(self) -> None:
        if self.init_error:
            raise NVMLError(self.init_error)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "575.1"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12090

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        for gpu in self.gpus + [i for g in self.gpus for i in g.instances if i]:
            if gpu.uuid == uuid:
                return gpu
        raise NVMLError("Not Found")

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu) -> Memory:
        return gpu.memory

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: Gpu) -> list[types.SimpleNamespace]:
        if gpu.uuid.startswith("GPU-old"):
            raise NVMLError("Not Supported")
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpu.processes.items()]

    def nvmlDeviceGetName(self, gpu: Gpu) -> str | bytes:
        return gpu.name

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> tuple[int, int]:
        if gpu.uuid.startswith("GPU-old"):
            raise NVMLError("Not Supported")
        mode = 1 if gpu.instances else 0
        return mode, mode

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: Gpu) -> int:
        return len(gpu.instances)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, index: int) -> Gpu:
        instance = gpu.instances[index]
        if instance is None:
            raise NVMLError("Not Found")
        return instance


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    module = FakeNvml(
        [
            Gpu("GPU-old-1", Memory(12 * GIB, 10 * GIB), name=b"NVIDIA Old"),
            Gpu("GPU-b", Memory(80 * GIB, 79 * GIB)),
            Gpu(
                "GPU-c",
                Memory(80 * GIB, 80 * GIB),
                instances=[None, Gpu("MIG-1", Memory(20 * GIB, 19 * GIB)), Gpu("MIG-2", Memory(40 * GIB, 38 * GIB))],
            ),
        ]
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_facts_of_every_visible_device(nvml: FakeNvml) -> None:
    facts = device_facts()
    assert [f["uuid"] for f in facts] == ["GPU-old-1", "GPU-b", "MIG-1", "MIG-2"], "MIG instances stand for their board"
    assert [f["mig"] for f in facts] == [False, False, True, True]
    assert facts[0] == {
        "index": 0,
        "name": "NVIDIA Old",
        "uuid": "GPU-old-1",
        "mig": False,
        "total_bytes": 12 * GIB,
        "free_bytes": 10 * GIB,
        "used_bytes": 2 * GIB,
        "driver": "575.1",
        "cuda_driver": "12.9",
    }
    assert nvml.open == 0, "NVML is shut down again"


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("1", ["GPU-b"]),
        ("1,0", ["GPU-b", "GPU-old-1"]),
        ("2", ["MIG-1", "MIG-2"]),
        ("MIG-2", ["MIG-2"]),
        ("GPU-b", ["GPU-b"]),
        ("GPU-o", ["GPU-old-1"]),
        ("1,-1,0", ["GPU-b"]),
        ("GPU-none,1", []),
        ("9", []),
        ("", []),
    ],
)
def test_cuda_visible_devices(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str, uuids: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [f["uuid"] for f in device_facts()] == uuids
    if uuids:
        expected = {"GPU-b": 79, "MIG-1": 19, "MIG-2": 38, "GPU-old-1": 10}[uuids[0]]
        assert device_free_bytes() == expected * GIB
    else:
        with pytest.raises(EnvironmentProblem, match="CUDA_VISIBLE_DEVICES") as caught:
            device_free_bytes()
        assert caught.value.hint is not None
        assert "--budget 12GiB" in caught.value.hint
    assert nvml.open == 0


@pytest.mark.usefixtures("nvml")
def test_free_bytes_are_those_of_the_first_device() -> None:
    assert device_free_bytes() == 10 * GIB


def test_what_is_in_use_on_one_device(nvml: FakeNvml) -> None:
    assert device_use() == DeviceUse(12 * GIB, 2 * GIB, None)  # cuda:0; its driver does not tell processes
    nvml.gpus[1].processes = {1: GIB // 2, os.getpid(): GIB // 4}
    assert device_use("b") == device_use("GPU-b") == DeviceUse(80 * GIB, 1 * GIB, GIB // 4)
    nvml.gpus[1].processes = {os.getpid(): None}  # as on Windows
    assert device_use("b") == DeviceUse(80 * GIB, 1 * GIB, None)
    assert device_use("2") == DeviceUse(40 * GIB, 2 * GIB, None)  # an instance
    assert device_use("another") is None
    assert nvml.open == 0


def test_no_driver_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([], init_error="NVML Shared Library Not Found"))
    assert device_facts() == []
    with pytest.raises(EnvironmentProblem, match="NVML Shared Library Not Found") as caught:
        device_free_bytes()
    assert caught.value.exit_code == 3
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([]))
    assert device_facts() == []
    assert device_use() is None
    with pytest.raises(EnvironmentProblem, match="none found"):
        device_free_bytes()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    assert device_facts() == []
    with pytest.raises(EnvironmentProblem, match="nvidia-ml-py is not installed"):
        device_free_bytes()
