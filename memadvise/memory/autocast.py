"""``torch.autocast("cuda")`` on fake CPU tensors: the context takes effect, with CUDA's lists of operations.

The lists decide which copies of activations exist, and those of the two devices differ
(``aten/src/ATen/autocast_mode.h``). Which operations CUDA treats is asked of the running torch; how it treats them
is written here.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from memadvise.memory.dispatch import kernels_replaced

_FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow", "softplus", "layer_norm", "native_layer_norm", "group_norm", "rms_norm", "frobenius_norm",
    "nuclear_norm", "cosine_similarity", "dist", "pdist", "renorm", "logsumexp", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_trilinear3d",
)  # fmt: skip
# The result is fp32 unless the call says otherwise.
_FP32_RESULT = (
    "prod", "cumprod", "cumsum", "sum", "softmax", "log_softmax", "linalg_vector_norm", "linalg_matrix_norm",
)  # fmt: skip
_LOWER = (
    "mv", "addmv", "addr", "chain_matmul", "linalg_multi_dot",
)  # fmt: skip
_ONLY_ON_CPU = ("cross_entropy_loss",)  # CUDA's lists treat the log_softmax inside instead
_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def _cast(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(_cast(v, change) for v in value) if isinstance(value, list | tuple) else value


def _below_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _to_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _to_lower(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.get_autocast_dtype("cpu")) if tensor.dtype is torch.float32 else tensor


def _with(change: Callable[[torch.Tensor], torch.Tensor], op: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            return op(*_cast(args, change), **{key: _cast(value, change) for key, value in kwargs.items()})

    return run


def _with_fp32_result(op: Any) -> Callable[..., Any]:
    position = [argument.name for argument in op._schema.arguments].index("dtype") - 1

    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            given = args[position] if position < len(args) else kwargs.get("dtype")
            if given is None and x.dtype in _HALF:
                args, kwargs = args[:position], {**kwargs, "dtype": torch.float32}
            return op(x, *args, **kwargs)

    return run


def _listed(names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The operators, with their overloads, that the running torch treats on CUDA and leaves alone on the CPU."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in names:
        packet = getattr(_aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            full = name if overload == "default" else f"{name}.{overload}"
            try:  # overloads of TorchScript are listed too, and are no operators of the dispatcher
                wanted = has_kernel(f"aten::{full}", "AutocastCUDA") and not has_kernel(f"aten::{full}", "AutocastCPU")
            except RuntimeError:
                continue
            if wanted:
                yield full, getattr(packet, overload)


def _register(replace: Callable[..., None]) -> None:
    for full, op in _listed(_FP32):
        replace(full, _with(_to_fp32, op))
    for full, op in _listed(_FP32_RESULT):
        replace(full, _with_fp32_result(op))
    for full, op in _listed(_LOWER):
        replace(full, _with(_to_lower, op))
    with warnings.catch_warnings():  # replacing a kernel for a while is what is meant here
        warnings.simplefilter("ignore")
        for name in _ONLY_ON_CPU:
            replace(name, torch.library.fallthrough_kernel)


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """``autocast`` runs as on CUDA, with CUDA's default dtype, although the tensors are the CPU's."""
    autocast = torch.amp.autocast_mode.autocast
    original = autocast.__init__
    registered = False

    def init(
        self: Any,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        nonlocal registered
        if enabled and device_type in ("cuda", "cpu") and not registered:
            registered = True
            _register(replace)
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype if dtype is not None else torch.get_autocast_dtype("cuda")
        original(self, device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)

    with kernels_replaced("AutocastCPU") as replace:
        try:
            autocast.__init__ = init  # type: ignore[method-assign]
            yield
        finally:
            autocast.__init__ = original  # type: ignore[method-assign]
