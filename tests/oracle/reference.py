"""The oracle's own trace: fake tensors on "cuda", storages rounded up to 512 bytes, the most alive in the second step.

    python reference.py CASE:IMPLEMENTATION:CHECKPOINT ...    prints one JSON object, case -> bytes

Nothing of the product's semantics is in here but the models, :func:`memadvise.switches.apply_checkpoint`, and that
the autograd engine adds gradients in place, which any dispatch mode keeps it from
(:mod:`memadvise.memory.accumulation`, held to the profiler by tests/integration/test_any_model.py).
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
import weakref
from typing import Any

import fake_cuda
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from models import CASES, Case, loss_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from memadvise.memory.accumulation import accumulates, held_by_the_engine_alone
from memadvise.switches import apply_checkpoint

aten = torch.ops.aten


class Alive(TorchDispatchMode):
    """Counts the bytes of storages on "cuda" from birth to end."""

    def __init__(self) -> None:
        super().__init__()
        self.level = self.peak = 0
        self.known: dict[int, weakref.ref[Any]] = {}
        self.alone = held_by_the_engine_alone()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True  # the one thing these models ask: that no sequence is padded or packed
        if torch._C._current_autograd_node() is not None:
            into = accumulates(func, args, kwargs, self.alone)
            if into is not None:
                func, args = aten.add_.Tensor, into
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return out

    def see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key in self.known and self.known[key]() is not None:
            return

        def gone(ref: Any) -> None:
            if self.known.get(key) is ref:
                del self.known[key]
                self.level -= size

        self.known[key] = weakref.ref(storage, gone)
        self.level += size
        self.peak = max(self.peak, self.level)


def attention(kernel: str) -> Any:
    """``F.scaled_dot_product_attention`` by the kernel that an A100 would run; masks do not occur in these models."""

    def run(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore[no-untyped-def]
        assert attn_mask is None
        if kernel == "flash":
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        needed = torch.is_grad_enabled()
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, needed, dropout_p, is_causal, scale=scale)[0]

    return run


def peak(case: Case, implementation: str, checkpoint: bool) -> int:
    """Bytes of the second step."""
    F.scaled_dot_product_attention = attention(case.kernel)
    mode, alive = FakeTensorMode(), Alive()
    with mode, torch.device("cuda"):
        model = case.model().train()
        if checkpoint:
            apply_checkpoint(model, [case.blocks])
        with alive:
            for tensor in (*model.parameters(), *model.buffers()):
                alive.see(tensor)
            # Said, where the product leaves it to torch: torch's default is no foreach for parameters that are fake.
            choice = {"foreach": implementation == "foreach", "fused": implementation == "fused"}
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **choice)
            for _ in range(2):
                alive.peak = alive.level
                batch = case.tensors()
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                del batch
    return alive.peak


def main() -> None:
    fake_cuda.enable()
    warnings.simplefilter("ignore")
    gc.disable()
    for name, function in list(vars(nn.init).items()):
        if callable(function) and name.endswith("_") and not name.startswith("_"):
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("transformers.") and "is_tracing" in vars(module):
            module.is_tracing = lambda *args: False  # type: ignore[attr-defined]
    # Random states of CUDA devices, which there are none of.
    torch.utils.checkpoint.get_device_states = lambda *args: ([], [])
    found = {}
    for word in sys.argv[1:]:
        name, implementation, checkpoint = word.split(":")
        found[word] = peak(CASES[name], implementation, checkpoint == "checkpoint")
    print(json.dumps(found), flush=True)
    os._exit(0)  # the engine's threads for "cuda" cannot be joined


main()
