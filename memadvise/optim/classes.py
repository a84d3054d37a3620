"""The methods as plain optimizer classes, for use without a plan: ``memadvise.optim.SlimAdam(params, lr=1e-3)``.

Constructor arguments beside the method's options are torch.optim.AdamW's; see the modules in ``methods/`` for formulas,
sources and deviations. On 0-D and 1-D tensors, SlimAdam and AdamMini keep dense AdamW state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from memadvise.errors import OptimizerError
from memadvise.optim.optimizer import MemadviseOptimizer, Params
from memadvise.plan.schema import Setting


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


class AdamW(MemadviseOptimizer):
    """torch.optim.AdamW, bit for bit (fused), with float32 state for every parameter dtype (see methods/adamw.py)."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
    ) -> None:
        executor = _executor(foreach, fused, executor, fusable=True)
        super().__init__(
            params, Setting("adamw"), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, executor=executor
        )


class SlimAdam(MemadviseOptimizer):
    """Adam with the second moment of matrices averaged over ``axes`` (arXiv 2503.01843; see methods/slimadam.py)."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        axes: Sequence[int] = (1,),
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
    ) -> None:
        executor = _executor(foreach, fused, executor, fusable=False)
        setting = Setting("slimadam", {"axes": axes if not isinstance(axes, tuple) else list(axes)})
        super().__init__(params, setting, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, executor=executor)


class AdamMini(MemadviseOptimizer):
    """Adam with one second moment a block (arXiv 2406.16793; see methods/adam_mini.py for partitions)."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        partition: str = "row",
        heads: int | None = None,
        segments: Sequence[Sequence[int]] = (),
        axis: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
    ) -> None:
        executor = _executor(foreach, fused, executor, fusable=False)
        options: dict[str, Any] = {"partition": partition}
        options |= {"heads": heads} if heads is not None else {}
        options |= {"segments": [list(s) for s in segments]} if segments else {}
        options |= {"axis": axis} if axis else {}
        setting = Setting("adam_mini", options)
        super().__init__(params, setting, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, executor=executor)


class Lion(MemadviseOptimizer):
    """The sign of a momentum (arXiv 2302.06675; see methods/lion.py). ``eps`` is accepted and unused."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
    ) -> None:
        executor = _executor(foreach, fused, executor, fusable=False)
        super().__init__(
            params, Setting("lion"), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, executor=executor
        )


class SGD(MemadviseOptimizer):
    """Heavy-ball momentum with decoupled weight decay (see methods/sgd.py). ``betas`` and ``eps`` are unused."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.9,
        foreach: bool | None = None,
        fused: bool | None = None,
        executor: str | None = None,
    ) -> None:
        executor = _executor(foreach, fused, executor, fusable=False)
        setting = Setting("sgd", {"momentum": momentum})
        super().__init__(params, setting, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, executor=executor)
