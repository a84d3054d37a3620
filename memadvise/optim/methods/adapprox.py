"""Adapprox (arXiv 2403.14958): the second moment of a matrix as factors of adaptive rank, by S-RSI.

Per matrix G ``[M, N]``, with the factors Q ``[M, k]``, U ``[N, k]`` of the last step::

    V <- b2 max(Q U^T, 0) + (1 - b2) G^2        rebuilt box by box, never held
    Q, U <- AS-RSI(V)                           for the next step; see methods/srsi.py
    H <- G / (sqrt(V) + eps);  H <- H / max(1, RMS(H) / clip)
    M <- b1 M + (1 - b1) H                      an average of updates, not of gradients; none with momentum: false
    p <- p (1 - lr wd) - lr s M                 s = 1, or with guidance min(1 / (1 - cos(M before, H) + eps), 2)

Neither moment is bias-corrected: the first update is sign(G) / sqrt(1 - b2), and the clip (RMS at most ``clip``) is the
warm-up. ``|H| <= 1 / sqrt(1 - b2)`` always, since V holds this step's G^2 whole; so a low rank is safe.

The rank k is chosen at the first step and every ``adapt_every`` steps, from ``rank_init`` up, by ``increment`` columns
(f of the relative error: "logistic", "double", "one_shot", or a named function) until the relative error of Q U^T is
at most ``error_threshold`` or ``rank`` columns are reached. Those are reserved, so predicted bytes are real bytes.
``adapt_every: 0`` stays at ``rank``; ``stagger: true`` adapts parameters at different steps. Stacks of matrices
``[E, out, in]`` are factored one by one and share k; the filters of a convolution are the rows of one matrix.

``adam: true`` is Adam with this second moment: M averages G, both moments are bias-corrected, nothing is clipped. The
bound above is lost then, so Q U^T below ``floor`` (0.1) times its own rank-1 estimate (row means x column means / mean)
is raised to that: with a floor of 0, rows that rarely get a gradient diverge. At full rank it is AdamW.

``refresh_every: k`` makes the factors anew only every k steps: an average of every k-th G^2. At a step that is the j-th
since they were made (j = 1 to k) ``V = b2^j max(Q U^T, 0) + (1 - b2^j) G^2``, which is what they take up when j is k:
the weights of all that was seen add up to 1 - b2^t at every step t, as they do with k = 1, the paper's, and
``|H| <= 1 / sqrt(1 - b2^j)``. Each parameter has its own turn, by a hash of its name, so that no step pays for all; the
first step makes all factors. A day on which the rank would adapt waits for the next turn. Between turns a step takes
one pass over the gradient, and one more for the clip.

State: for ``[M, N]``, 4 M N bytes for M, none with ``momentum: false``; 4 k (M + N) for the factors, k = ``rank``;
4 for the step, 8 for the rank where it adapts. Vectors, and with ``store: auto`` matrices where factors do not pay
(k (M + N) >= M N, or a side below 2 ``rank_min``), hold v in full: 4 bytes an element in place of the factors.
Defaults: lr 3e-4, betas (0.9, 0.999), eps 1e-8, weight decay 0.1, clip 1, rank a quarter of the smaller side, 5 power
iterations, error 0.01 every 10 steps: as far as known the paper's; rank and ``rank_min`` reproduce its memory table.

A gradient with NaN or inf makes NaN of the weights (and M) it meets, as in torch.optim; the factors of its matrix are
not replaced in that step, and the clip ignores those entries, so no other entry is touched.

Deviations: the paper's code is not public, its cosine guidance unbounded (infinite at the first step); ours compares H
with M before H enters it, and is at most ``guidance_max``. Oversampling is without effect on the paper's cut and only
used with ``truncation: svd``. ``warm_start`` (off) begins from the last U, and needs fewer iterations: ranks 4, 16, 48
of a 256x192 stream were 0.1, 0.1, 0.4 % worse than the best with 5 from random starts, 0.1, 0.4, 0.7 % with 2 warm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memadvise.optim.method import (
    STEP,
    Context,
    Hyper,
    OptionProblem,
    Options,
    Part,
    Round,
    Shape,
    StateSpec,
    Tensors,
    Visit,
    is_int,
    is_number,
)
from memadvise.optim.methods.blockmean import adam_scalars
from memadvise.optim.methods.factored import as_matrices
from memadvise.optim.methods.srsi import INCREMENTS, Growth, Ranks, check_increment
from memadvise.optim.methods.stored import (
    StoredMethod,
    check_rank,
    check_rank_fits,
    is_matrix,
    resolve_rank,
)
from memadvise.optim.methods.stores import DenseStore, LowRankStore, Mix, Store

_CHOICES = {"store": ("auto", "lowrank", "dense"), "truncation": ("columns", "svd")}
_FLAGS = ("stagger", "warm_start", "guidance", "momentum", "adam")
_COUNTS = {"rank_min": 1, "power_iterations": 1, "oversampling": 0, "adapt_every": 0, "refresh_every": 1}
_NUMBERS = ("error_threshold", "clip", "guidance_max", "floor")


@dataclass(frozen=True)
class AdapproxOptions(Options):
    """See the module; ``rank`` may be a share of the smaller side or "full", ``clip: 0`` does not clip."""

    rank: int | float | str | None = None
    rank_init: int | None = None
    rank_min: int = 1
    error_threshold: float = 0.01
    adapt_every: int = 10
    refresh_every: int = 1
    stagger: bool = False
    increment: Any = "logistic"
    power_iterations: int = 5
    oversampling: int = 5
    truncation: str = "columns"
    warm_start: bool = False
    clip: float = 1.0
    guidance: bool = False
    guidance_max: float = 2.0
    momentum: bool = True
    adam: bool = False
    floor: float = 0.1
    store: str = "auto"

    def __post_init__(self) -> None:
        check_rank(self.rank)
        for option, names in _CHOICES.items():
            if getattr(self, option) not in names:
                raise OptionProblem(option, f"{option} '{getattr(self, option)}' is none of {', '.join(names)}")
        for option in _FLAGS:
            if not isinstance(getattr(self, option), bool):
                raise OptionProblem(option, f"{option} should be true or false, found {getattr(self, option)!r}")
        for option, least in _COUNTS.items():
            value = getattr(self, option)
            if not is_int(value) or value < least:
                raise OptionProblem(option, f"{option} should be an integer of at least {least}, found {value!r}")
        for option in _NUMBERS:
            value = getattr(self, option)
            if not is_number(value) or value < 0:
                raise OptionProblem(option, f"{option} should be a number of at least 0, found {value!r}")
        self._check_ranks()
        increment = check_increment(self.increment)
        if increment is None:
            text = f"increment should be one of {', '.join(INCREMENTS)} or a function, found {self.increment!r}"
            raise OptionProblem("increment", text)
        object.__setattr__(self, "increment", increment)
        if self.guidance and (self.adam or not self.momentum):
            why = "adam: true averages gradients" if self.adam else "momentum: false keeps none"
            raise OptionProblem("guidance", f"guidance compares updates with their average, and {why}")
        if self.adam and self.clip not in (0, AdapproxOptions.clip):
            raise OptionProblem("clip", "clip would do nothing: adam: true does not clip", "remove one of them")
        for option, wanted, where in (
            ("oversampling", self.truncation != "svd", "truncation: columns drops what it adds"),
            ("guidance_max", not self.guidance, "it bounds guidance: true"),
            ("floor", not self.adam, "it is for adam: true"),
        ):
            if wanted and getattr(self, option) != getattr(AdapproxOptions, option):
                raise OptionProblem(option, f"{option} would do nothing: {where}", f"leave {option} out")

    def _check_ranks(self) -> None:
        first = self.rank_min if self.rank_init is None else self.rank_init
        if not is_int(first) or first < self.rank_min:
            raise OptionProblem(
                "rank_init", f"rank_init should be an integer of at least rank_min, {self.rank_min}, found {first!r}"
            )
        if isinstance(self.rank, int) and first > self.rank:
            option = "rank_min" if self.rank_init is None else "rank_init"
            raise OptionProblem(option, f"{option} {first} is above rank {self.rank}, the largest rank")

    def ranks(self, shape: Shape) -> Ranks:
        """The factors of matrices of ``shape``: ``rank_min`` and ``rank_init`` at most their rank."""
        rank = resolve_rank(self.rank, shape)
        least = min(self.rank_min, rank)
        return Ranks(
            rank=rank,
            init=min(least if self.rank_init is None else self.rank_init, rank),
            minimum=least,
            iterations=self.power_iterations,
            oversampling=self.oversampling,
            truncation=self.truncation,
            warm=self.warm_start,
            every=self.adapt_every,
            refresh=self.refresh_every,
            stagger=self.stagger,
            threshold=self.error_threshold,
            increment=self.increment if isinstance(self.increment, Growth) else str(self.increment),
        )


class Adapprox(StoredMethod):
    """Factors of adaptive rank in place of the second moment."""

    name = "adapprox"
    summary = "the second moment of matrices as factors of adaptive rank"
    source = "arXiv 2403.14958"
    options_type = AdapproxOptions
    options_help: ClassVar[dict[str, str]] = {
        "rank": "columns reserved, the largest rank, or their share of the smaller side, or full; 0.25 unless given",
        "rank_init": "the rank an adaptation starts from, rank_min unless given",
        "rank_min": "the smallest rank",
        "error_threshold": "the relative error of the factors that ends an adaptation",
        "adapt_every": "steps between adaptations of the rank, 0: it stays at rank",
        "refresh_every": "steps between two factorisations: 4 halves the time of a step",
        "stagger": "true: parameters adapt at different steps",
        "increment": "columns to add, by the error: logistic, double, one_shot (one call, then cut) or a function",
        "power_iterations": "of S-RSI; with warm_start 2 do as well as 5",
        "oversampling": "columns beside the rank, used with truncation: svd",
        "truncation": "columns (the paper's), or svd: the best columns of what was found",
        "warm_start": "true: start from the last factors",
        "clip": "the largest root mean square of an update, 0: any",
        "guidance": "true: scale the average by how it agrees with the update",
        "guidance_max": "the largest such scale",
        "momentum": "false: no first moment",
        "adam": "true: average gradients and correct the bias, as Adam",
        "floor": "adam: true: the share of the rank-1 estimate that the factors must not fall below",
        "store": "auto: factors where they pay; lowrank: for every matrix; dense: nowhere",
    }
    bytes_help = "6 bytes a parameter (4 M N + 4 rank (M + N)); 2 with momentum: false"
    slow = True
    default_lr = 3e-4
    default_weight_decay = 0.1

    def mix(self, h: Hyper) -> Mix:
        return Mix(h.beta2, 1 - h.beta2)

    def mix_of(self, ctx: Context) -> Mix:
        store = self.store(ctx.shape, ctx.options) if ctx.options.refresh_every > 1 else None
        if not isinstance(store, LowRankStore):
            return self.mix(ctx.h)
        decay = ctx.h.beta2 ** store.ranks.since(ctx.step, ctx.key_for("refresh"))
        return Mix(decay, 1 - decay)

    def store(self, shape: Shape, options: AdapproxOptions) -> Store:
        if not is_matrix(shape) or options.store == "dense":
            return DenseStore(shape)
        ranks, (rows, columns) = options.ranks(shape), shape[-2:]
        pays = ranks.rank * (rows + columns) < rows * columns and min(rows, columns) >= 2 * options.rank_min
        if options.store == "auto" and not pays:
            return DenseStore(shape)
        return LowRankStore(shape, ranks, options.floor if options.adam else 0.0)

    def check(self, shape: Shape, options: AdapproxOptions) -> None:
        check_rank_fits(options.rank, as_matrices(shape))

    def view(self, shape: Shape, options: AdapproxOptions) -> Shape:
        return as_matrices(shape)

    def spec(self, shape: Shape, options: AdapproxOptions, dtype: torch.dtype) -> dict[str, StateSpec]:
        first = StateSpec(shape, dtype, elementwise=True, moment="first")
        return {
            "step": STEP,
            **({"exp_avg": first} if options.momentum else {}),
            **self.store(shape, options).spec(dtype),
        }

    def scalars(self, step: Tensor, h: Hyper, options: Any) -> Tensors:
        return adam_scalars(step, h)

    def traceable(self, shape: Shape, options: AdapproxOptions) -> bool:
        return False

    def reduced_axes(self, shape: Shape, options: AdapproxOptions) -> tuple[int, ...] | None:
        dense = len(shape) < 2 or options.store == "dense"  # of a box as of the whole, unlike "auto"
        return () if dense and not self._measures(options) else None

    @staticmethod
    def _measures(options: AdapproxOptions) -> bool:
        """Whether the update depends on sums over the whole matrix."""
        return not options.adam and (options.clip > 0 or options.guidance)

    def prepare(self, visit: Visit, state: Tensors, ctx: Context) -> tuple[Tensors, Tensors]:
        small, new = super().prepare(visit, state, ctx)
        options, h = ctx.options, ctx.h
        if not self._measures(options):
            return small, new
        one = (*ctx.shape[:-2], *[1] * len(ctx.shape[-2:]))  # for each matrix of a stack
        names = ("square", "dot", "average") if options.guidance else ("square",)
        sums = visit("measure", small, dict.fromkeys(names, one))
        if options.clip:
            rms = (sums["square"] / max(math.prod(ctx.shape[-2:]), 1)).sqrt()
            small["clip"] = 1 / (rms / options.clip).clamp(min=1.0)
        if options.guidance:
            norms = (sums["square"] * sums["average"]).sqrt()
            cosine = torch.where(norms > 0, sums["dot"] / norms, 0.0).clamp(max=1.0)
            small["guide"] = (1 / (1 - cosine + h.eps)).clamp(max=options.guidance_max)
        return small, new

    def stats(self, part: Part, ctx: Context, round_: Round) -> Tensors:
        if round_ != "measure":
            return super().stats(part, ctx, round_)
        ratio = self._ratio(part, ctx)[0].nan_to_num_(0.0, 0.0, 0.0)
        axes = tuple(range(-min(ratio.ndim, 2), 0))
        sums = {"square": (ratio * ratio).sum(axes, keepdim=True)}
        if ctx.options.guidance:
            m = part.state["exp_avg"]
            sums["dot"] = ratio.mul_(m).nan_to_num_(0.0, 0.0, 0.0).sum(axes, keepdim=True)
            sums["average"] = (m * m).nan_to_num_(0.0, 0.0, 0.0).sum(axes, keepdim=True)
        return sums

    def _ratio(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        """``G / (sqrt(V) + eps)``, and the new element-wise second moment."""
        v, new = self.second(part, ctx)
        return part.g / v.sqrt().add_(ctx.h.eps), new

    def update(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        options, h, small = ctx.options, ctx.h, part.small
        if options.adam:
            v, new = self.second(part, ctx)
            m = part.g
            if options.momentum:
                m = new["exp_avg"] = torch.lerp(part.state["exp_avg"], part.g, 1 - h.beta1)
            size = small["step_size"] if options.momentum else h.lr
            return m / v.sqrt().div_(small["bias2_sqrt"]).add_(h.eps) * size, new
        u, new = self._ratio(part, ctx)
        if "clip" in small:
            u.mul_(small["clip"])
        if options.momentum:
            u = new["exp_avg"] = torch.lerp(part.state["exp_avg"], u, 1 - h.beta1)
        return u * (h.lr * small["guide"] if "guide" in small else h.lr), new

    def momentum(self, options: AdapproxOptions) -> bool:
        return options.momentum
