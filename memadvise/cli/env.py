"""``memadvise env``: versions and devices, to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from memadvise.cli import common

_PACKAGES = ("typer", "rich", "pyyaml", "nvidia-ml-py", "numpy", "transformers", "accelerate", "lightning")
_VARIABLES = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "OMP_NUM_THREADS",
)


def env(
    output: common.ResultFile = None,
    force: common.Force = False,
    format: common.FormatOption = common.Format.text,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """Print versions and devices, for a bug report."""
    common.configure(format=format, quiet=quiet, verbose=verbose, no_progress=no_progress)
    facts = gather()
    text = common.to_json(facts) if format is common.Format.json else _text(facts)
    common.deliver(text, output, force=force)


def gather() -> dict[str, Any]:
    """Everything a number of memadvise can depend on."""
    import memadvise
    from memadvise.memory.device import device_facts

    return {
        "memadvise": memadvise.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch": _torch(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "devices": device_facts(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    """The torch build; a torch that does not import is what a bug report is about."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"version": _version("torch"), "problem": f"{type(error).__name__}: {error}"}
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "hip_build": torch.version.hip,
        "cuda_available": torch.cuda.is_available(),
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def _text(facts: dict[str, Any]) -> str:
    from memadvise.units import format_bytes

    torch = facts["torch"]
    build = f"CUDA {torch['cuda_build']}" if torch.get("cuda_build") else "CPU build"
    build = f"ROCm {torch['hip_build']}" if torch.get("hip_build") else build
    available = (
        f"{build}, CUDA {'' if torch.get('cuda_available') else 'not '}available, {torch.get('threads')} threads"
    )
    lines = {
        "memadvise": facts["memadvise"],
        "python": facts["python"],
        "platform": f"{facts['platform']}, {facts['cpus']} CPUs",
        "torch": f"{torch['version']} ({torch.get('problem') or available})",
    }
    lines |= {name: version or "not installed" for name, version in facts["packages"].items()}
    lines |= facts["environment"]
    for device in facts["devices"]:
        lines[f"GPU {device['index']}"] = (
            f"{device['name']}{' (MIG instance)' if device['mig'] else ''}: {format_bytes(device['free_bytes'])} "
            f"free of {format_bytes(device['total_bytes'])}, driver {device['driver']} (CUDA {device['cuda_driver']})"
        )
    if not facts["devices"]:
        lines["GPU"] = "none that NVML can see"
    width = max(len(name) for name in lines) + 2
    return "".join(f"{name + ':':<{width}}{value}\n" for name, value in lines.items())
