"""Weights and AdamW's moments from a checkpoint, so that the probe goes on where training stands.

The file holds two state dicts, of the model and of ``torch.optim.AdamW``, in a dictionary; it is read with
``torch.load(weights_only=True)``, so nothing in it is executed.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memadvise.errors import UsageError
from memadvise.names import canonical_name
from memadvise.probe.training import Moments

_MODEL_KEYS = ("model", "model_state_dict", "state_dict", "module")
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim")
_HINT = 'save it with torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, FILE)'


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: ``weights`` by name, ``moments`` by name as (exp_avg, exp_avg_sq, step), on the CPU.

    ``lr``, ``betas``, ``eps``, ``weight_decay``: of the optimizer's first group.
    """

    path: str
    weights: dict[str, Tensor]
    moments: dict[str, tuple[Tensor, Tensor, int]]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def load_weights(self, model: nn.Module) -> None:
        """Copy the weights into ``model``.

        Raises:
            UsageError: they are another model's.
        """
        names = {canonical_name(name): name for name in model.state_dict()}
        renamed = {names.get(canonical_name(name), name): tensor for name, tensor in self.weights.items()}
        try:
            model.load_state_dict(renamed)
        except RuntimeError as error:
            raise UsageError(
                f"{self.path} is not a checkpoint of this model: {' '.join(str(error).split())[:300]}",
                hint="scan the target that this checkpoint was trained with",
            ) from error

    def load_moments(self, optimizer: torch.optim.AdamW, moments: Moments, named: Mapping[str, Tensor]) -> None:
        """Give every parameter of ``optimizer`` its moments; ``named``: canonical name -> parameter."""
        for name, p in named.items():
            if name in self.moments:
                m, v, step = self.moments[name]
                optimizer.state[p] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": m.to(p.device, p.dtype, copy=True),
                    "exp_avg_sq": v.to(p.device, p.dtype, copy=True),
                }
                moments.start(p, m, v, step)


def load_checkpoint(path: str | Path, trainable: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: the file.
        trainable: canonical name -> shape of the model's trainable parameters, in the model's order.

    Raises:
        UsageError: no such file, not loadable without executing code, no state of AdamW in it, or its parameters
            cannot be told apart.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"cannot read the checkpoint {path}: {error.strerror or error}", hint=_HINT) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} cannot be loaded as tensors alone: {reason}", hint=_HINT) from error
    weights, optimizer = _part(content, _MODEL_KEYS), _part(content, _OPTIMIZER_KEYS)
    if weights is None or optimizer is None or not {"state", "param_groups"} <= optimizer.keys():
        missing = "a model's state dict" if weights is None else "an optimizer's state dict"
        raise UsageError(f"{path} does not hold {missing}", hint=_HINT)
    groups = optimizer["param_groups"]
    first = groups[0] if groups else {}
    if (
        not all(isinstance(first.get(key), int | float) for key in ("lr", "eps", "weight_decay"))
        or "betas" not in first
    ):
        raise UsageError(f"the optimizer in {path} is not AdamW: its groups have no lr, betas, eps, weight_decay")
    moments = {}
    for name, state in _by_name(optimizer, trainable, str(path)).items():
        if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
            raise UsageError(
                f"the optimizer in {path} is not AdamW: of {name} it holds {', '.join(sorted(map(str, state)))}",
                hint="shadows start from moments in full: give a checkpoint of torch.optim.AdamW",
            )
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if tuple(m.shape) != trainable[name] or tuple(v.shape) != trainable[name]:
            raise UsageError(
                f"the moments of {name} in {path} have shape {list(v.shape)}, the parameter {list(trainable[name])}",
                hint="the optimizer's parameters are in another order than the model's: save one made from "
                "model.named_parameters(), whose state names them",
            )
        moments[name] = (m.float(), v.float(), int(state["step"]))
    beta1, beta2 = first["betas"]
    return Checkpoint(
        str(path), dict(weights), moments, float(first["lr"]), (float(beta1), float(beta2)), float(first["eps"]),
        float(first["weight_decay"]),
    )  # fmt: skip


def _part(content: Any, keys: Sequence[str]) -> dict[str, Any] | None:
    if not isinstance(content, Mapping):
        return None
    return next((dict(content[key]) for key in keys if isinstance(content.get(key), Mapping)), None)


def _by_name(
    optimizer: Mapping[str, Any], trainable: Mapping[str, tuple[int, ...]], path: str
) -> dict[str, dict[str, Any]]:
    """State by parameter name: by the names in the groups, else by position where there is one group of all of them."""
    groups, state = optimizer["param_groups"], optimizer["state"]
    if all(group.get("param_names") for group in groups):
        pairs = [(canonical_name(n), i) for g in groups for n, i in zip(g["param_names"], g["params"], strict=True)]
    else:
        numbers = [number for group in groups for number in group["params"]]
        if len(groups) > 1 or len(numbers) != len(trainable):
            raise UsageError(
                f"the optimizer in {path} has {len(groups)} groups of {len(numbers)} parameters without names, the "
                f"model {len(trainable)} trainable ones: which is which?",
                hint="make the optimizer's groups of (name, parameter) pairs, whose names are saved with the state",
            )
        pairs = list(zip(trainable, numbers, strict=True))
    unknown = [name for name, number in pairs if name not in trainable and state.get(number)]
    if unknown:
        raise UsageError(f"{path} has state of {unknown[0]}, which is no trainable parameter of this model")
    return {name: dict(state[number]) for name, number in pairs if state.get(number)}
