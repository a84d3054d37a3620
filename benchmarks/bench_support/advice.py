"""Training runs of benchmarks/advice_quality.py: tasks, plans to compare, and a cache of what has been run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memadvise.advise.candidates import candidate_settings, make_groups
from memadvise.advise.rules import BY_NAME, DENSE, codecs_of
from memadvise.ledger import Parameter, Scan
from memadvise.names import glob_escape
from memadvise.optim.create import create_optimizer, deciding_rules
from memadvise.optim.registry import default_lr_factor, state_bytes
from memadvise.plan.schema import Plan, Rule, Setting

FAMILIES = Path(__file__).with_name("families")
# A reference that is not tuned flatters everything that damps it: with betas (0.9, 0.999), a shorter warm-up and no
# clipping AdamW ends 0.1 nats higher on the GPT, and most compressions "improve" it.
WARM_UP = 0.35  # of the steps; then linear to nothing
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0
_TRIES = 300


@dataclass(frozen=True)
class Run:
    """One training run; ``rules``: (pattern, setting's key, learning-rate factor), the first match decides."""

    task: str
    seed: int
    steps: int
    lr: float
    rules: tuple[tuple[str, str, float], ...]

    @property
    def name(self) -> str:
        plan = hashlib.sha256(repr(self.rules).encode()).hexdigest()[:16]
        return f"{self.task} seed={self.seed} steps={self.steps} lr={self.lr:.3e} {plan}"


def rules_of(plan: Plan) -> tuple[tuple[str, str, float], ...]:
    return tuple((rule.match, json.dumps([rule.method, rule.options]), rule.lr_factor) for rule in plan.rules)


def spelled_out(plan: Plan, parameters: Sequence[Parameter]) -> Plan:
    """The plan with one rule a parameter: what is the same plan is the same run, however its patterns are written."""
    trainable = {p.name: p for p in parameters if p.trainable}
    if not trainable:
        return plan
    rules = deciding_rules(plan, trainable)
    return plan_from(
        {name: Setting(rule.method, dict(rule.options)) for name, rule in rules.items()},
        {name: rule.lr_factor for name, rule in rules.items()},
    )


def plan_of(run: Run) -> Plan:
    made = []
    for match, setting, factor in run.rules:
        method, options = json.loads(setting)
        made.append(Rule(match, method, options, lr_factor=factor))
    return Plan(rules=tuple(made))


def family(task: str, seed: int) -> Any:
    """The module of a task, whose models and batches are those of ``seed``."""
    from bench_support.families import common

    common.SEED = seed
    return importlib.import_module(f"bench_support.families.{task}")


def train(run: Run) -> float:
    """The validation loss at the end; NaN if it diverged."""
    torch.set_num_threads(1)
    module = family(run.task, run.seed)
    model = module.build_model().train()
    torch.manual_seed(run.seed)  # dropout
    optimizer = create_optimizer(model, plan_of(run), lr=run.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    warm = max(1, round(WARM_UP * run.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / warm) * max(0.0, 1 - max(0, t - warm) / (run.steps - warm))
    )
    for _, batch in zip(range(run.steps), module.build_batches(), strict=False):
        loss = module.compute_loss(model, batch)
        if not math.isfinite(loss.item()):
            return math.nan
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return module.validation_loss(model)


class Runner:
    """Runs what a cache file does not hold yet, over some processes; finished runs are kept at once."""

    def __init__(self, cache: Path | None, jobs: int) -> None:
        self._cache, self._jobs = cache, jobs
        self._known: dict[str, float | None] = {}
        if cache is not None and cache.exists():
            document = json.loads(cache.read_text(encoding="utf-8"))
            if document.get("made_by") == _made_by():
                self._known = document["runs"]
            else:
                print(f"{cache} is of another torch or other tasks: it begins anew", file=sys.stderr)

    def losses(self, runs: Iterable[Run]) -> dict[Run, float]:
        """Validation losses, NaN for what diverged."""
        wanted = list(dict.fromkeys(runs))
        fresh = [run for run in wanted if run.name not in self._known]
        with _mapping(min(self._jobs, len(fresh))) as run_all:
            for number, (run, loss) in enumerate(zip(fresh, run_all(train, fresh), strict=True), start=1):
                self._known[run.name] = None if math.isnan(loss) else loss
                print(f"{number} of {len(fresh)}  {run.name}: {loss:.4f}", file=sys.stderr, flush=True)
                self._save()
        return {run: math.nan if (loss := self._known[run.name]) is None else loss for run in wanted}

    def _save(self) -> None:
        if self._cache is None:
            return
        part = self._cache.with_name(self._cache.name + ".part")
        part.write_text(json.dumps({"made_by": _made_by(), "runs": self._known}, indent=1), encoding="utf-8")
        part.replace(self._cache)


def _made_by() -> str:
    texts = b"".join(path.read_bytes() for path in sorted(FAMILIES.glob("*.py")))
    return f"torch {torch.__version__}, {hashlib.sha256(texts).hexdigest()[:12]}"


@contextlib.contextmanager
def _mapping(jobs: int) -> Iterator[Callable[..., Iterator[float]]]:
    if jobs <= 1:
        yield map
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started now
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield pool.imap


# ---------------------------------------------------------------- plans


def plan_bytes(parameters: Iterable[Parameter], settings: dict[str, Setting]) -> int:
    """Optimizer state of the trainable parameters under ``settings`` (by name)."""
    return sum(state_bytes(settings[p.name], p.shape, getattr(torch, p.dtype)) for p in parameters if p.trainable)


def plan_from(settings: dict[str, Setting], factors: dict[str, float] | None = None) -> Plan:
    """One rule for each parameter."""
    return Plan(
        rules=tuple(
            Rule(glob_escape(name), s.method, dict(s.options), lr_factor=(factors or {}).get(name, 1.0))
            for name, s in settings.items()
        )
    )


def at_random(scan: Scan, limit: int, *, ruled: bool, seed: int) -> tuple[dict[str, Setting], dict[str, float]] | None:
    """A random setting for every group, drawn again until all fit ``limit`` bytes; None if they never do.

    Without ``ruled``, hard rules but for what is no compression are set aside.
    """
    generator = random.Random(seed)
    allowed = () if ruled else tuple(name for name in BY_NAME if name not in ("tiny", "no-op"))
    groups = make_groups(scan.parameters, lambda p: candidate_settings(p, allowed))
    for attempt in range(_TRIES):
        picked = {}
        for group in groups:
            # First anything, later nothing but the smaller half: small budgets are met by few of all plans.
            options = sorted(group.settings, key=lambda s: state_bytes(s, group.shape))
            options = options if attempt < _TRIES // 3 else options[: max(1, len(options) // (2 + attempt % 5))]
            setting = generator.choice(options)
            picked.update({m.name: setting for m in group.members})
        if plan_bytes(scan.parameters, picked) <= limit:
            return picked, {name: default_lr_factor(s.method) for name, s in picked.items()}
    return None


def quantised_or_full(settings: dict[str, Setting]) -> bool:
    """Whether every parameter keeps both of AdamW's moments, in full or in eight bits."""
    return all(s.method == DENSE.method and "int4" not in codecs_of(s).values() for s in settings.values())
