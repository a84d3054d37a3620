"""Two processes, rows sharded unevenly: the same weights as one process (``pytest -m dist``)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import Case, all_settings
from torch import nn

from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import method_info
from memadvise.plan.schema import Setting

SETTINGS = [
    (case, setting)
    for case, setting in all_settings()
    if "heads" not in setting.options and method_info(setting.method).method.sharded
]


def _gradient(shape: torch.Size, number: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def _start() -> dict[str, torch.Tensor]:
    return {"a": _gradient(torch.Size((7, 4)), 50), "b": _gradient(torch.Size((1, 4)), 51)}  # b: an empty second shard


def _worker(rank: int, folder: str) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for number, (case, setting) in enumerate(SETTINGS):
        ps = {name: nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for name, p in _start().items()}
        optimizer = MemadviseOptimizer(ps.items(), setting, lr=case.lr, weight_decay=0.1)
        for step in range(3):
            for p in ps.values():
                p.grad = distribute_tensor(_gradient(p.shape, step), mesh, [Shard(0)])
            optimizer.step()
        full = {name: p.full_tensor() for name, p in ps.items()}
        if rank == 0:
            torch.save(full, f"{folder}/{number}.out")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights after three steps of two processes, for every setting."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(_worker, (str(folder),), nprocs=2)
    return folder


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("case", "setting"), SETTINGS, ids=lambda x: x.key if isinstance(x, Setting) else None)
def test_uneven_shards_step_like_the_whole(case: Case, setting: Setting, sharded: Path) -> None:
    ps = {name: nn.Parameter(p) for name, p in _start().items()}
    optimizer = MemadviseOptimizer(ps.items(), setting, lr=case.lr, weight_decay=0.1)
    for step in range(3):
        for p in ps.values():
            p.grad = _gradient(p.shape, step)
        optimizer.step()
    result = torch.load(sharded / f"{SETTINGS.index((case, setting))}.out", weights_only=True)
    for name, p in ps.items():
        torch.testing.assert_close(result[name], p.detach(), rtol=1e-5, atol=1e-6)
