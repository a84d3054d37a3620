"""Shadows: every candidate's real optimizer, run by the engine on the gradients of the probe, moving nothing.

A shadow has the state that its setting would have, from the first gradient on, and steps a stand-in of zeros with
learning rate 1 and no decay: what the stand-in moves by is the candidate's update. Methods whose updates do not follow
a first moment keep their stand-in through a window of steps, so that it holds the sum of them.

State started in mid-training lies (rows of rare tokens remember early large gradients); so shadows start with AdamW at
step 0, or from its live moments, compressed once (:mod:`memadvise.probe.warmstart`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memadvise.advise.candidates import tier
from memadvise.advise.rules import DENSE
from memadvise.ledger import FidelityValue, Parameter
from memadvise.optim import engine
from memadvise.optim.method import Hyper, compute_dtype
from memadvise.plan.schema import Setting
from memadvise.probe.fidelity import Scores, step_sums, window_sums
from memadvise.probe.sampling import Sample, draw, fitted_to, kept_shape, strides_of
from memadvise.probe.warmstart import warm_state

_EXECUTOR = "chunked"  # no temporary of the tensor's size, and nothing to compile for shapes that are seen here alone
_TRANSIENT = 10  # float32 tensors of the watched size that a comparison holds, once for all tensors

Moment = tuple[Tensor, Tensor, int]  # exp_avg, exp_avg_sq and step of the AdamW that trains


def watched(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """The candidates that need a shadow: all but AdamW itself, and rates that look at the weights (which stand in)."""
    return tuple(s for s in settings if s != DENSE and s.options.get("step_size", "lr") == "lr")


@dataclass(frozen=True)
class Need:
    """What the shadows of one tensor hold: ``held_bytes`` for the whole run, ``transient_bytes`` during a step."""

    held_bytes: int
    transient_bytes: int


def bytes_needed(parameter: Parameter, settings: Sequence[Setting]) -> Need:
    """Bytes of all shadows of a tensor, exactly, before any is made; temporaries as an upper bound."""
    dtype = compute_dtype(getattr(torch, parameter.dtype))
    strides = strides_of(parameter, settings)
    shape = kept_shape(parameter.shape, strides)
    like = torch.empty(shape, dtype=dtype, device="meta")
    held, scratch = 0, 0
    for setting in watched(settings):
        resolved = engine.resolve(parameter.name, like, fitted_to(setting, strides))
        held += resolved.recipe.state_bytes + (like.nbytes if tier(setting) == 2 else 0)
        scratch = max(scratch, engine.scratch_bytes(resolved, like, _EXECUTOR))
    held += like.nbytes if any(tier(s) == 2 for s in settings) else 0
    return Need(held, _TRANSIENT * like.nbytes + scratch)


class Shadow:
    """One candidate on one tensor.

    Args:
        name: of the parameter; random numbers depend on it.
        setting: the candidate, as it is called in the result.
        fitted: the same for the watched part of the tensor.
        like: that part's shape, dtype and device.
        moment: AdamW's live moments to start from, if there are some already.
        betas: with which they were averaged.

    Attributes:
        cold: it starts empty although there are live moments, since it keeps another quantity.
    """

    def __init__(
        self,
        name: str,
        setting: Setting,
        fitted: Setting,
        like: Tensor,
        moment: Moment | None,
        betas: tuple[float, float],
    ) -> None:
        self.setting, self.scores, self.cold = setting, Scores(), False
        self.resolved = engine.resolve(name, like, fitted)
        self.state = engine.new_state(self.resolved, like, _EXECUTOR)
        self.moved = torch.zeros_like(like) if tier(setting) == 2 else None
        if moment is not None:
            state = warm_state(self.resolved, like, moment, betas)
            self.cold = state is None
            self.state = self.state if state is None else state

    def step(self, g: Tensor, stand_in: Tensor, h: Hyper) -> None:
        """One step; the stand-in (its own, if it has one) moves by minus the update."""
        engine.run([(self.resolved, stand_in if self.moved is None else self.moved, g, self.state)], h, _EXECUTOR)

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return sum(t.nbytes for t in self.state.values()) + (0 if self.moved is None else self.moved.nbytes)


class TensorShadows:
    """All candidates on one tensor, and AdamW's own update as what they are compared with.

    Args:
        parameter: the tensor's record.
        settings: candidates.
        betas, eps: AdamW's, and those of every shadow, as in a plan.
        first: its first gradient, or its live second moment: the whole tensor, to tell which rows are heavy.
        seed: of the sample of a large tensor.
        moment: AdamW's live moments, whole, if the probe starts from a checkpoint.
    """

    def __init__(
        self,
        parameter: Parameter,
        settings: Sequence[Setting],
        betas: tuple[float, float],
        eps: float,
        first: Tensor,
        *,
        seed: int = 0,
        moment: Moment | None = None,
    ) -> None:
        self.parameter, self.betas, self.eps = parameter, betas, eps
        strides = strides_of(parameter, settings)
        self.sample: Sample = draw(parameter, strides, first, seed)
        self.whole = all(stride == 1 for stride in strides)
        like = torch.zeros(kept_shape(parameter.shape, strides), dtype=compute_dtype(first.dtype), device=first.device)
        if moment is not None:
            moment = (self.sample.take(moment[0]).to(like), self.sample.take(moment[1]).to(like), moment[2])
        self.shadows = [
            Shadow(parameter.name, setting, fitted_to(setting, strides), like, moment, betas)
            for setting in watched(settings)
        ]
        self._recorded: list[int] = []
        self._moved = torch.zeros_like(like) if any(s.moved is not None for s in self.shadows) else None

    @torch.no_grad()
    def step(self, gradient: Tensor, moment: Moment, step: int, *, record: bool, begin: bool, end: bool) -> None:
        """Step every shadow with the gradient of a step that AdamW has just made.

        Args:
            gradient: of the whole tensor.
            moment: AdamW's after the step.
            step: its number, for the record.
            record: compare the updates.
            begin: a window of displacements begins with this step.
            end: one ends with it.
        """
        take, weight = self.sample.take, self.sample.weight
        with torch.autocast(gradient.device.type, enabled=False):
            m, v, count = moment
            g = take(gradient.detach()).contiguous()
            g = g.to(compute_dtype(g.dtype))
            h = Hyper(1.0, *self.betas, self.eps, 0.0)
            u = root = None
            if record or self._moved is not None:
                root = (take(v).to(g.dtype) / (1 - self.betas[1] ** count)).sqrt_()
                u = (take(m).to(g.dtype) / (1 - self.betas[0] ** count)).div_(root + self.eps)
            if self._moved is not None and u is not None:
                if begin:
                    self._moved.zero_()
                self._moved.sub_(u)
            stand_in = torch.zeros_like(g)
            sums: list[Tensor] = []
            for shadow in self.shadows:
                if shadow.moved is not None and begin:
                    shadow.moved.zero_()
                if not record or u is None or root is None:
                    shadow.step(g, stand_in, h)
                    continue
                before = None if shadow.moved is None else shadow.moved.clone()
                shadow.step(g, stand_in.zero_(), h)
                update = -stand_in if before is None or shadow.moved is None else before.sub_(shadow.moved)
                sums.append(step_sums(u, update, root, weight))
            if sums:
                for shadow, values in zip(self.shadows, torch.stack(sums).tolist(), strict=True):
                    shadow.scores.steps.append((step, values))
            if record:
                self._recorded.append(step)
            if end and self._moved is not None and root is not None:
                moving = [s for s in self.shadows if s.moved is not None]
                found = [window_sums(self._moved, s.moved, root, weight) for s in moving if s.moved is not None]
                for shadow, values in zip(moving, torch.stack(found).tolist(), strict=True):
                    shadow.scores.windows.append(values)

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return sum(s.nbytes for s in self.shadows) + (0 if self._moved is None else self._moved.nbytes)

    def shed(self) -> None:
        """Free all state; what was recorded stays."""
        self._moved = None
        for shadow in self.shadows:
            shadow.state, shadow.moved = {}, None

    @property
    def num_recorded(self) -> int:
        return len(self._recorded)

    @property
    def sampled(self) -> int | None:
        """How many elements are watched; None for all of them."""
        if self.whole:
            return None
        kept = [len(i) if i is not None else n for i, n in zip(self.sample.index, self.parameter.shape, strict=True)]
        return math.prod(kept)

    def cold(self) -> list[str]:
        """The candidates that started empty although there were live moments."""
        return [s.setting.key for s in self.shadows if s.cold]

    def values(self, first_step: int = 0) -> tuple[FidelityValue, ...]:
        """What was measured so far, recorded steps from ``first_step`` on."""
        found = [shadow.scores.value(shadow.setting.key, first_step) for shadow in self.shadows]
        return tuple(value for value in found if value is not None)
