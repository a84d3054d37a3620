"""The switch ``weights``: one form for every parameter that can be held in it and whose rule names none.

``int8`` takes the matrices. The other forms are of bfloat16 (or float16) weights: a float32 model is cast first, as
``model.bfloat16()`` does, and so are the float32 tensors that its forward pass is called with. Parameters that stand
against a form (vectors and int8, a method that views a tensor in its own way) keep what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from memadvise.errors import OptimizerError
from memadvise.optim.int8_tensor import Int8Weight
from memadvise.optim.int8_weights import holdable
from memadvise.optim.registry import fitted, problems_of
from memadvise.optim.weights import FORMS, Int8, Nearest
from memadvise.plan.schema import Setting

_CAST = "bf16"
_MARK = "_memadvise_inputs_cast"


def with_weights(
    settings: Setting | Mapping[str, Setting], trainable: Mapping[str, Tensor], form: str
) -> dict[str, Setting]:
    """Name -> setting, with ``weights`` set to ``form`` where it may be.

    Raises:
        OptimizerError: no parameter can be held so.
    """
    found: dict[str, Setting] = {}
    held = 0
    for name, p in trainable.items():
        shape = tuple(p.shape)
        setting = fitted(settings, shape) if isinstance(settings, Setting) else settings[name]
        if form != _CAST and "weights" not in setting.options:
            wanted = Setting(setting.method, {**setting.options, "weights": form})
            if _fits(p, form) and not problems_of(wanted, shape, name=name):
                setting = wanted
        found[name] = setting
        held += setting.options.get("weights") == form or (form == _CAST and p.dtype in (torch.float32, torch.bfloat16))
    if not held:
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trainable.values()}))
        raise OptimizerError(
            f"switches.weights: {form} holds no parameter of this model (of {dtypes})",
            hint="leave the switch out, or name a form that fits: int8 holds matrices of floats, the others bfloat16",
        )
    return found


def _fits(p: Tensor, form: str) -> bool:
    if nn.parameter.is_lazy(p):
        return False
    if form == Int8.name:
        return isinstance(p, Int8Weight) or holdable(p)
    return not isinstance(p, Int8Weight) and FORMS[form].problem(as_cast(p, form)) is None


def as_cast(p: Tensor, form: str | None) -> Tensor:
    """``p``, or something of the dtype that it will have when :func:`cast` is done, where that is another."""
    if form in (None, Int8.name) or p.dtype != torch.float32 or isinstance(p, Int8Weight):
        return p
    return torch.empty(p.shape, dtype=torch.bfloat16, device="meta")


def cast(model: nn.Module, settings: Mapping[str, Setting], form: str) -> None:
    """Cast the float32 parameters and buffers of ``model`` to bfloat16, if ``form`` is one of bfloat16; idempotent.

    A parameter whose own rule says ``weights: nearest`` or ``int8`` is left alone. The parameters stay the same
    objects, so that groups and ties hold; gradients they have are dropped.
    """
    if form == Int8.name:
        return
    changed = False
    names = {p: name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    for p, name in names.items():
        own = settings[name].options.get("weights") if name in settings else None
        if p.dtype == torch.float32 and not isinstance(p, Int8Weight) and own not in (Nearest.name, Int8.name):
            p.grad = None
            p.data = p.data.to(torch.bfloat16)
            changed = True
    if not changed:
        return
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype == torch.float32:
                module._buffers[name] = buffer.to(torch.bfloat16)
    if not hasattr(model, _MARK):
        model.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        setattr(model, _MARK, True)


def _cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    def narrow(value: Any) -> Any:
        is_wide = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(torch.bfloat16) if is_wide else value

    return tree_map(narrow, args), tree_map(narrow, kwargs)
