"""Other people's estimates of a training step's memory with AdamW, as their users read them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from memadvise.switches import train_step
from memadvise.target import Target


def accelerate_step(target: Target) -> int:
    """``accelerate estimate-memory``: its largest figure for training; it knows no batch."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    model = target.build_model()
    half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    total, _ = calculate_maximum_sizes(model.float())
    return int(max(estimate_training_usage(total, "bfloat16" if half else "float32").values()))


def torchinfo_total(target: Target) -> int:
    """What torchinfo calls "Estimated Total Size": input, forward/backward pass and parameters."""
    import torchinfo

    class Loss(nn.Module):
        """The target's step as one forward pass, so that every target can be summarised."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *_: Any, **__: Any) -> Tensor:
            with torch.enable_grad():  # summary() switches gradients off, and a target's loss has to have one
                return target.loss(self.inner, batch)

    model, batch = target.build_model(), target.batches(1)[0]
    given: Any = {"input_data": batch} if isinstance(batch, Tensor | dict) else {"input_data": list(batch)}
    found = torchinfo.summary(Loss(model), **given, verbose=0, device="cpu", mode="train")
    return int(found.total_input + found.total_output_bytes + found.total_param_bytes)


def mem_tracker_peak(target: Target) -> int:
    """The peak that torch's own MemTracker reports for two steps on fake tensors."""
    from torch.distributed._tools.mem_tracker import MemTracker

    batches = target.batches(2)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake_mode:
        model = target.model()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-3, foreach=False)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for batch in batches:
                fake = tree_map(lambda x: fake_mode.from_tensor(x) if isinstance(x, Tensor) else x, batch)
                train_step(target, model, fake, optimizer)
                tracker.reset_mod_stats()  # else it refuses a second step
        return int(sum(by_kind["Total"] for by_kind in tracker.get_tracker_snapshot("peak").values()))


PEERS: dict[str, tuple[str, Callable[[Target], int]]] = {
    "MemTracker": ("torch", mem_tracker_peak),
    "torchinfo": ("torchinfo", torchinfo_total),
    "accelerate": ("accelerate", accelerate_step),
}


def peer_estimate(name: str, target: Target) -> int | str:
    """Bytes; or in a word why there is no figure."""
    package, estimate = PEERS[name]
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return estimate(target)
    except Exception as error:  # what fails in somebody else's estimator is a result
        return f"fails: {type(error).__name__}"
