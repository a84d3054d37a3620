"""Other people's optimizers, with the hyper-parameters of every row; what is not installed is left out.

Each factory imports its package: some change torch's settings or print when they are imported, so it happens when
their turn has come, after our own rows.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from bench_support.rows import NO_REFRESH, WIDTH, Row

Factory = Callable[[nn.Module, Any], Optimizer]
_COMMON = {"lr": 1e-3, "weight_decay": 0.1}


@dataclass(frozen=True)
class Package:
    """One package: what pip and import call it, and a factory ``(model, module) -> optimizer`` for every row."""

    distribution: str
    module: str
    optimizers: dict[str, Factory]

    def installed(self) -> bool:
        """Whether it can be found; it is not imported."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ImportError:  # a parent package that is missing or broken
            return False

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "of unknown version"

    def rows(self) -> Iterator[Row]:
        """Every optimizer of the package."""
        for name, factory in self.optimizers.items():
            yield Row(f"{self.distribution} {name}", _importing(self.module, factory))


def _importing(module: str, factory: Factory) -> Callable[[nn.Module], Optimizer]:
    return lambda model: factory(model, importlib.import_module(module))


def _plain(name: str, **options: Any) -> Factory:
    """A class of the package that takes parameters, a learning rate and weight decay."""
    return lambda model, package: getattr(package, name)(model.parameters(), **{**_COMMON, **options})


def _low_rank(name: str, options: dict[str, Any], **group: Any) -> Factory:
    """A class that projects the matrices of a group with a rank: those of the blocks, as our rows do."""

    def make(model: nn.Module, package: Any) -> Optimizer:
        hidden = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
        chosen = set(map(id, hidden))
        others = [p for p in model.parameters() if id(p) not in chosen]
        groups = [{"params": others}, {"params": hidden, "update_proj_gap": NO_REFRESH, **group}]
        return getattr(package, name)(groups, **{**_COMMON, **options})

    return make


def _bitsandbytes(name: str) -> Factory:
    return lambda model, package: getattr(package.optim, name)(model.parameters(), **_COMMON)


def _official_adam_mini(model: nn.Module, package: Any) -> Optimizer:
    return package.Adam_mini(model.named_parameters(), **_COMMON, dim=WIDTH, n_heads=WIDTH // 64, verbose=False)


def _po_adam_mini(model: nn.Module, package: Any) -> Optimizer:
    return package.AdamMini(model, **_COMMON, num_embeds=WIDTH, num_heads=WIDTH // 64)


_RANK = WIDTH // 4
_PO_APOLLO = {"scale": 1.0, "projection_type": "std"}

PACKAGES = (
    Package("torch-optimi", "optimi", {
        "AdamW foreach": _plain("AdamW", foreach=True, triton=False),
        "AdamW for-loop": _plain("AdamW", foreach=False, triton=False),
    }),
    Package("pytorch-optimizer", "pytorch_optimizer", {
        "AdamMini": _po_adam_mini,
        "APOLLO r=192": _low_rank("APOLLO", {"scale_type": "channel"}, rank=_RANK, **_PO_APOLLO),
        "APOLLO r=1": _low_rank("APOLLO", {"scale_type": "tensor"}, rank=1, **_PO_APOLLO),
        "GaLore r=192": _low_rank("GaLore", {}, rank=_RANK, scale=0.25, projection_type="std"),
        "CAME": _plain("CAME"),
        "AdaFactor": _plain("AdaFactor", betas=(None, 0.999), relative_step=False),
        "SM3": _plain("SM3", weight_decay=0.0),  # it has none
    }),
    Package("adam-mini", "adam_mini", {"Adam_mini": _official_adam_mini}),
    Package("apollo-torch", "apollo_torch", {
        "APOLLO r=192": _low_rank(
            "APOLLOAdamW", {}, rank=_RANK, proj="random", scale_type="channel", scale=1.0, proj_type="std"
        ),
        "APOLLO-Mini": _low_rank(
            "APOLLOAdamW", {}, rank=1, proj="random", scale_type="tensor", scale=128.0, proj_type="std"
        ),
    }),
    Package("galore-torch", "galore_torch", {
        "GaLore r=192": _low_rank("GaLoreAdamW", {"no_deprecation_warning": True}, rank=_RANK, scale=0.25,
                                  proj_type="std"),
    }),
    Package("came-pytorch", "came_pytorch", {"CAME": _plain("CAME")}),
    Package("bitsandbytes", "bitsandbytes", {
        "AdamW 32bit": _bitsandbytes("AdamW"),
        "AdamW8bit": _bitsandbytes("AdamW8bit"),
    }),
    Package("torchao", "torchao.optim", {
        name: _plain(name) for name in ("_AdamW", "AdamWFp8", "AdamW8bit", "AdamW4bit")
    }),
    Package("heavyball", "heavyball", {
        "AdamW": _plain("AdamW"),
        "AdamW caution (C-AdamW)": _plain("AdamW", caution=True),
    }),
)  # fmt: skip
INSTALL = "pip install " + " ".join(package.distribution for package in PACKAGES)


def versions() -> str:
    """Name and version of what is installed."""
    found = [f"{package.distribution} {package.version()}" for package in PACKAGES if package.installed()]
    return ", ".join(found) or f"none installed ({INSTALL})"


def reason(error: BaseException, limit: int = 90) -> str:
    """The first words of an error."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
