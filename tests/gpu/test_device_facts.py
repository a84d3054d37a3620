"""What NVML says of the device that CUDA calls 0."""

from __future__ import annotations

import pytest
import torch

from memadvise.memory.device import device_facts, device_free_bytes

pytestmark = pytest.mark.gpu

# What the driver keeps of a board, and the contexts of processes: bytes that one count has and the other has not.
CONTEXT_BYTES = 2 * 2**30


def test_there_are_as_many_devices_as_cuda_sees() -> None:
    facts = device_facts()
    if any(f["mig"] for f in facts):  # CUDA uses one instance, NVML lists all that are visible
        assert len(facts) >= torch.cuda.device_count()
    else:
        assert len(facts) == torch.cuda.device_count()
    assert [f["index"] for f in facts] == list(range(len(facts)))


def test_the_first_one_is_cuda_0(device: str) -> None:
    fact, properties = device_facts()[0], torch.cuda.get_device_properties(0)
    assert fact["name"].removeprefix("NVIDIA ") in properties.name or fact["mig"]
    assert fact["driver"]
    assert fact["cuda_driver"]
    assert int(fact["cuda_driver"].split(".")[0]) >= int(str(torch.version.cuda).split(".")[0])
    assert fact["total_bytes"] == pytest.approx(properties.total_memory, abs=CONTEXT_BYTES)
    uuid = str(getattr(properties, "uuid", ""))
    if uuid and not fact["mig"]:
        assert fact["uuid"].removeprefix("GPU-") == uuid.removeprefix("GPU-")


def test_free_bytes_agree_within_a_context(device: str) -> None:
    torch.ones(1, device=device)
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(0)
    fact = device_facts()[0]
    assert fact["free_bytes"] + fact["used_bytes"] == pytest.approx(fact["total_bytes"], abs=CONTEXT_BYTES)
    assert fact["total_bytes"] == pytest.approx(total, abs=CONTEXT_BYTES)
    assert fact["free_bytes"] == pytest.approx(free, abs=CONTEXT_BYTES)
    assert device_free_bytes() == pytest.approx(free, abs=CONTEXT_BYTES)


def test_free_bytes_follow_an_allocation(device: str) -> None:
    torch.ones(1, device=device)
    torch.cuda.empty_cache()
    size = 1 << 30
    before = device_free_bytes()
    held = torch.zeros(size, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    taken = before - device_free_bytes()
    del held
    torch.cuda.empty_cache()
    assert taken == pytest.approx(size, abs=64 * 2**20)
    assert device_free_bytes() == pytest.approx(before, abs=64 * 2**20)
