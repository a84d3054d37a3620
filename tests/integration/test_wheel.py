"""The wheel, installed in a fresh environment and used from another folder, as after `pip install .`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import memadvise

ROOT = Path(__file__).parents[2]

LOOK = """
import importlib.metadata, importlib.resources, json, pathlib, memadvise
profiles = importlib.resources.files("memadvise") / "_profiles"
print(json.dumps({
    "version": memadvise.__version__,
    "metadata": importlib.metadata.version("memadvise"),
    "file": memadvise.__file__,
    "profiles": sorted(p.name for p in profiles.iterdir()),
    "typed": (importlib.resources.files("memadvise") / "py.typed").is_file(),
}))
"""


def clean_environment() -> dict[str, str]:
    dropped = ("PYTHONPATH", "PYTHONHOME", "PIP_", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if not key.startswith(dropped)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("memadvise-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(bin folder, empty working folder) of an environment with nothing but the wheel and a way to its dependencies."""
    home = tmp_path_factory.mktemp("fresh") / "env"
    venv.EnvBuilder(with_pip=False).create(home)
    bin_folder = home / ("Scripts" if os.name == "nt" else "bin")
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    # pip of the running environment, aimed at the fresh one: no network, no dependencies.
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(bin_folder / "python"),
        "install",
        "--no-deps",
        "--no-index",
    ]
    run = subprocess.run([*command, str(wheel)], capture_output=True, text=True, env=clean_environment())
    assert run.returncode == 0, run.stdout + run.stderr
    # After the fresh site-packages on sys.path, so that the wheel wins. The line of an editable install of this very
    # repository is a .pth file over there; .pth files of a folder that a .pth file adds are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = home.parent / "elsewhere"
    elsewhere.mkdir()
    return bin_folder, elsewhere


def test_wheel_holds_the_package_and_the_profiles_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "memadvise/_profiles/README.md" in names
    assert "memadvise/_profiles/models/llama.json" in names
    assert "memadvise/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"memadvise", f"memadvise-{memadvise.__version__}.dist-info"}
    source = {p.relative_to(ROOT).as_posix() for p in (ROOT / "memadvise").rglob("*.py")}
    assert source <= set(names)


def test_the_installed_package_is_used_from_another_folder(installed: tuple[Path, Path]) -> None:
    bin_folder, elsewhere = installed
    command = [str(bin_folder / "python"), "-c", LOOK]
    run = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, env=clean_environment())
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert seen["version"] == seen["metadata"] == memadvise.__version__
    assert Path(seen["file"]).is_relative_to(bin_folder.parent)
    assert not Path(seen["file"]).is_relative_to(ROOT)
    assert seen["profiles"] == sorted(p.name for p in (ROOT / "profiles").iterdir())
    assert seen["typed"]


def test_the_installed_command_answers(installed: tuple[Path, Path]) -> None:
    bin_folder, elsewhere = installed
    command = [str(bin_folder / "memadvise"), "--version"]
    run = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, env=clean_environment())
    assert run.returncode == 0, run.stderr
    assert memadvise.__version__ in run.stdout
