"""What needs a CUDA device; run it with ``pytest -m gpu tests/gpu``. Everything is skipped where there is none."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
for folder in ("tests/optim", "tests/unit/probe", "benchmarks"):
    if str(ROOT / folder) not in sys.path:
        sys.path.append(str(ROOT / folder))


@pytest.fixture(autouse=True)
def _cuda() -> Iterator[None]:
    """Skip without CUDA; give the memory back between tests."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device: run this on a machine with an NVIDIA GPU and a CUDA build of torch")
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def device() -> str:
    return "cuda"
