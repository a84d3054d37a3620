"""``memadvise check``: compare what a step takes with a committed baseline, a budget or another commit."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memadvise.cli import common
from memadvise.errors import MemadviseError, UsageError

if TYPE_CHECKING:
    from memadvise.check import Result
    from memadvise.check_run import Lane


class CheckFormat(StrEnum):
    """How the verdicts are written."""

    text = "text"
    json = "json"
    markdown = "markdown"
    github = "github"
    junit = "junit"


def check(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="file.py, file.py:name, package.module:name or hf:DIR_OR_CONFIG_JSON. The files are executed.",
        ),
    ],
    baseline: Annotated[
        Path, typer.Option("--baseline", metavar="FILE", help="The committed file to compare with.")
    ] = Path("memadvise.baseline.json"),
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Write what these targets take now into the file.")
    ] = False,
    against: Annotated[
        str | None, typer.Option("--against", metavar="git:REF", help="Compare with that commit instead of a file.")
    ] = None,
    tolerance: Annotated[
        str | None,
        typer.Option("--tolerance", metavar="SIZE", help="Growth that is no finding: 0 (default), 16MiB, 1%."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="SIZE", help="A limit on the peak: 24GB (10^9), 24GiB (2^30)."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Trace with this plan; default AdamW as it stands.")
    ] = None,
    device: common.DeviceOption = common.Device.cuda,
    arch: common.Arch = None,
    attention: common.Attention = None,
    assume: common.Assume = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run on the device and gate on its peak allocated, within 1%,16MiB.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A stale baseline, too, is a finding.")] = False,
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Report findings without failing.")] = False,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="For hf: targets.")] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=1, help="For hf: targets.")] = None,
    dtype: common.Dtype = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT[=FILE]",
            help="text, json, markdown, github, junit; repeatable, all but one with a file: junit=memory.xml.",
        ),
    ] = None,
    output: common.ResultFile = None,
    force: common.Force = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = 0,
    no_progress: common.NoProgress = False,
) -> None:
    """Fail when a training step takes more memory than its baseline; no GPU needed."""
    formats = _formats(format or ["text"], output)
    common.configure(quiet=quiet, verbose=verbose, no_progress=no_progress)
    from memadvise.check import exit_code, parse_tolerance
    from memadvise.units import parse_bytes

    if against is not None and update_baseline:
        raise UsageError("--against compares with a commit and writes no baseline", hint="leave out --update-baseline")
    allowed = parse_tolerance(tolerance) if tolerance is not None else None
    limit = parse_bytes(budget) if budget is not None else None
    for file in formats.values():
        if file is not None:
            common.check_writable(file, force=force, ours=_is_report, kind="a report of memadvise check")

    from memadvise.check_run import Lane

    options: dict[str, Any] = {"batch_size": batch_size, "seq_len": seq_len, "dtype": dtype}
    lane = Lane(
        device=common.device_model(device, arch, attention, assume, at_hand=measure),
        plan=str(plan) if plan is not None else None,
        measure=measure,
        options={name: value for name, value in options.items() if value is not None},
    )
    targets = list(dict.fromkeys(targets))
    with common.show_progress() as progress:
        checks = _Checks(targets, lane, baseline, against, update=update_baseline, budget_only=limit is not None)
        checks.options = [*_device_options(device, arch, attention, assume), *(["--measure"] if measure else [])]
        results = checks.run(progress, tolerance=allowed, budget_bytes=limit, strict=strict)
    for kind, file in formats.items():
        _deliver(kind, results, file)
    for result in results:
        if result.error is not None:
            common.report_error(result.error)
    raise typer.Exit(exit_code(results, exit_zero=exit_zero))


class _Checks:
    """One run over all targets: the base first, so that a broken file is told before the work, then each target."""

    def __init__(
        self, targets: list[str], lane: Lane, file: Path, against: str | None, *, update: bool, budget_only: bool
    ) -> None:
        from memadvise.baseline import Baseline, load_baseline
        from memadvise.check import Status

        self.targets, self.lane, self.file, self.update = targets, lane, file, update
        self.base: Baseline | None = None
        self.without = Status.missing
        self.against = against
        self.options: list[str] = []  # those of the command line that a base has to be made with, too
        if against is not None:
            from memadvise.against import find_commit, repository_root

            self.commit = find_commit(against)  # before the work
            self.root, self.without = repository_root(), Status.new
        else:
            self.root = Path(os.path.realpath(file)).parent
            if update:
                common.check_writable(file, force=True, ours=lambda path: True, kind="", flag="--baseline")
            if update or budget_only:
                self.without = Status.new
                self.base = load_baseline(file) if os.path.lexists(file) else None
                if self.base is not None and not update:
                    self.without = Status.missing
            else:
                self.base = load_baseline(file)

    def run(self, progress: common.Progress, **limits: Any) -> list[Result]:
        """Every target's verdict; what one of them raises is its verdict, and the others go on."""
        from memadvise.baseline import update_baseline
        from memadvise.check import Result, Status, compare
        from memadvise.check_run import check_target

        total = len(self.targets)
        observed: list[Any] = []
        for done, spec in enumerate(self.targets):
            progress(f"{'measuring' if self.lane.measure else 'tracing'} {spec}", done, total)
            try:
                with common.interruptible():
                    observed.append(check_target(spec, self.lane, root=self.root))
            except MemadviseError as error:
                observed.append(Result(spec, Status.error, error=error))
        if self.against is not None:
            from memadvise.against import base_of_commit

            progress(f"the same at {self.against}", total, total)
            there = [spec for spec, seen in zip(self.targets, observed, strict=True) if not isinstance(seen, Result)]
            given = [f"--{name.replace('_', '-')}={value}" for name, value in self.lane.options.items()]
            options = [*self.options, *given]
            self.base = base_of_commit(self.commit, there, options, plan=self.lane.plan) if there else None
        results: list[Result] = []
        for seen in observed:
            if isinstance(seen, Result):
                results.append(seen)
                continue
            observation, place = seen
            for warning in observation.warnings:
                common.note(f"warning: {observation.entry.target}: {warning}")
            before = self.base.find(observation.entry) if self.base is not None else None
            result = compare(observation, before, without_baseline=self.without, place=place, **limits)
            results.append(result.updated() if self.update else result)
        if self.update:
            entries = [seen[0].entry for seen in observed if not isinstance(seen, Result)]
            written = bool(entries) and update_baseline(self.file, entries)
            common.note(f"Wrote {self.file}" if written else f"{self.file} is unchanged")
        return results


def _device_options(
    device: common.Device, arch: str | None, attention: str | None, assume: list[str] | None
) -> list[str]:
    """The words that ask for the same device again."""
    given = {"--arch": arch, "--attention": attention}
    words = [f"{name}={value}" for name, value in given.items() if value is not None]
    return [f"--device={device}", *words, *(f"--assume={value}" for value in assume or ())]


def _formats(texts: list[str], output: Path | None) -> dict[CheckFormat, Path | None]:
    """Format -> file, None for stdout; ``-o`` is the file of the one without."""
    found: dict[CheckFormat, Path | None] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if name not in list(CheckFormat) or (equals and not file):
            raise UsageError(
                f"--format '{text}' is none of {', '.join(CheckFormat)}",
                hint="a file may follow: --format junit=memory.xml",
            )
        found[CheckFormat(name)] = Path(file) if file else None
    printed = [kind for kind, file in found.items() if file is None]
    if len(printed) > 1:
        raise UsageError(
            f"{' and '.join(printed)} cannot both go to stdout", hint=f"name a file: --format {printed[1]}=FILE"
        )
    if output is not None:
        if not printed:
            raise UsageError("every --format has its file already", hint="leave out -o")
        found[printed[0]] = output
    return found


def _deliver(kind: CheckFormat, results: list[Result], file: Path | None) -> None:
    from memadvise.report import check_text, ci

    if kind is CheckFormat.text and file is None:
        common.print_renderables(check_text.check_renderables(results))
        return
    if kind is CheckFormat.github:
        summary = os.environ.get("GITHUB_STEP_SUMMARY")
        if summary:
            _append(Path(summary), ci.markdown(results))
    render = {
        CheckFormat.text: check_text.render_check,
        CheckFormat.json: lambda found: common.to_json(ci.document(found)),
        CheckFormat.markdown: ci.markdown,
        CheckFormat.github: lambda found: ci.github(found, folder=os.environ.get("GITHUB_WORKSPACE")),
        CheckFormat.junit: ci.junit,
    }[kind]
    common.deliver(render(results), file, force=True)


def _append(path: Path, text: str) -> None:
    """Add to the step summary; a runner without one still gets the verdict."""
    try:
        with open(path, "a", encoding="utf-8") as handle:
            handle.write(text)
    except OSError as error:
        common.note(f"warning: cannot append to the step summary {path}: {error.strerror}")


_REPORT = re.compile(  # how a report begins, format by format; of the text one, every headline but an error's
    r"<\?xml[^>]*>\s*<testsuites |\{\s*\"schema_version\": \d+,\s*\"results\"|<!-- memadvise check -->"
    r"|\+[\d,.]+ [KMG]?i?B|[\d,.]+ [KMG]?i?B over the budget|no baseline entry;"
    r"|(same|updated|new|improved|not comparable): |$"
)


def _is_report(path: Path) -> bool:
    """Whether a file looks like one of the reports written here, so that the next run may replace it."""
    try:
        with open(path, encoding="utf-8") as handle:
            return _REPORT.match(handle.read(200)) is not None
    except (OSError, ValueError):
        return False
