"""The command line as a user runs it: a process of its own, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
# One thread: kernels then take the same scratch memory in every process, and tests do not fight over cores.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def memadvise(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m memadvise ARGUMENTS`` in ``folder``; no expected failure ends in a traceback."""
    command = [sys.executable, "-m", "memadvise", *map(str, arguments)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**ENVIRONMENT, **environment})
    assert "Traceback" not in run.stderr, run.stderr
    return run


def succeed(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """:func:`memadvise` with exit code 0."""
    run = memadvise(folder, *arguments, **environment)
    assert run.returncode == 0, f"memadvise {' '.join(map(str, arguments))} gave {run.returncode}:\n{run.stderr}"
    return run


def document(stdout: str) -> Any:
    """The one JSON document ``stdout`` consists of."""
    return json.loads(stdout, parse_constant=_refuse)


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")
