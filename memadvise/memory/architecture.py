"""What is assumed of a CUDA device and of the libraries on it: facts by architecture and torch version, in one place.

Every fact is printed with the number it makes and can be overridden (``--arch``, ``--attention``, ``--assume``).
Sources are files of torch (``aten/src/ATen/...``) and the pull requests that changed them. Nothing here needs torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from memadvise.errors import UsageError
from memadvise.units import format_bytes, parse_bytes

MIB = 2**20
CUDA_GRANULARITY = 512  # c10's kMinBlockSize: every allocation is a multiple of it
ATTENTION = ("auto", "flash", "efficient", "cudnn", "math")
_TRUE = ("1", "ON", "TRUE", "Y", "YES")  # what c10::utils::check_env takes for true


@dataclass(frozen=True)
class Architecture:
    """One compute capability.

    Attributes:
        cards: boards of it, for the reader.
        num_sms: multiprocessors of its largest common board; a few kernels size their partial sums by them.
        context_mib: least and most that a process takes beside the allocator (context, kernels as they are loaded,
            libraries), as users report it for torch since lazy loading (CUDA 11.7); not measured here.
    """

    name: str
    cards: str
    num_sms: int
    context_mib: tuple[int, int]

    @property
    def capability(self) -> tuple[int, int]:
        """(major, minor)."""
        digits = self.name.removeprefix("sm_")
        return int(digits[:-1]), int(digits[-1])

    @property
    def threads_per_sm(self) -> int:
        """The most that a multiprocessor holds (CUDA programming guide, technical specifications)."""
        major, minor = self.capability
        if (major, minor) == (7, 5):
            return 1024
        return 2048 if (minor == 0 and major < 12) or major == 10 else 1536


DEFAULT_ARCH = "sm_90"
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm_70", "V100", 80, (250, 600)),
        Architecture("sm_75", "T4, RTX 20", 40, (150, 500)),
        Architecture("sm_80", "A100", 108, (300, 700)),
        Architecture("sm_86", "A10, A40, RTX 30", 84, (250, 600)),
        Architecture("sm_89", "L4, L40S, RTX 40", 142, (300, 700)),
        Architecture("sm_90", "H100, H200", 132, (400, 900)),
        Architecture("sm_100", "B200", 148, (400, 1000)),
        Architecture("sm_103", "B300", 160, (400, 1000)),
        Architecture("sm_120", "RTX 50, RTX PRO 6000", 188, (300, 900)),
    )
}


@dataclass(frozen=True)
class DeviceModel:
    """The device whose memory is estimated, with everything assumed of it; whatever traces a step takes one.

    None means what :func:`device_model` finds: the running torch, torch's own default sizes.

    Attributes:
        device: "cuda", or "cpu" for the CPU's own kernels and exact bytes (nothing else counts then).
        arch: a name of :data:`ARCHITECTURES`.
        torch: version of torch that will train, such as "2.13".
        attention: the kernel to take wherever it can run; "auto" as torch chooses.
        cublas_workspace: bytes for each thread that multiplies matrices.
        cudnn_workspace: bytes while a convolution runs.
        context: bytes beside the allocator; None for the architecture's range.
    """

    device: str = "cuda"
    arch: str = DEFAULT_ARCH
    torch: str | None = None
    attention: str = "auto"
    cublas_workspace: int | None = None
    cudnn_workspace: int | None = None
    context: int | None = None

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def granularity(self) -> int:
        """Bytes that the allocator rounds up to; 1 is none."""
        return CUDA_GRANULARITY if self.is_cuda else 1

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.arch]

    @property
    def torch_version(self) -> tuple[int, int]:
        """(major, minor) of :attr:`torch`."""
        assert self.torch is not None, "made by device_model()"
        major, minor = re.findall(r"\d+", self.torch)[:2]
        return int(major), int(minor)

    @property
    def prefers_cudnn_attention(self) -> bool:
        """Whether torch tries cuDNN's attention first (``check_prefer_cudnn_attention``, sdp_utils.cpp).

        It asks for cuDNN above 9.15, which torch's own packages bring from 2.11 on.
        """
        deprioritized = os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED", "").upper() in _TRUE
        return self.architecture.capability[0] in (9, 10) and self.torch_version >= (2, 11) and not deprioritized

    @property
    def efficient_attention_groups(self) -> bool:
        """Whether memory-efficient attention takes grouped queries (pytorch/pytorch#191085)."""
        return self.torch_version >= (2, 14)

    @property
    def keeps_cublas_workspaces(self) -> bool:
        """Whether a thread keeps its workspace for good, and not for the length of a call (pytorch/pytorch#194311)."""
        return self.torch_version < (2, 15) or os.environ.get("TORCH_CUBLAS_WORKSPACE_CACHE", "").upper() in _TRUE

    @property
    def cublaslt_workspace(self) -> int:
        """Bytes that products with a bias take beside cuBLAS's workspace: none since both share one.

        That is pytorch/pytorch#168175 and, for what it left, #175879: torch 2.11 was measured to take it still.
        """
        if self.torch_version >= (2, 12) and self.keeps_cublas_workspaces:
            return 0
        return 1024 * int(os.environ.get("CUBLASLT_WORKSPACE_SIZE", "1024"))

    @property
    def context_bytes(self) -> tuple[int, int]:
        """Least and most bytes that the process holds beside the allocator; equal when they were given."""
        if self.context is not None:
            return self.context, self.context
        low, high = self.architecture.context_mib
        return low * MIB, high * MIB

    def to_assumed(self) -> dict[str, str]:
        """Everything assumed as ``NAME -> VALUE``, for the ledger; :func:`from_assumed` reads it."""
        if not self.is_cuda:
            return {}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "device"}
        return {name: str(value) for name, value in values.items() if value is not None}

    def sentences(self) -> list[str]:
        """What the device is taken to be, one sentence each."""
        if not self.is_cuda:
            return []
        low, high = self.context_bytes
        span = format_bytes(low) if low == high else f"{format_bytes(low)} to {format_bytes(high)}"
        return [
            f"Device: CUDA {self.arch} ({self.architecture.cards}) with torch {self.torch} (--arch, --assume torch=).",
            "Sizes are rounded up to 512 bytes, as the CUDA caching allocator does.",
            f"Outside the allocator, and not in the peak: {span} for the CUDA context and loaded kernels (--assume "
            "context=), and memory that the allocator reserves but does not use.",
        ]


def find_architecture(name: str) -> Architecture:
    """``sm_90``; also written ``sm90`` or ``9.0``.

    Raises:
        UsageError: unknown.
    """
    digits = name.lower().removeprefix("sm").removeprefix("_").replace(".", "")
    try:
        return ARCHITECTURES[f"sm_{digits}"]
    except KeyError:
        known = ", ".join(f"{a.name} ({a.cards})" for a in ARCHITECTURES.values())
        raise UsageError(f"'{name}' is no architecture that is known here", hint=f"one of {known}") from None


def device_model(device: str | DeviceModel, **changes: Any) -> DeviceModel:
    """A complete model: what was left open is the running torch's version and its workspace size.

    Args:
        device: "cuda", "cpu" or a model.
        **changes: attributes of it to replace.

    Raises:
        UsageError: a device, an architecture, an attention kernel or a version that does not exist.
    """
    model = replace(DeviceModel(device) if isinstance(device, str) else device, **changes)
    if model.device not in ("cuda", "cpu"):
        raise UsageError(f"'{model.device}' is not a device that can be estimated", hint="use cuda or cpu")
    if not model.is_cuda:
        return model
    if model.attention not in ATTENTION:
        raise UsageError(f"'{model.attention}' is no attention kernel", hint=f"one of {', '.join(ATTENTION)}")
    model = replace(model, arch=find_architecture(model.arch).name)
    if model.torch is None:
        import torch

        model = replace(model, torch=torch.__version__.partition("+")[0])
    elif not re.match(r"\d+\.\d+", model.torch):
        raise UsageError(f"'{model.torch}' is no version of torch", hint="for example --assume torch=2.13")
    if model.cublas_workspace is None:
        model = replace(model, cublas_workspace=cublas_workspace_bytes(model.architecture, model.torch_version))
    return model


def local_device() -> DeviceModel:
    """The model of ``cuda:0`` here and the torch that runs.

    Raises:
        UsageError: a GPU of an architecture that is not known here.
    """
    import torch

    major, minor = torch.cuda.get_device_capability()
    return device_model("cuda", arch=f"sm_{major}{minor}")


def from_assumed(device: str, assumed: Mapping[str, str]) -> DeviceModel:
    """The model of a ledger.

    Raises:
        UsageError: a name or a value that :func:`parse_assumption` does not know.
    """
    changes = dict(parse_assumption(f"{name}={value}") for name, value in assumed.items())
    return device_model(device, **changes)


def parse_assumption(text: str) -> tuple[str, Any]:
    """``cublas_workspace=32MiB`` -> ("cublas_workspace", 33554432); the names are attributes of a DeviceModel.

    Raises:
        UsageError: another name, or a value that is no size.
    """
    names = [f.name for f in fields(DeviceModel) if f.name != "device"]
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or name not in names:
        raise UsageError(f"'{text}' is no assumption", hint=f"write NAME=VALUE with NAME one of {', '.join(names)}")
    if name in ("arch", "attention", "torch"):
        return name, value
    return name, 0 if re.fullmatch(r"0\s*[A-Za-z]*", value) else parse_bytes(value)


def cublas_workspace_bytes(architecture: Architecture, torch_version: tuple[int, int]) -> int:
    """What ``parseChosenWorkspaceSize`` (CublasHandlePool.cpp) gives each thread's handle.

    32 MiB on sm_90 (pytorch/pytorch#89027) and, from torch 2.12, on Blackwell (#175344), else 8.125 MiB;
    ``CUBLAS_WORKSPACE_CONFIG`` (``:KiB:COUNT:...``) overrides.
    """
    pools = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if pools:
        return sum(1024 * int(size) * int(count) for size, count in pools)
    major = architecture.capability[0]
    large = major == 9 or (major in (10, 12) and torch_version >= (2, 12))
    return 32 * MIB if large else 1024 * (4096 * 2 + 16 * 8)
