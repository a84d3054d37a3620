"""One rank of FSDP2 and of DDP: exact shares of weights, gradients and state, and what is gathered for a block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_line import document, memadvise, succeed

from memadvise.errors import EnvironmentProblem, UsageError
from memadvise.ledger import MemoryLedger
from memadvise.memory.estimate import estimate
from memadvise.memory.sharding import Sharding
from memadvise.plan.schema import Switches
from memadvise.target import load_target

WIDTH, BLOCKS, VOCABULARY, WORLD = 64, 4, 128, 8
TARGET = f"""
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm({WIDTH})
        self.up = nn.Linear({WIDTH}, {4 * WIDTH})
        self.down = nn.Linear({4 * WIDTH}, {WIDTH})

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding({VOCABULARY}, {WIDTH})
        self.blocks = nn.ModuleList(Block() for _ in range({BLOCKS}))
        self.head = nn.Linear({WIDTH}, {VOCABULARY}, bias=False)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build_model():
    return Model()


def build_batches():
    while True:
        yield torch.randint(0, {VOCABULARY}, (2, 16))


def compute_loss(model, batch):
    return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())
"""
BLOCK = 4 * (2 * WIDTH + 2 * 4 * WIDTH * WIDTH + 5 * WIDTH)  # bytes of a block's weights
WEIGHTS = BLOCKS * BLOCK + 4 * 2 * VOCABULARY * WIDTH


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sharded") / "model.py"
    file.write_text(TARGET)
    return file


@pytest.fixture(scope="module")
def shard(path: Path) -> MemoryLedger:
    return traced(path, Sharding("fsdp2", WORLD))


def traced(path: Path, sharding: Sharding | None, **arguments: object) -> MemoryLedger:
    return estimate(load_target(str(path)), device="cpu", sharding=sharding, **arguments)  # type: ignore[arg-type]


def test_every_rank_keeps_its_share(shard: MemoryLedger) -> None:
    step = shard.phase("step").by_category
    assert step["weights"] == step["gradients"] == WEIGHTS // WORLD  # every first axis divides by 8
    tensors = 2 + 6 * BLOCKS
    assert step["optimizer_state"] == 2 * WEIGHTS // WORLD + 4 * tensors  # and a step count each
    assert "unsharded_weights" not in step
    assert "unsharded_gradients" not in step


def test_what_is_gathered_is_the_running_block_and_the_one_prefetched(shard: MemoryLedger) -> None:
    outside = WEIGHTS - BLOCKS * BLOCK  # embedding and head belong to the root, which stays gathered
    backward = shard.phase("backward").by_category
    assert backward["unsharded_weights"] == outside + BLOCK
    assert backward["prefetched_weights"] == BLOCK
    assert backward["gradient_buckets"] == BLOCK  # what the reduce-scatter reads; its output is the shard's gradient
    assert backward["unsharded_gradients"] >= BLOCK
    modules = {m for m, kinds in shard.by_module.items() if "unsharded_weights" in kinds}
    assert modules <= {"embed", "head", *(f"blocks.{i}.{m}" for i in range(BLOCKS) for m in ("norm", "up", "down"))}


def test_fewer_ranks_hold_more(path: Path) -> None:
    assert traced(path, Sharding("fsdp2", 2)).by_category["weights"] == WEIGHTS // 2


def test_replicas_hold_their_gradients_twice(path: Path) -> None:
    alone, replica = traced(path, None), traced(path, Sharding("ddp", WORLD))
    assert replica.sharding == f"ddp x {WORLD}"
    before, after = alone.phase("step").by_category, replica.phase("step").by_category
    assert after.pop("gradient_buckets") == WEIGHTS  # the buckets
    assert after == before


def test_checkpointing_within_a_shard(path: Path, shard: MemoryLedger) -> None:
    recomputed = traced(path, Sharding("fsdp2", WORLD), switches=Switches(checkpoint=("blocks.*",)))
    activations = [ledger.phase("forward").by_category["activations"] for ledger in (shard, recomputed)]
    assert activations[1] < activations[0] / 2


def test_torch_is_as_before(path: Path) -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    before = torch.UntypedStorage.resize_, dict(vars(FSDPParamGroup))
    traced(path, Sharding("fsdp2", 2))
    assert (torch.UntypedStorage.resize_, dict(vars(FSDPParamGroup))) == before
    assert not dist.is_initialized()


def test_what_cannot_be() -> None:
    with pytest.raises(UsageError, match="unknown sharding 'zero3'"):
        Sharding("zero3", 8)
    with pytest.raises(UsageError, match="shards nothing"):
        Sharding("ddp", 1)


def test_a_process_group_of_the_targets_own(path: Path) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(EnvironmentProblem, match="exists already"):
            traced(path, Sharding("ddp", 2))
    finally:
        dist.destroy_process_group()


def test_on_the_command_line(path: Path, tmp_path: Path) -> None:
    sharded = ("--shard", "fsdp2", "--world-size", "8")
    scan = document(succeed(tmp_path, "scan", path, "-o", "s.json", *sharded, "--format", "json").stdout)
    assert [ledger["checkpoint"] for ledger in scan["memory"]] == [[], ["blocks.*"]]
    assert {ledger["sharding"] for ledger in scan["memory"]} == {"fsdp2 x 8"}
    refused = memadvise(tmp_path, "recommend", "--scan", "s.json", "--budget", "1GB")
    assert refused.returncode == 2
    assert "one rank of fsdp2 x 8" in refused.stderr
    alone = memadvise(tmp_path, "scan", path, "-o", "s.json", "--shard", "fsdp2")
    assert alone.returncode == 2
    assert "--world-size" in alone.stderr
