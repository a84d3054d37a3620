"""A contest of plans: who took part, and how the best of them ended from the new starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import RenderableType
from rich.text import Text

from memadvise.report.draw import heading, table


class TrialLike(Protocol):
    """What a row needs of :class:`memadvise.advise.contest.Trial`."""

    @property
    def name(self) -> str: ...
    @property
    def rate(self) -> float: ...
    @property
    def first_loss(self) -> float | None: ...
    @property
    def losses(self) -> tuple[float | None, ...]: ...
    @property
    def gap(self) -> float | None: ...
    @property
    def error(self) -> float | None: ...


class ContestLike(Protocol):
    """What the report needs of :class:`memadvise.advise.contest.Contest`."""

    @property
    def entrants(self) -> Sequence[TrialLike]: ...
    @property
    def finalists(self) -> Sequence[TrialLike]: ...
    @property
    def winner(self) -> str: ...
    @property
    def rate(self) -> float: ...
    @property
    def words(self) -> str: ...
    @property
    def warnings(self) -> Sequence[str]: ...


def contest_renderables(contest: ContestLike) -> list[RenderableType]:
    """The outcome in a sentence, the finalists, then everybody at the first start."""
    finals = [
        (
            f"{'> ' * ((trial.name, trial.rate) == (contest.winner, contest.rate))}{trial.name}",
            f"{trial.rate:.3g} x",
            ", ".join(map(_loss, trial.losses)),
            "-" if trial is contest.finalists[0] else _gap(trial),
        )
        for trial in contest.finalists
    ]
    first = [(trial.name, f"{trial.rate:.3g} x", _loss(trial.first_loss)) for trial in contest.entrants]
    return [
        heading("Contest of the plans that fit"),
        Text(contest.words),
        *(Text(f"warning: {line}", "yellow") for line in contest.warnings),
        table({"finalist": "name", "learning rate": "number", "losses": "text", "above the plan": "text"}, finals),
        heading("Everybody from the first start, at the best rate"),
        table({"plan": "name", "learning rate": "number", "loss": "number"}, first),
    ]


def _loss(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4g}"


def _gap(trial: TrialLike) -> str:
    return "-" if trial.gap is None or trial.error is None else f"{trial.gap:+.2g} (standard error {trial.error:.1g})"
