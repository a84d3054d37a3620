"""The base of a check from a commit instead of a file: ``--against git:REF``.

The commit is checked out in a temporary worktree, and a process of its own makes a baseline there with this very
memadvise: two versions of one module cannot live in one process.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import memadvise
from memadvise.baseline import Baseline, load_baseline
from memadvise.errors import EnvironmentProblem, MemadviseError, TargetRaised, UsageError

# Runs the command line and then refuses a base that was made with code of the working tree.
_CHILD = """
import os, sys
from memadvise.cli.app import run
tree, allowed = sys.argv[1:3]
code = run(sys.argv[3:])
for name, module in sorted(sys.modules.items()):
    path = os.path.realpath(getattr(module, "__file__", None) or "")
    if path.startswith(tree + os.sep) and not path.startswith((allowed + os.sep, sys.prefix + os.sep)):
        print(f"MODULE {name} {path}", file=sys.stderr)
        code = 70
        break
sys.exit(code)
"""
_MIXED = 70


def repository_root() -> Path:
    """The top folder of the repository around the working folder.

    Raises:
        UsageError: there is none. EnvironmentProblem: git is missing.
    """
    problem = "--against git:REF needs a git repository"
    return Path(os.path.realpath(_git("rev-parse", "--show-toplevel", problem=problem)))


@dataclass(frozen=True)
class Commit:
    """A commit of the repository around the working folder, ``reference`` as the user named it."""

    reference: str
    sha: str


def find_commit(reference: str) -> Commit:
    """The commit that ``git:REF`` names.

    Raises:
        UsageError: no such form, no repository, no such commit. EnvironmentProblem: git is missing.
    """
    kind, _, ref = reference.partition(":")
    if kind != "git" or not ref:
        raise UsageError(f"--against '{reference}' cannot be read", hint="write git:REF, for example git:origin/main")
    repository_root()
    sha = _git(
        "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}",
        problem=f"there is no commit '{ref}'",
        hint="in a shallow clone fetch it first: git fetch origin REF, or fetch-depth: 0 of actions/checkout",
    )  # fmt: skip
    return Commit(ref, sha)


def base_of_commit(commit: Commit, specs: Sequence[str], options: Sequence[str], *, plan: str | None) -> Baseline:
    """What ``memadvise check SPECS OPTIONS --update-baseline`` writes at a commit; names relative to its top folder.

    Args:
        commit: the base.
        specs: the targets; those whose file is not there at that commit have no entry.
        options: those that change the numbers, such as ``--device cpu``.
        plan: a plan file, taken from the commit like the targets.

    Raises:
        UsageError: it cannot be checked out. TargetRaised: a target of that commit does not run.
        EnvironmentProblem: installed code of the working tree would have been used.
    """
    top, here = repository_root(), Path(os.path.realpath(Path.cwd()))
    with _worktree(commit.sha) as tree:
        folder = tree / here.relative_to(top)
        there = [spec for spec in map(_from_here, specs) if _is_there(spec, folder)]
        plans = ["--plan", _from_here(plan)] if plan is not None else []
        if not there or not all((folder / file).is_file() for file in plans[1:]):
            return Baseline(Path(commit.reference), {})
        file = tree / f".memadvise-base-{os.getpid()}.json"
        _make(
            folder,
            top,
            tree,
            [*there, *plans, *options, "--update-baseline", "--baseline", str(file)],
            commit.reference,
        )
        return load_baseline(file)


def _from_here(spec: str) -> str:
    """A target or plan named by an absolute path, as seen from the working folder."""
    prefix = "hf:" if spec.startswith("hf:") else ""
    location = spec.removeprefix(prefix)
    return f"{prefix}{os.path.relpath(os.path.realpath(location))}" if os.path.isabs(location) else spec


def _is_there(spec: str, folder: Path) -> bool:
    """Whether a target named by a file has that file; modules are left to the import."""
    location = spec.removeprefix("hf:") if spec.startswith("hf:") else spec.partition(":")[0]
    is_file = spec.startswith("hf:") or location.endswith(".py") or os.sep in location
    return not is_file or (folder / location).exists()


def _make(folder: Path, top: Path, tree: Path, arguments: Sequence[str], ref: str) -> None:
    package = os.path.dirname(os.path.abspath(memadvise.__file__))
    parts = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
    reals = [os.path.realpath(part) for part in parts if part]
    inside = [real for real in reals if f"{real}{os.sep}".startswith(f"{top}{os.sep}")]
    # An environment inside the working tree stays what it is.
    moved = [str(tree / os.path.relpath(real, top)) for real in inside if not real.startswith(sys.prefix)]
    paths = [os.path.dirname(package), *moved, *parts[: -len(sys.path)]]
    # -P: the worktree's own folder comes first for its targets only, never before this memadvise.
    command = [sys.executable, "-P", "-c", _CHILD, str(top), package, "check", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(p for p in paths if p))}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    run = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = run.stderr.decode(errors="backslashreplace").strip()
    if run.returncode == _MIXED and "MODULE " in said:
        _, name, path = said.splitlines()[-1].split(" ", 2)
        raise EnvironmentProblem(
            f"the base at {ref} would use {name} of the working tree ({path})",
            hint="it is installed from there: name targets by file, or compare with a committed baseline",
        )
    if run.returncode:
        hint = "compare with a committed baseline instead"
        raise TargetRaised(f"at {ref} the check does not run:\n{said}", hint=hint)


@contextlib.contextmanager
def _worktree(commit: str) -> Iterator[Path]:
    """The files of ``commit`` in a temporary folder, gone afterwards. No hook of the repository runs."""
    with tempfile.TemporaryDirectory(prefix="memadvise-", ignore_cleanup_errors=True) as folder:
        tree = Path(os.path.realpath(folder)) / "tree"
        _git(
            "-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--quiet", "--detach", str(tree), commit,
            problem=f"commit {commit[:12]} cannot be checked out in {folder}",
        )  # fmt: skip
        try:
            yield tree
        finally:
            with contextlib.suppress(MemadviseError):  # the folder goes in any case; git prunes what it knows of it
                _git("worktree", "remove", "--force", str(tree), problem="")


def _git(*arguments: str, problem: str, hint: str | None = None) -> str:
    try:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, errors="backslashreplace")
    except FileNotFoundError as error:
        raise EnvironmentProblem("git is not installed", hint="compare with a committed baseline instead") from error
    if run.returncode:
        raise UsageError(f"{problem}{f': {said}' if (said := run.stderr.strip()) else ''}", hint=hint)
    return run.stdout.strip()
