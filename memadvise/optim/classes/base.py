"""What all plain optimizer classes share: torch.optim's arguments in our terms, and the documentation of the method."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from torch import Tensor

from memadvise.errors import OptimizerError
from memadvise.optim.compose import HELP, NAMES, Common
from memadvise.optim.optimizer import MemadviseOptimizer, Params
from memadvise.optim.registry import method_info
from memadvise.plan.schema import Setting


def given(options: dict[str, Any], name: str) -> dict[str, Any]:
    """``options`` without those at the method's default: the shortest setting that means the same."""
    defaults = method_info(name).defaults
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    return {k: v for i, (k, v) in enumerate(plain.items()) if options[k] != defaults[k] or (i == 0 and v is not None)}


class PlainOptimizer(MemadviseOptimizer):
    """One method for every parameter, with torch.optim's arguments.

    ``common`` are the options of :class:`memadvise.optim.compose.Compose` (``first_moment``, ``cautious``, ...), beside
    ``foreach`` (refused: it needs temporaries as large as the parameters), ``fused`` and ``executor``.
    """

    method: ClassVar[str]
    preset: ClassVar[Common] = {}  # common options where they are not given

    def __init_subclass__(cls) -> None:
        module = sys.modules[type(method_info(cls.method).method).__module__]
        preset = "".join(f", ``{name}`` {value}" for name, value in cls.preset.items())
        parts = [cls.__doc__ or "", f"Presets{preset}; what follows is the method with full moments." if preset else ""]
        parts += [
            module.__doc__ or "",
            "Options of every method:\n\n" + "\n".join(f"* ``{k}``: {v}" for k, v in HELP.items()),
        ]
        cls.__doc__ = "\n\n".join(part.strip() for part in parts if part) + "\n"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        options: dict[str, Any],
        *,
        foreach: bool | None,
        fused: bool | None,
        executor: str | None,
        common: Common,
    ) -> None:
        unknown = set(common) - set(NAMES)
        if unknown:
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument '{min(unknown)}'")
        common = {**self.preset, **common}
        setting = Setting(self.method, {**given(options, self.method), **common})
        fusable = self.method == "adamw" and not common and not options.get("compat")
        chosen = _executor(foreach, fused, executor, fusable=fusable)
        super().__init__(params, setting, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, executor=chosen)


def _executor(foreach: bool | None, fused: bool | None, executor: str | None, *, fusable: bool) -> str | None:
    """``foreach`` and ``fused`` of torch.optim in our terms; what cannot be had is refused, not ignored."""
    if foreach:
        raise OptimizerError(
            "foreach=True is not supported: it needs temporaries as large as the parameters",
            hint='leave foreach unset, or use executor="chunked"',
        )
    if fused and not fusable:
        raise OptimizerError(
            "fused=True is not supported by this method", hint='leave fused unset, or use executor="chunked"'
        )
    if fused is False and fusable and executor is None:
        return "chunked"
    return "fused" if fused and executor is None else executor
