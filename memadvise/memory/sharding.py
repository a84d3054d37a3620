"""One rank of a sharded training run, traced in a process of its own: torch's FSDP2 or DDP on its fake process group.

Nothing of a sharding scheme is imitated here. ``fully_shard`` and ``DistributedDataParallel`` run as ever, with
collectives that do nothing; what this module adds is what their memory is *for*:

- weights, gradients: the shard that the rank keeps (with DDP, all of it);
- unsharded_weights: parameters gathered for the running block, freed below the dispatcher;
- unsharded_gradients: what autograd made of them, until it is reduced;
- prefetched_weights: gathered in one buffer, for a block that does not run yet, and not copied out of it;
- gradient_buckets: what a reduce-scatter reads and writes, and the buckets of DDP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from memadvise.errors import EnvironmentProblem, UsageError
from memadvise.names import canonical_name, matches
from memadvise.switches import checkpoint_patterns

KINDS = ("fsdp2", "ddp")


@dataclass(frozen=True)
class Sharding:
    """How a run is spread: ``"fsdp2"`` or ``"ddp"`` over ``world_size`` ranks, of which rank 0 is traced."""

    kind: str
    world_size: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown sharding '{self.kind}'", hint=f"one of {', '.join(KINDS)}")
        if self.world_size < 2:
            raise UsageError(
                f"a world of {self.world_size} shards nothing", hint="give --world-size 2 or more, or leave --shard out"
            )

    def __str__(self) -> str:
        return f"{self.kind} x {self.world_size}"


class Watched(Protocol):
    """What the recorder of a trace offers to this module.

    Attributes:
        paused: while set, nothing is recorded.
        communicating: what is born while it is set is a buffer of a collective, of this category.
    """

    paused: bool
    communicating: str

    def label(self, tensor: torch.Tensor, kind: str, owner: str) -> object: ...

    def resized(self, storage: torch.UntypedStorage, resize: Callable[[], None]) -> None: ...


@contextlib.contextmanager
def simulated_world(sharding: Sharding) -> Iterator[None]:
    """A default process group of ``world_size`` ranks whose collectives do nothing.

    Raises:
        EnvironmentProblem: torch was built without distributed, or a process group exists already.
    """
    if not dist.is_available():
        raise EnvironmentProblem("this torch was built without torch.distributed", hint="trace without --shard")
    if dist.is_initialized():
        raise EnvironmentProblem(
            "a process group exists already in this process, perhaps made by the target when it was imported",
            hint="let the target make its process group only when it is run as a script",
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=sharding.world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks that are sharded one by one, as a training script would: those worth checkpointing."""
    patterns = checkpoint_patterns(model)
    named = ((canonical_name(name), module) for name, module in model.named_modules())
    return {name: module for name, module in named if name and any(matches(pattern, name) for pattern in patterns)}


def shard(model: nn.Module, sharding: Sharding) -> list[str]:
    """Apply ``fully_shard`` to every repeated block and to the whole model; returns what was sharded, for the report.

    With DDP nothing is done yet (:func:`replicate` does it, as it allocates).
    """
    if sharding.kind != "fsdp2":
        return []
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (sharding.world_size,))
    blocks = blocks_of(model)
    for block in blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return list(blocks)


def replicate(model: nn.Module, sharding: Sharding, recorder: Watched) -> nn.Module:
    """The model in ``DistributedDataParallel``, whose gradient buckets are recorded; the model itself with FSDP2."""
    if sharding.kind != "ddp":
        return model
    with _communicating(recorder, "gradient_buckets"):
        wrapped = nn.parallel.DistributedDataParallel(model, init_sync=False)  # to compare ranks takes real ones
    wrapped.reducer = _Reducer(wrapped.reducer)  # type: ignore[assignment]
    wrapped.register_comm_hook(None, lambda _, bucket: _reduced(bucket))  # of a function it checks the annotations
    return wrapped


class _Reducer:
    """DDP's own, but for one thing: in the second step it would lay its buckets out anew, as many bytes in another
    order, and compares that order with the other ranks', which takes real tensors.
    """

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _reduced(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """What DDP does without a hook, in place: the fake group's work has no result, which DDP would ask for."""
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@contextlib.contextmanager
def _communicating(recorder: Watched, category: str) -> Iterator[None]:
    outer, recorder.communicating = recorder.communicating, category
    try:
        yield
    finally:
        recorder.communicating = outer


@contextlib.contextmanager
def watched(recorder: Watched, model: nn.Module) -> Iterator[None]:
    """Tell ``recorder`` what FSDP2 does below the dispatcher, and what it does it for; undone afterwards."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    names = {id(module): canonical_name(name) for name, module in model.named_modules()}
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, made: Callable[[Any], Any]) -> None:
            original = getattr(owner, name)
            setattr(owner, name, made(original))
            stack.callback(setattr, owner, name, original)

        def owner_of(param: Any) -> str:
            return names.get(id(param._module_info.module), "")

        def paused(original: Any) -> Any:
            # What a DTensor's operation gives is tried on whole fake tensors first, which are never allocated.
            def call(*args: Any, **kwargs: Any) -> Any:
                outer, recorder.paused = recorder.paused, True
                try:
                    return original(*args, **kwargs)
                finally:
                    recorder.paused = outer

            return call

        def resizing(original: Any) -> Any:
            def call(storage: torch.UntypedStorage, size: int) -> Any:
                recorder.resized(storage, lambda: original(storage, size))
                return storage

            return call

        def communicating(category: str) -> Callable[[Any], Any]:
            def made(original: Any) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    with _communicating(recorder, category):
                        return original(*args, **kwargs)

                return call

            return made

        def gathered(original: Any) -> Any:
            def call(group: Any, *args: Any, **kwargs: Any) -> Any:
                with _communicating(recorder, "prefetched_weights"):
                    out = original(group, *args, **kwargs)
                for param in group.fsdp_params:
                    for tensor in param.all_gather_outputs:
                        recorder.label(tensor, "unsharded_weights", owner_of(param))
                return out

            return call

        def reducing(original: Any) -> Any:
            def call(group: Any, *args: Any, **kwargs: Any) -> Any:
                for param in group.fsdp_params:
                    whole = getattr(param, "_unsharded_param", None)
                    for tensor in (whole.grad if whole is not None else None, param.unsharded_accumulated_grad):
                        if tensor is not None:
                            recorder.label(tensor, "unsharded_gradients", owner_of(param))
                out = original(group, *args, **kwargs)
                for param in group.fsdp_params:
                    if param.sharded_param.grad is not None:
                        recorder.label(param.sharded_param.grad, "gradients", owner_of(param))
                return out

            return call

        for name in dir(ShardingPropagator):
            if name.startswith("_propagate_tensor_meta"):
                replace(ShardingPropagator, name, paused)
        replace(torch.UntypedStorage, "resize_", resizing)
        replace(FSDPParamGroup, "unshard", communicating("prefetched_weights"))
        replace(FSDPParamGroup, "wait_for_unshard", gathered)
        replace(FSDPParamGroup, "post_backward", reducing)
        replace(_fsdp_param_group, "foreach_reduce", communicating("gradient_buckets"))
        yield


def assumptions(sharding: Sharding, blocks: list[str]) -> list[str]:
    """What the numbers take for granted, one sentence each."""
    said = [
        f"Rank 0 of {sharding.world_size}, {sharding.kind}; the batch is what one rank sees. Buffers that NCCL keeps "
        "outside torch's allocator are not counted."
    ]
    if sharding.kind == "fsdp2":
        what = f"{len(blocks)} repeated blocks ({', '.join(blocks[:1])} ...)" if blocks else "no block"
        said.append(
            f"fully_shard on {what} and on the whole model, resharded after the forward pass; memory that a collective "
            "on another stream still uses is taken to be free when Python frees it."
        )
    else:
        said.append("DistributedDataParallel with torch's defaults: gradients and their buckets are two copies.")
    return said
