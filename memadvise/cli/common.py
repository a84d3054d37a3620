"""What every command shares: options spelled the same everywhere, results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memadvise.errors import MemadviseError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memadvise.memory.architecture import DeviceModel

Progress = Callable[[str, int, int], None]


class Device(StrEnum):
    """A kind of device whose memory can be predicted."""

    cuda = "cuda"
    cpu = "cpu"


class Format(StrEnum):
    """How a result is printed."""

    text = "text"
    json = "json"


Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")]
ResultFile = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result there instead of printing it.")
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Whose memory to predict; no such device is needed.")]
Arch = Annotated[
    str | None,
    typer.Option("--arch", metavar="sm_XY", help="CUDA architecture: sm_80 A100, sm_90 H100 (default), sm_120 RTX 50."),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="For hf: targets, such as bfloat16.")]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="KERNEL",
        help="auto (as torch chooses), flash, efficient, cudnn or math, where it can run.",
    ),
]
Assume = Annotated[
    list[str] | None,
    typer.Option(
        "--assume",
        metavar="NAME=VALUE",
        help="Replace what is assumed of the device: torch=2.11, cublas_workspace=32MiB, cudnn_workspace=, context=.",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", "-f", help="Replace a file that memadvise did not write, or you edited.")
]
FormatOption = Annotated[Format, typer.Option("--format", help="json prints one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result and errors only.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="More on stderr; -vv adds tracebacks.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress on stderr.")]


@dataclass
class _State:
    """How this run of the command line talks; set by the command, read where exceptions become exit codes.

    ``own_process``: nothing but the command line runs in this process, so it may end it.
    """

    format: Format = Format.text
    quiet: bool = False
    verbosity: int = 0
    progress: bool = True
    own_process: bool = False


class Interrupt:
    """What Ctrl-C means at the moment: the end at once or, while something can be kept, a request to stop soon."""

    def __init__(self) -> None:
        self._polite = self._asked = False

    def asked(self) -> bool:
        """Whether somebody asked to stop."""
        return self._asked

    def ask(self) -> bool:
        """Take a Ctrl-C as a request; False if it must end the process at once (also at the second time)."""
        if not self._polite or self._asked:
            return False
        self._asked = True
        return True

    def polite_while(self, phase: str, report: Progress) -> Progress:
        """``report``, noting on the way whether a phase is running that can be stopped (its name begins so)."""

        def progress(what: str, done: int, total: int) -> None:
            self._polite = what.startswith(phase)
            report(what, done, total)

        return progress


STOPPING = "\nstopping after this step, keeping what was measured; once more to leave at once\n"
INTERRUPTED = "\ninterrupted; no file was left half written\n"
state = _State()


def configure(
    *,
    format: Format = Format.text,
    quiet: bool = False,
    verbose: int = 0,
    no_progress: bool = False,
) -> None:
    """Note the shared options of the running command."""
    state.format, state.quiet, state.verbosity = format, quiet, verbose
    state.progress = not (no_progress or quiet)


def device_model(
    device: Device, arch: str | None, attention: str | None, assume: list[str] | None, *, at_hand: bool = False
) -> DeviceModel:
    """What ``--device``, ``--arch``, ``--attention`` and ``--assume`` ask for; ``at_hand`` takes the GPU that is here.

    Raises:
        UsageError: an unknown name or value, or one that means nothing for this device.
    """
    from memadvise.memory.architecture import device_model as complete
    from memadvise.memory.architecture import local_device, parse_assumption

    changes = dict(parse_assumption(text) for text in assume or ())
    changes |= {name: value for name, value in (("arch", arch), ("attention", attention)) if value is not None}
    if changes and device is not Device.cuda:
        raise UsageError(
            f"{', '.join(sorted(changes))}: nothing is assumed of --device {device}, whose bytes are exact",
            hint="leave it out, or take --device cuda",
        )
    if at_hand and device is Device.cuda and "arch" not in changes:
        import torch

        if torch.cuda.is_available():  # what measures says that there is none, where there is none
            return complete(local_device(), **changes)
    return complete(device.value, **changes)


def note(text: str) -> None:
    """A remark on stderr, unless --quiet."""
    if not state.quiet:
        print(text, file=sys.stderr, flush=True)


def report_error(error: MemadviseError) -> None:
    """What is wrong, where, and the way out, on stderr."""
    lines = [f"error: {error.message}"]
    if error.where is not None:
        lines += [f"  at {error.where}", *(f"    {line}" for line in error.where.excerpt())]
    if error.hint:
        lines.append(f"  hint: {error.hint}")
    print("\n".join(lines), file=sys.stderr)


def print_result(text: str) -> None:
    """The result on stdout. A reader that went away (``| head``) is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain then.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_renderables(renderables: Iterable[RenderableType]) -> None:
    """Rich renderables on stdout, in colour on a terminal."""
    from memadvise.report.draw import make_console

    console = make_console(sys.stdout)
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable, crop=False)
    text = capture.get()
    if not console.is_terminal:
        text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    print_result(text)


def deliver(text: str, output: Path | None, *, force: bool) -> None:
    """A command's result: to ``output`` if there is one, else to stdout."""
    from memadvise.ledger import write_whole

    if output is None:
        print_result(text)
        return
    write_whole(output, text, force=force)
    note(f"Wrote {output}")


def to_json(value: Any) -> str:
    """One JSON document; numbers that are not finite become null."""
    return json.dumps(plain(value), indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Records, tuples and numbers as JSON knows them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool) or value is None else str(value)


def check_writable(path: Path, *, force: bool, ours: Callable[[Path], bool], kind: str, flag: str = "-o") -> None:
    """Fail before the work, not after it, when ``path`` cannot be written or is not ours to replace.

    Args:
        path: the file to be written later.
        force: replace whatever is there.
        ours: whether the existing file may be replaced silently.
        kind: what ``ours`` recognises, for the message, such as "a scan file".
        flag: the option that names the file.

    Raises:
        UsageError: with what to do about it.
    """
    from memadvise.ledger import check_regular

    folder = path.parent
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint=f"name a file in it, for example {flag} {path / 'memadvise.out'}")
    check_regular(path, flag=flag)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} to write {path.name} in", hint=f"mkdir -p {folder}")
    if path.exists() and not force and not ours(path):
        hint = f"give another name with {flag}, or --force to replace it"
        raise UsageError(f"{path} exists and is not {kind}", hint=hint)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.", suffix=".tmp"):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write in the folder {folder}: {error.strerror}",
            hint=f"give a file in a writable folder with {flag}",
        ) from error


@contextlib.contextmanager
def interruptible(interrupt: Interrupt | None = None) -> Iterator[None]:
    """While inside, Ctrl-C ends the process at once with exit code 130; files are written outside, whole.

    Args:
        interrupt: may take the first Ctrl-C as a request to stop soon.

    The exception that Python raises otherwise comes at any bytecode. In a callback of torch's C++ that must not raise,
    of which a trace has many, it is an abort: one Ctrl-C in eight, as tried.
    """
    ours = state.own_process and threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def leave(*_: Any) -> None:
        if interrupt is not None and interrupt.ask():
            os.write(2, STOPPING.encode())
            return
        # Not through sys.stderr, which may be in the middle of a write. A terminal gets its cursor back from the bar.
        os.write(2, (("\r\x1b[2K\x1b[?25h" if sys.stderr.isatty() else "") + INTERRUPTED).encode())
        os._exit(130)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def show_progress() -> Iterator[Progress]:
    """A callback ``(what, done, total)``: a bar on a terminal's stderr, one line a phase elsewhere, or nothing."""
    if not state.progress:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        with _bar() as callback:
            yield callback
    else:
        yield _lines()


def _lines() -> Progress:
    """One line when a phase starts, for logs."""
    seen: set[str] = set()

    def callback(what: str, done: int, total: int) -> None:
        if what not in seen:
            seen.add(what)
            note(f"{what} ...")

    return callback


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    """A bar for the phase that is running, shown once the work has taken a second; gone when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    # stdout is left alone: the target's own prints are sent to stderr elsewhere.
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True, markup=False, highlight=False, emoji=False),
        transient=True,
        redirect_stdout=False,
    )
    task = bar.add_task("starting", total=None)
    started, shown = time.monotonic(), False

    def callback(what: str, done: int, total: int) -> None:
        nonlocal shown
        if not shown and time.monotonic() - started > 1:
            bar.start()
            shown = True
        bar.update(task, description=what, completed=done, total=total or None)

    try:
        yield callback
    finally:
        if shown:
            bar.stop()
