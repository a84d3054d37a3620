"""A contest of whole plans: what the scores chose beside everything else that fits, each trained as the user trains.

Scores rank the settings of one tensor by how near they stay to AdamW. They do not see how compressed tensors act
together, which learning rate a plan wants, or that some models train better under another method than under AdamW.
Training sees all three, so where it can be afforded it has the last word:

1. From one start, every contestant at a few learning rates around its own; where the best is the last, further ones.
2. The plan as it is and the best few of the others, each at its best rate, from new starts.
3. Another replaces the plan where it ended lower from every new start, on average by more than twice the standard
   error of the differences and by more than half of what the plan's own losses vary between starts: less is not worth
   a change to what is less sure. Of several such, the lowest, or what cannot be told from it (within twice the standard
   error) and is surer, or else smaller. The start of step 1, which chose them, does not count.

Contestants keep the hard rules and the user's wishes: where a method must not go, AdamW stays, or what the plan has.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from memadvise.advise.choose import Choice, Chosen, fixed_peak_bytes
from memadvise.advise.recommend import Advisor, Recommendation
from memadvise.advise.rules import DENSE
from memadvise.advise.uniform import WHOLE_MODEL, as_applied
from memadvise.errors import UsageError
from memadvise.optim.registry import default_lr_factor
from memadvise.plan.schema import Plan, Setting

FACTORS = (0.35, 1.0, 3.0)  # of a contestant's own learning rate
MAX_RATES = 6
FINALISTS = 3  # beside the plan
NEW_STARTS = 3
THE_PLAN = "the plan"
_FAR = 5.0  # a plan's best rate is this far from AdamW's where AdamW's was not tuned
_SMALLER = {2: "the plan for half the state", 4: "the plan for a quarter of the state"}


@dataclass(frozen=True)
class Run:
    """One training: ``rate`` times the learning rate, from the start (weights, batches) of ``seed``."""

    plan: Plan
    rate: float
    seed: int


# The losses at the end of some runs, in their order; not finite where a run diverged.
Trainer = Callable[[Sequence[Run]], Sequence[float]]


@dataclass(frozen=True)
class Entrant:
    """Who takes part. ``rate``: its own factor on the learning rate, on top of those of its plan's rules."""

    name: str
    choice: Choice
    plan: Plan
    rate: float = 1.0


@dataclass(frozen=True)
class Trial:
    """An entrant at one rate: ``losses`` from the new starts (None: diverged), empty where it was not a finalist.

    ``first_loss``: from the first start. ``gap`` and ``error``: mean over the new starts of the loss less the plan's,
    and its standard error; None where either diverged.
    """

    name: str
    rate: float
    first_loss: float | None
    losses: tuple[float | None, ...] = ()
    gap: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Contest:
    """All entrants at their best rates, the best first; the finalists, the plan as it is first; and who won."""

    entrants: tuple[Trial, ...]
    finalists: tuple[Trial, ...]
    winner: str
    rate: float
    num_runs: int
    words: str
    warnings: tuple[str, ...] = ()


def contested(advisor: Advisor, budget_bytes: int, train: Trainer) -> tuple[Recommendation, Contest]:
    """The recommendation for a budget after a contest; arguments and errors as of :func:`hold` and ``recommend``."""
    choice, plan, _ = advisor.found(budget_bytes)

    def fits(other: Choice) -> bool:
        # By arithmetic first, which costs nothing: where that says too large, the trace says so as well.
        room = budget_bytes - fixed_peak_bytes(other.ledger) - other.num_bytes
        return room >= 0 and advisor.traced(other, budget_bytes)[1].peak_bytes <= budget_bytes

    contest, winner = hold(advisor, Entrant(THE_PLAN, choice, plan), fits, train)
    return advisor.finished(winner, *advisor.traced(winner, budget_bytes), budget_bytes), contest


def hold(
    advisor: Advisor,
    plan: Entrant,
    fits: Callable[[Choice], bool],
    train: Trainer,
    *,
    methods: Sequence[Setting] = WHOLE_MODEL,
    factors: Sequence[float] = FACTORS,
    seeds: Sequence[int] = range(1 + NEW_STARTS),
) -> tuple[Contest, Choice]:
    """Let everything that fits compete with a plan; the winning choice has its rate in its rules' factors.

    Args:
        advisor: of the scan.
        plan: what the scores chose.
        fits: whether a choice is within the budget.
        train: trains, any number of runs at a time.
        methods: those that take part for the whole model.
        factors: of a contestant's own learning rate, to begin with; 1 is one of them.
        seeds: the first start, then the new ones, two at least.

    Raises:
        UsageError: nothing trains, at no learning rate.
    """
    first, *new = seeds
    entrants = {e.name: e for e in (plan, *_others(advisor, plan.choice, fits, methods))}
    counted = _Counted(train)
    plans = {name: e.plan for name, e in entrants.items()}
    own = {name: e.rate for name, e in entrants.items()}
    best = best_rates(plans, own, counted, seed=first, factors=factors)
    order = sorted(best, key=lambda name: best[name][0])
    if math.isinf(best[order[0]][0]):
        raise UsageError(
            "no contestant trains, the plan neither: every loss was infinite or NaN", hint="give a smaller --lr"
        )
    challengers = [(name, best[name][1]) for name in order if (name, best[name][1]) != (plan.name, plan.rate)]
    pairs = [(plan.name, plan.rate), *challengers[:FINALISTS]]
    losses = counted([Run(entrants[name].plan, rate, seed) for name, rate in pairs for seed in new])
    rows = [tuple(map(_finite, losses[i : i + len(new)])) for i in range(0, len(losses), len(new))]
    finalists = tuple(
        _trial(name, rate, best[name][0] if rate == best[name][1] else None, row, rows[0])
        for (name, rate), row in zip(pairs, rows, strict=True)
    )
    winner = _winner(finalists, lambda t: (_sure(entrants[t.name].choice), entrants[t.name].choice.num_bytes))
    contest = Contest(
        entrants=tuple(Trial(name, best[name][1], _finite(best[name][0])) for name in order),
        finalists=finalists,
        winner=winner.name,
        rate=winner.rate,
        num_runs=counted.count,
        words=_words(finalists, winner, len(entrants), counted.count),
        warnings=_warnings(best[plan.name][1]),
    )
    choice = plan.choice
    if winner is not finalists[0]:
        choice = _decided(entrants[winner.name].choice, winner.rate)
    return contest, replace(choice, contest=contest.words)


def best_rates(
    plans: Mapping[str, Plan],
    own: Mapping[str, float],
    train: Trainer,
    *,
    seed: int,
    factors: Sequence[float] = FACTORS,
) -> dict[str, tuple[float, float]]:
    """(loss, rate) of each plan at the best of some rates around its own; at an edge the next ones are tried, too."""
    rates = {name: [f * own[name] for f in factors] for name in plans}
    found: dict[str, dict[float, float]] = {name: {} for name in plans}
    while wanted := [(name, rate) for name in plans for rate in rates[name] if rate not in found[name]]:
        losses = train([Run(plans[name], rate, seed) for name, rate in wanted])
        for (name, rate), loss in zip(wanted, losses, strict=True):
            found[name][rate] = loss if math.isfinite(loss) else math.inf
        for name, tried in found.items():
            best = min(tried, key=tried.__getitem__)
            if 1 < len(tried) < MAX_RATES and best in (min(tried), max(tried)) and math.isfinite(tried[best]):
                rates[name].append(best / 3 if best == min(tried) else best * 3)
    return {name: min((loss, rate) for rate, loss in tried.items()) for name, tried in found.items()}


# ---------------------------------------------------------------- who takes part


def _others(
    advisor: Advisor, choice: Choice, fits: Callable[[Choice], bool], methods: Sequence[Setting]
) -> Iterator[Entrant]:
    """Smaller plans, which the scores chose as well, and every method for the whole model."""
    for part, name in _SMALLER.items():
        within = advisor.within(choice.num_bytes // part)
        if within is None:
            break
        smaller = replace(within, ledger=choice.ledger, switches=choice.switches)
        if fits(smaller):
            yield Entrant(name, smaller, advisor.drafted(smaller, None))
    for setting in methods:
        for rest in (True, False):
            whole = _applied(advisor, choice, setting, rest)
            if whole is not None and fits(whole):
                yield Entrant(setting.key, whole, advisor.drafted(whole, None), default_lr_factor(setting.method))
                break


def _applied(advisor: Advisor, choice: Choice, setting: Setting, dense_rest: bool) -> Choice | None:
    """``setting`` wherever it may be; elsewhere AdamW in full, or what the plan has. None if it may be nowhere."""
    chosen, anywhere = [], False
    for c in choice.chosen:
        applied = as_applied(c.group.members[0], setting)
        if applied is not None and advisor.may_be(c.group, applied):
            chosen.append(_priced(advisor, c, applied))
            anywhere = True
        else:
            dense = dense_rest and advisor.may_be(c.group, DENSE)
            chosen.append(_priced(advisor, c, DENSE) if dense else c)
    return replace(choice, chosen=tuple(chosen)) if anywhere else None


def _priced(advisor: Advisor, chosen: Chosen, setting: Setting) -> Chosen:
    (priced,) = advisor.price(replace(chosen.group, settings=(setting,)))
    # One learning rate for the whole model, as the methods' papers have it: the contest finds it.
    return replace(chosen, priced=replace(priced, harm=replace(priced.harm, lr_factor=1.0)))


def _decided(choice: Choice, rate: float) -> Choice:
    """The choice with every rule's factor times ``rate``, and why it was chosen."""
    chosen = []
    for c in choice.chosen:
        factor = float(f"{c.priced.harm.lr_factor * rate:.3g}")
        reason = "the plan as a whole ended lowest in a contest" + (f"; learning rate x {factor:g}" * (factor != 1))
        harm = replace(c.priced.harm, lr_factor=factor, reason=reason)
        chosen.append(replace(c, priced=replace(c.priced, harm=harm)))
    return replace(choice, chosen=tuple(chosen), note="decided by a contest", smallest=False)


# ---------------------------------------------------------------- who wins


class _Counted:
    """A trainer that counts."""

    def __init__(self, train: Trainer) -> None:
        self._train, self.count = train, 0

    def __call__(self, runs: Sequence[Run]) -> Sequence[float]:
        self.count += len(runs)
        return self._train(runs)


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _trial(
    name: str, rate: float, first: float | None, row: tuple[float | None, ...], plans: tuple[float | None, ...]
) -> Trial:
    trial = Trial(name, rate, None if first is None else _finite(first), row)
    if None in row or None in plans:
        return trial
    gap, error = _paired(_trained(trial), [loss for loss in plans if loss is not None])
    return replace(trial, gap=gap, error=error)


def _winner(finalists: Sequence[Trial], preferred: Callable[[Trial], tuple[int, int]]) -> Trial:
    plan, *others = finalists
    better = [trial for trial in others if _is_better(trial, plan)]
    if not better:
        return plan
    lowest = min(better, key=_mean)
    return min((t for t in better if not _is_above(t, lowest)), key=lambda t: (*preferred(t), _mean(t)))


def _sure(choice: Choice) -> int:
    return max(c.priced.confidence for c in choice.chosen)


def _is_above(trial: Trial, lowest: Trial) -> bool:
    gap, error = _paired(_trained(trial), _trained(lowest))
    return gap > 2 * error


def _paired(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean difference, and its standard error."""
    gaps = [a - b for a, b in zip(losses, others, strict=True)]
    return statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def _is_better(trial: Trial, plan: Trial) -> bool:
    if len(_trained(trial)) < len(trial.losses):
        return False
    if trial.gap is None or trial.error is None:  # the plan diverged
        return True
    everywhere = all(a < b for a, b in zip(_trained(trial), _trained(plan), strict=True))
    return everywhere and -trial.gap > max(2 * trial.error, statistics.stdev(_trained(plan)) / 2)


def _trained(trial: Trial) -> list[float]:
    return [loss for loss in trial.losses if loss is not None]


def _mean(trial: Trial) -> float:
    return math.inf if None in trial.losses else statistics.fmean(_trained(trial))


def _words(finalists: Sequence[Trial], winner: Trial, entrants: int, runs: int) -> str:
    plan, *others = finalists
    held = f"a contest of {entrants} plans ({runs} trainings)"
    if winner is plan:
        closest = min(others, key=_mean, default=None)
        if closest is None or closest.gap is None or closest.error is None:
            return f"{held}: the plan stands"
        little = ", too little to change it" if closest.gap < 0 else ""
        return f"{held}: the plan stands; the next best, {_named(closest)}, ended {_gap(closest)} it{little}"
    where = f"from each of {len(winner.losses)} new starts"
    if winner.gap is None:
        return f"{held}: the plan of the scores does not train, {_named(winner)} does {where}"
    return f"{held}: {_named(winner)} ended {_gap(winner)} the plan of the scores, {where}, and replaces it"


def _warnings(plans_best: float) -> tuple[str, ...]:
    if 1 / _FAR < plans_best < _FAR:
        return ()
    return (
        f"the learning rate looks badly tuned: the plan itself ends lowest at {plans_best:.3g} times it; tune it, for "
        "beside an untuned reference a method can look better, or worse, than it is",
    )


def _named(trial: Trial) -> str:
    return f"{trial.name} at {trial.rate:.3g} times the learning rate"


def _gap(trial: Trial) -> str:
    assert trial.gap is not None
    return f"{abs(trial.gap):.2g} (standard error {trial.error:.1g}) {'below' if trial.gap < 0 else 'above'}"
