"""Is the recommended plan as good as it claims? Validation loss under budgets of optimizer state, beside what else fits
there.

    python benchmarks/advice_quality.py [--tasks gpt vit ...] [--seeds 3] [--steps 200] [--jobs 2] [--cache FILE]
                                        [--quick]

Seed 0 decides, the others compare. With seed 0, AdamW's learning rate is chosen on a grid, and so is that of each
uniform method, around its custom; a method's grid is extended as long as its edge is best. Tables and heads learn ten
times faster than the rest, as AdamW is tuned where it matters. The plan "by scores" comes from one probe of 60 steps
with seed 0 at AdamW's learning rate. The one that is recommended is what ``recommend --trials`` makes of it: a contest
(memadvise/advise/contest.py) between that plan, smaller ones, and every method that fits under the hard rules, trained
as all runs here are, with seed 0 and then with seeds that nothing else uses. Then, with seeds 1, 2, ...: AdamW, every
uniform method, and under each budget (a share of AdamW's state) both plans, three random plans, and three random plans
under the hard rules.

A column's figure is the loss above AdamW's with the same seed, in thousandths of a nat: mean over the seeds, and in
brackets the smallest and largest. "best uniform" is the one that fits and was best with seed 0; "hindsight" is the
lowest mean among all that fit, picked after the fact from up to 17 methods. "noise" is the standard deviation of
AdamW's loss over all seeds. "held": the recommended plan is not worse than the best uniform method by more than the
noise; the exit code is 1 if it is, anywhere. "scores held" says the same of the plan by scores. "nor AdamW": the method
is better than AdamW itself by more than the noise; scores never aim at that. Random plans have no "held": theirs is a
comparison, not a promise. A star marks a plan that exists only with ``--allow tiny``: in models of this size vectors
and small tensors, which otherwise keep their full state, are some per cent of it.

What follows is how well the probe's scores agree between seeds, widths and halves of the window (rank correlation over
tensors and candidates of tier 1).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_support.advice import (
    BETAS,
    FAMILIES,
    WEIGHT_DECAY,
    Run,
    Runner,
    at_random,
    plan_bytes,
    plan_from,
    rules_of,
    spelled_out,
)
from bench_support.output import machine, table

from memadvise.advise import contest
from memadvise.advise.candidates import candidate_settings, confidence, tier
from memadvise.advise.recommend import Advisor, Wishes
from memadvise.advise.uniform import WHOLE_MODEL, uniform
from memadvise.errors import MemadviseError
from memadvise.ledger import Parameter, Scan
from memadvise.optim.create import deciding_rules
from memadvise.optim.registry import default_lr_factor
from memadvise.plan.schema import Plan, Rule, Setting
from memadvise.probe.fidelity import spearman
from memadvise.scan import ProbeOptions, run_scan

TASKS = ("gpt", "vit", "resnet", "gnn", "lstm")
BUDGETS = (75.0, 50.0, 37.0, 25.0, 12.5, 6.0, 3.0)
GRID = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
RANDOM_PLANS = 3
ADAMW = Setting("adamw")
COLUMNS = (
    "budget %", "recommended", "what it is", "its state %", "confidence", "by scores", "best uniform", "its loss",
    "hindsight", "random", "random, ruled", "noise", "held", "scores held",
)  # fmt: skip
CONTEST_SEEDS = (0, 11, 12, 13)


@dataclass(frozen=True)
class Losses:
    """Losses above AdamW's of the same seeds; NaN where a run diverged."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if not any(map(math.isnan, self.values)) else math.inf

    def __str__(self) -> str:
        if math.isinf(self.mean):
            return "diverged"
        low, high = (f"{1000 * value:+.0f}" for value in (min(self.values), max(self.values)))
        return f"{1000 * self.mean:+.0f} [{low} {high}]"


@dataclass(frozen=True)
class Uniform:
    """One method for the whole model: ``first`` is its loss with seed 0, ``losses`` are those with the others."""

    setting: Setting
    num_bytes: int
    first: float
    losses: Losses


class Task:
    """One task with everything that is compared on it."""

    def __init__(self, name: str, runner: Runner, seeds: int, steps: int, grid: Sequence[float]) -> None:
        self.name, self._runner, self._seeds, self._steps = name, runner, range(1, seeds + 1), steps
        self._parameters: tuple[Parameter, ...] = ()
        dense = plan_from_setting(ADAMW)
        tried = runner.losses(self._run(dense, 0, lr) for lr in grid)
        self.lr = min((loss, run.lr) for run, loss in tried.items() if not math.isnan(loss))[1]
        self.scan = probed(name, 0, self.lr)
        self._parameters = self.scan.parameters
        self._first, *self._dense = runner.losses(self._run(dense, seed) for seed in (0, *self._seeds)).values()
        self.total = plan_bytes(self._parameters, uniform(self._parameters, ADAMW))

    @property
    def noise(self) -> float:
        return statistics.stdev([self._first, *self._dense])

    @property
    def reference(self) -> float:
        return statistics.fmean(self._dense)

    def described(self, plan: Plan) -> tuple[str, str]:
        """Share of AdamW's state in per cent, and the confidence in words."""
        trainable = {p.name: p for p in self._parameters if p.trainable}
        rules = deciding_rules(plan, trainable)
        settings = {name: Setting(rule.method, dict(rule.options)) for name, rule in rules.items()}
        level = max(confidence(trainable[name], setting) for name, setting in settings.items())
        return f"{100 * plan_bytes(self._parameters, settings) / self.total:.1f}", level.words

    def _run(self, plan: Plan, seed: int, lr: float | None = None) -> Run:
        return Run(self.name, seed, self._steps, lr or self.lr, rules_of(spelled_out(plan, self._parameters)))

    def losses(self, plans: Sequence[tuple[Plan, float | None]]) -> list[Losses]:
        """Of every (plan, learning rate) with every seed."""
        runs = [[self._run(plan, seed, lr) for seed in self._seeds] for plan, lr in plans]
        found = self._runner.losses(run for row in runs for run in row)
        return [Losses(tuple(found[r] - base for r, base in zip(row, self._dense, strict=True))) for row in runs]

    def trained(self, runs: Sequence[contest.Run]) -> list[float]:
        """The losses of a contest's runs."""
        named = [self._run(run.plan, run.seed, run.rate * self.lr) for run in runs]
        found = self._runner.losses(named)
        return [found[run] for run in named]

    def contest(
        self, advisor: Advisor, limit: int, methods: Sequence[Setting], factors: Sequence[float]
    ) -> tuple[Plan, contest.Contest, Plan] | None:
        """The plan that wins under a limit on the state, how, and the plan by scores; None where there is none."""
        choice = advisor.within(limit)
        if choice is None:
            return None
        plan = contest.Entrant(contest.THE_PLAN, choice, advisor.drafted(choice, None))
        held, winner = contest.hold(
            advisor, plan, lambda c: c.num_bytes <= limit, self.trained,
            methods=methods, factors=factors, seeds=CONTEST_SEEDS,
        )  # fmt: skip
        return advisor.drafted(winner, None), held, plan.plan

    def uniform_methods(self, settings: Sequence[Setting], factors: Sequence[float]) -> list[Uniform]:
        """Uniform methods, each at its best learning rate of seed 0."""
        plans = {s.key: plan_from(uniform(self._parameters, s)) for s in settings}
        own = {s.key: default_lr_factor(s.method) for s in settings}
        best = contest.best_rates(plans, own, self.trained, seed=0, factors=factors)
        losses = self.losses([(plans[s.key], best[s.key][1] * self.lr) for s in settings])
        sizes = [plan_bytes(self._parameters, uniform(self._parameters, s)) for s in settings]
        firsts = [best[s.key][0] for s in settings]
        return [Uniform(*row) for row in zip(settings, sizes, firsts, losses, strict=True)]

    def random_losses(self, limit: int, *, ruled: bool) -> Losses | None:
        """Plan i with seed i modulo their number."""
        pairs = []
        for number in range(RANDOM_PLANS):
            drawn = at_random(self.scan, limit, ruled=ruled, seed=number)
            if drawn is None:
                return None
            at = number % len(self._seeds)
            pairs.append((at, self._run(plan_from(*drawn), self._seeds[at])))
        found = self._runner.losses(run for _, run in pairs)
        return Losses(tuple(found[run] - self._dense[at] for at, run in pairs))


def plan_from_setting(setting: Setting) -> Plan:
    return Plan(rules=(Rule("**", setting.method, dict(setting.options)),))


def probed(name: str, seed: int, lr: float, *, width: int | None = None) -> Scan:
    """The scan of a task, with a probe of 60 steps."""
    os.environ["MEMADVISE_SEED"] = str(seed)
    os.environ.pop("MEMADVISE_WIDTH", None)
    if width is not None:
        os.environ["MEMADVISE_WIDTH"] = str(width)
    for module in [m for m in sys.modules if m.startswith("bench_support.families")]:
        del sys.modules[module]  # they read the environment when they are imported
    options = ProbeOptions(lr=lr, weight_decay=WEIGHT_DECAY, betas=BETAS, seed=seed, hessian=False, optimizers=())
    return run_scan(str(FAMILIES / f"{name}.py"), device="cpu", probe=options)


def scores(scan: Scan, attribute: str = "abs_d1") -> dict[tuple[str, str], float]:
    """Scores of tier 1 by (parameter, candidate)."""
    assert scan.probe is not None
    parameters = {p.name: p for p in scan.parameters}
    found = {}
    for probe in scan.probe.parameters:
        first = {s.key for s in candidate_settings(parameters[probe.name]) if tier(s) == 1}
        for value in probe.fidelity:
            score = getattr(value, attribute)
            if value.candidate in first and score is not None:
                found[probe.name, value.candidate] = score
    return found


def correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's, NaN where there is none."""
    found = spearman(left, right)
    return math.nan if found is None else found


def half_agreement(scan: Scan) -> float:
    """Of the scores of the two halves of the window."""
    assert scan.probe is not None
    first = scores(scan).keys()
    pairs = [
        value.half_scores
        for probe in scan.probe.parameters
        for value in probe.fidelity
        if (probe.name, value.candidate) in first and value.half_scores is not None
    ]
    return correlation([first for first, _ in pairs], [second for _, second in pairs])


def agreement(left: Scan, right: Scan) -> float:
    one, other = scores(left), scores(right)
    common = sorted(one.keys() & other.keys())
    return correlation([one[key] for key in common], [other[key] for key in common])


def compare(task: Task, budgets: Sequence[float], settings: Sequence[Setting], factors: Sequence[float]) -> bool:
    """Print the table of one task; whether the plan held everywhere."""
    print(
        f"\n{task.name}: AdamW at lr {task.lr:g} reaches {task.reference:.3f}; noise {1000 * task.noise:.0f}; "
        f"{sum(p.numel for p in task.scan.parameters):,} parameters"
    )
    methods = task.uniform_methods(settings, factors)
    advisor = Advisor(task.scan, trace=_no_trace)
    without_tiny = Advisor(task.scan, trace=_no_trace, wishes=Wishes(allowed=("tiny",)))
    rows, held_everywhere = [], True
    for budget in budgets:
        limit = int(budget / 100 * task.total)
        fitting = [m for m in methods if m.num_bytes <= limit]
        best = min(fitting, key=lambda m: m.first, default=None)
        lowest = min((m.losses for m in fitting), key=lambda losses: losses.mean, default=None)
        found = task.contest(advisor, limit, settings, factors)
        star = "" if found is not None else "*"
        found = found or task.contest(without_tiny, limit, settings, factors)
        fits_nothing = ["no plan fits", *"----"]
        mine, cells, verdicts = None, fits_nothing, ["no plan", "no plan"]
        if found is not None:
            plan, held_contest, by_scores = found
            mine, scored = task.losses([(plan, None), (by_scores, None)])
            won = held_contest.winner + (f" at {held_contest.rate:.3g} x lr" if held_contest.rate != 1 else "")
            cells = [mine, won, *task.described(plan), scored]
            verdicts = [held(losses, best.losses if best else None, task.noise) for losses in (mine, scored)]
            print(f"  {budget:g} %: {held_contest.words}", file=sys.stderr, flush=True)
        held_everywhere = held_everywhere and verdicts[0] in ("yes", "-")
        rows.append([
            f"{budget:g}{star}", *cells, best.setting.key if best else "none fits", best.losses if best else "-",
            lowest or "-", *(task.random_losses(limit, ruled=ruled) or "none found" for ruled in (False, True)),
            f"{1000 * task.noise:.0f}", *verdicts,
        ])  # fmt: skip
    print(table(COLUMNS, rows), flush=True)
    every = sorted(methods, key=lambda m: m.losses.mean)
    told = (f"{m.setting.key} {100 * m.num_bytes / task.total:.1f} % {m.losses}" for m in every)
    print("every uniform method: " + "; ".join(told), flush=True)
    return held_everywhere


def held(plan: Losses | None, other: Losses | None, noise: float) -> str:
    """Whether a plan is not worse than another way by more than the noise."""
    if other is None:
        return "-"
    if plan is None:
        return "no plan"
    if plan.mean - other.mean <= noise:
        return "yes"
    return "no, nor AdamW" if -other.mean > noise else "no"


def _no_trace(plan: Plan) -> object:
    raise MemadviseError("plans for a limit on the state are not traced")


def main() -> int:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3, help="beside seed 0 (default 3)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep finished runs in this JSON file")
    parser.add_argument("--quick", action="store_true", help="one task and budget, two seeds, few steps and methods")
    options = parser.parse_args()
    budgets, settings, grid, factors = BUDGETS, WHOLE_MODEL, GRID, contest.FACTORS
    if options.quick:
        options.tasks, options.seeds, options.steps = ["gpt"], 2, 30
        budgets, settings, grid, factors = (12.5,), (WHOLE_MODEL[0], *WHOLE_MODEL[10:12]), GRID[2:3], (1.0,)
    os.environ["MEMADVISE_TUNED"] = "1"
    runner = Runner(options.cache, options.jobs)
    print(machine())
    print(f"{options.steps} steps, {options.seeds} seeds; losses above AdamW's in thousandths of a nat")
    held, tasks = True, []
    for name in options.tasks:
        tasks.append(Task(name, runner, options.seeds, options.steps, grid))
        held = compare(tasks[-1], budgets, settings, factors) and held
    if not options.quick:
        print("\nagreement of the probe's scores (rank correlation over tensors and candidates of tier 1)")
        rows = []
        for task in tasks:
            other = agreement(task.scan, probed(task.name, 1, task.lr))
            narrow, wide = (probed(task.name, 0, task.lr, width=width) for width in (64, 256))
            rows.append([
                task.name, f"{other:.2f}", f"{agreement(narrow, wide):.2f}", f"{half_agreement(task.scan):.2f}"
            ])  # fmt: skip
        print(table(("task", "seeds 0 and 1", "widths 64 and 256", "halves of the window"), rows))
    print(f"\nthe recommended plan {'held' if held else 'did not hold'} against the best uniform method everywhere")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
