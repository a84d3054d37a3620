"""MicroAdam (arXiv 2405.15593): Adam on a window of sparse gradients, with what they leave out fed back in 4 bits.

With d elements in blocks of ``block`` neighbours, K = ceil(density * size) of each, and E the error feedback::

    a <- g + E;  row t mod window of the ring <- the K largest |a| of each block;  a <- 0 there;  E <- Q4(a)
    M = (1 - b1) / (1 - b1^t) sum_r b1^r V_r      S = (1 - b2) / (1 - b2^t) sum_r b2^r V_r^2      r: a row's age
    u = M / (sqrt(S) + eps) + alpha Q4(a)         p <- p (1 - lr wd) - lr u        then E <- Q4((1 - alpha) Q4(a))

State: 4 * window * K_tot bytes for the ring (int16 indices within a block, bfloat16 values; 6 with ``values: fp32``),
ceil(d / 2) for E (two codes a byte, the even element in the high bits), 4 * ceil(d / bucket) for its buckets' bounds in
bfloat16, 4 for the step: 0.96 bytes a parameter with the defaults, 0.90 of them without the bounds, which is what the
paper counts. Vectors and scalars are compressed, too, as in the official code.

Defaults: window 10, density 0.01, betas (0.9, 0.999), no decay as published. ``block`` 16384, not what a GPU's shared
memory holds, so that results and checkpoints do not depend on the GPU. ``bucket`` 64: with the 100 000 of some
official scripts, 4 bits lose 17 % of a Gaussian residual at each step instead of 9 %. lr 1e-4: a coordinate that is
selected once moves by 20 lr over the next ten steps, whatever its gradient. ``alpha`` 0 is the sparse update meant for
fine-tuning: at most window * density of the coordinates move; the authors use 0 < alpha < 1 for pre-training.

``bias_correction``: "paper" divides by 1 - b^t although the window forgets, so that a coordinate that is always
selected ends up with 6.53 times Adam's update (b1 0.9, b2 0.999, window 10); "window" divides by 1 - b^min(t, window)
and makes it Adam's.

Deviations from the official code:

* Any device and dtype; arithmetic in float32. ``p.grad`` is not written to; each parameter counts its own steps.
* Zero is a code: a bucket's grid is shifted by up to half a step, so that a selected (zeroed) coordinate and a zero
  gradient decode to exactly 0 instead of up to half a step. A bucket whose values are all of one sign and not zero
  keeps the whole grid. Bounds are rounded outwards to bfloat16 and codes clamped, so no value is off by more than half
  a step; a bucket of equal bounds decodes to them.
* Where S underflows to 0 with ``eps`` 0, the update is 0 and not 0 / 0.
* ``alpha = -2``, an experiment of the official code with a dense buffer, is not offered.

NaN and inf pass through: they are the largest of their block and so selected first, and the weight of that coordinate
becomes NaN for good, as under torch's AdamW. If a block has more than K of them, the others are forgotten instead of
fed back, where they would spoil their bucket: a gradient that is all NaN makes K weights of each block NaN.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memadvise.optim.method import (
    STEP,
    Context,
    Method,
    OptionProblem,
    Options,
    Part,
    Runs,
    Shape,
    StateSpec,
    Tensors,
    Visit,
    device_type,
    is_int,
    is_number,
    read,
)

MAX_BLOCK = 2**15  # of which an int16 holds the indices
_VALUES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CORRECTIONS = ("paper", "window")
_LAST_CODE = 15  # 4 bits
_GROUP = 16


@dataclass(frozen=True)
class MicroAdamOptions(Options):
    """See the module; ``bucket`` is even, and it and ``block`` divide one another."""

    window: int = 10
    density: float = 0.01
    block: int = 16384
    bucket: int = 64
    bias_correction: str = "paper"
    alpha: float = 0.0
    values: str = "bf16"

    def __post_init__(self) -> None:
        if not is_int(self.window) or self.window < 1:
            raise OptionProblem("window", f"window should be a number of steps, at least 1, found {self.window!r}")
        if not is_number(self.density) or not 0 < self.density <= 1:
            raise OptionProblem("density", f"density should be above 0 and at most 1, found {self.density!r}")
        if not is_int(self.block) or not 1 <= self.block <= MAX_BLOCK:
            raise OptionProblem("block", f"block should be 1 to {MAX_BLOCK} elements, found {self.block!r}")
        if not is_int(self.bucket) or self.bucket < 2 or self.bucket % 2:
            raise OptionProblem("bucket", f"bucket should be an even number of elements, found {self.bucket!r}")
        if self.block % self.bucket and self.bucket % self.block:
            raise OptionProblem(
                "bucket",
                f"bucket {self.bucket} and block {self.block} do not divide one another",
                "choose a bucket that divides the block (64), or a multiple of it",
            )
        if self.bias_correction not in _CORRECTIONS:
            raise OptionProblem(
                "bias_correction",
                f"bias_correction should be one of {', '.join(_CORRECTIONS)}, found {self.bias_correction!r}",
            )
        if not is_number(self.alpha) or not 0 <= self.alpha < 1:
            raise OptionProblem("alpha", f"alpha should be at least 0 and below 1, found {self.alpha!r}")
        if self.values not in _VALUES:
            raise OptionProblem("values", f"values should be one of {', '.join(_VALUES)}, found {self.values!r}")


@lru_cache(maxsize=4096)
def selected(count: int, density: float) -> int:
    """ceil(count * density), of the decimal number that was written: 0.07 of 100 is 7."""
    return math.ceil(Fraction(str(density)) * count)


def selected_in_all(count: int, options: MicroAdamOptions) -> int:
    """How many of ``count`` elements are selected, block by block; the last may be shorter."""
    full, rest = divmod(count, options.block)
    return full * selected(options.block, options.density) + selected(rest, options.density)


# ---------------------------------------------------------------- 4-bit error feedback


def _rounded(x: Tensor, towards: float) -> Tensor:
    """``x`` in bfloat16, rounded towards minus or plus infinity. NaN stays NaN."""
    near = x.to(torch.bfloat16)
    back = near.to(x.dtype)
    beyond = back > x if towards < 0 else back < x
    return torch.where(beyond, torch.nextafter(near, torch.full_like(near, towards)), near)


def _grid(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """[buckets, 1] each: span (of 15 steps), number of the code for zero and value of code 0 without it.

    A code c means ``(c - zero) * span / 15 + base``. Where zero lies between the bounds, base is 0 and zero the nearest
    code, so the grid is shifted by at most half a step; else zero is 0 and base the lower bound.
    """
    low, high = low.to(dtype).unsqueeze(1), high.to(dtype).unsqueeze(1)
    span = high - low
    inside = (low <= 0) & (high >= 0)
    nearest = torch.floor(-_LAST_CODE * low / span + 0.5)
    zero = torch.where(inside & (span > 0), nearest, 0.0)
    return span, zero, torch.where(inside, 0.0, low)


def quantize(x: Tensor, bucket: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finite [n] in 4 bits: codes uint8 [ceil(n / 2)], and bfloat16 [ceil(n / bucket)] bounds below and above.

    Deterministic, halves up. What is decoded is off by at most half a step, a 30th of the bucket's span.
    """
    count = x.numel()
    buckets = -(-count // bucket)
    if missing := buckets * bucket - count:  # a copy of the last element changes no bound
        x = torch.cat([x, x[-1:].expand(missing)])
    rows = x.view(buckets, bucket)
    return _coded(rows, count, rows.amin(1), rows.amax(1))


def quantize_finite(x: Tensor, bucket: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quantize` of ``x``, in which 0 is written where it is not finite; on the CPU, in whole buckets only if
    there are no others.
    """
    count, (full, rest) = x.numel(), divmod(x.numel(), bucket)
    if not rest:
        rows = x.view(full, bucket)
        low, high = rows.amin(1), rows.amax(1)
        if read((high - low).sum(), 0.0) < math.inf:  # false for NaN
            return _coded(rows, count, low, high)
    return quantize(x.nan_to_num_(0.0, 0.0, 0.0), bucket)


def _coded(rows: Tensor, count: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = _rounded(low, -math.inf), _rounded(high, math.inf)
    span, zero, base = _grid(low, high, rows.dtype)
    step = torch.where(span > 0, span / _LAST_CODE, 1.0)  # 1: of a bucket with equal bounds
    scaled = rows.sub(base) if _matters(base) else rows
    scaled = (scaled / step).add_(zero + 0.5).clamp_(0, _LAST_CODE)  # to an integer is down, and so halves go up
    codes = scaled.view(-1)[: count + count % 2].to(torch.uint8)
    codes[count:] = 0
    if (
        device_type(codes) == "cpu" and sys.byteorder == "little" and not isinstance(codes, FakeTensor)
    ):  # two codes at once: the even one is the low byte
        pairs = codes.view(torch.int16)
        return (pairs << 4).bitwise_or_(pairs >> 8).to(torch.uint8), low, high
    return (codes[0::2] << 4).add_(codes[1::2]), low, high


def dequantize(codes: Tensor, low: Tensor, high: Tensor, count: int, bucket: int, dtype: torch.dtype) -> Tensor:
    """What :func:`quantize` held of ``count`` elements, [count] in ``dtype``."""
    flat = torch.empty(low.numel() * bucket, device=codes.device, dtype=dtype)
    end = 2 * codes.numel()
    if device_type(codes) == "cpu" and dtype == torch.float32 and not isinstance(codes, FakeTensor):
        # a byte is looked up, and gives both
        torch.index_select(_decoded(), 0, codes.to(torch.int32), out=flat[:end].view(torch.int64))
    else:
        flat[0:end:2] = codes >> 4
        flat[1:end:2] = codes & _LAST_CODE
    flat[end:] = 0
    span, zero, base = _grid(low, high, dtype)
    rows = flat.view(-1, bucket).sub_(zero).mul_(span / _LAST_CODE)
    if _matters(base):
        rows.add_(base)
    return flat[:count]


def _matters(base: Tensor) -> bool:
    """Whether any is not 0; on a GPU, where asking would wait for it, always."""
    return device_type(base) != "cpu" or read(base.count_nonzero(), 1.0) > 0


@lru_cache(maxsize=1)
def _decoded() -> Tensor:
    """For each byte its two codes as float32, in one int64."""
    codes = torch.arange(256, dtype=torch.uint8)
    return torch.stack([codes >> 4, codes & _LAST_CODE], 1).to(torch.float32).view(torch.int64).view(-1)


# ---------------------------------------------------------------- selection and the window


def select(a: Tensor, options: MicroAdamOptions) -> Tensor:
    """The places of the largest ``|a|`` in each block, relative to their block: int64, ascending in a block."""
    full, rest = divmod(a.numel(), options.block)
    end = full * options.block
    places = []
    if full:
        places.append(_largest(a[:end].view(full, options.block), options.density))
    if rest or not full:
        places.append(_largest(a[end:].view(1, rest), options.density))
    return places[0] if len(places) == 1 else torch.cat(places)


def _largest(blocks: Tensor, density: float) -> Tensor:
    count, size = selected(blocks.shape[1], density), blocks.shape[1]
    sizes = blocks.abs()
    if device_type(blocks) == "cpu" and 0 < 4 * count * _GROUP <= size and size % _GROUP == 0:
        # the ``count`` largest lie in the ``count`` groups with the largest member; a group is every so many-th element
        groups = sizes.view(-1, _GROUP, size // _GROUP)
        best = groups.amax(1).topk(min(count, size // _GROUP), dim=1, sorted=False).indices
        members = best.unsqueeze(1).expand(-1, _GROUP, -1)
        within = groups.gather(2, members).flatten(1).topk(count, dim=1, sorted=False).indices
        which = within.div(best.shape[1], rounding_mode="floor").mul_(size // _GROUP)
        places = which.add_(best.gather(1, within.remainder_(best.shape[1])))
    else:
        places = sizes.topk(count, dim=1, sorted=False).indices
    return places.sort(1).values.view(-1)


def starts(count: int, options: MicroAdamOptions, device: torch.device) -> Tensor:
    """Where the block of each selected element starts; int64, for ``count`` of them."""
    each = selected(options.block, options.density)
    return torch.arange(count, device=device).div_(each, rounding_mode="floor").mul_(options.block)


def window_step(indices: Tensor, values: Tensor, first: Tensor, like: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """Adam's update, without lr, from the ring ([window, K] each) alone: where it is not 0, and what it is there. A
    place that was selected several times comes as often, each time with the same update.

    Rows one after the other, as no element is twice in a row: the sums do not depend on the order in which a GPU adds.
    """
    m, s = torch.zeros_like(like), torch.zeros_like(like)
    return window_sums(indices, values, first, m, s, ctx)


def window_sums(
    indices: Tensor, values: Tensor, first: Tensor, m: Tensor, s: Tensor, ctx: Context
) -> tuple[Tensor, Tensor]:
    """:func:`window_step` with the sums in ``m`` and ``s``, which are 0 before it."""
    options, h, t = ctx.options, ctx.h, ctx.step
    seen = t if options.bias_correction == "paper" else min(t, options.window)
    count = min(t, options.window)
    ages = (t - 1 - torch.arange(count, device=m.device, dtype=torch.float64).unsqueeze(1)).remainder_(options.window)
    m_scale = torch.pow(h.beta1, ages).mul_((1 - h.beta1) / (1 - h.beta1**seen)).to(m.dtype)
    s_scale = torch.pow(h.beta2, ages).mul_((1 - h.beta2) / (1 - h.beta2**seen)).to(m.dtype)
    places, kept = first + indices[:count], values[:count].to(m.dtype)
    gradients, squares = kept * m_scale, kept.square().mul_(s_scale)
    if device_type(m) == "cpu":  # which adds in order
        m.index_add_(0, places.view(-1), gradients.view(-1))
        s.index_add_(0, places.view(-1), squares.view(-1))
    else:
        for row, gradient, square in zip(places.unbind(), gradients.unbind(), squares.unbind(), strict=True):
            m.index_add_(0, row, gradient)
            s.index_add_(0, row, square)
    places = places.view(-1)
    divisor = s.index_select(0, places).sqrt_().add_(h.eps)
    if not h.eps:
        divisor.masked_fill_(divisor == 0, 1.0)
    return places, m.index_select(0, places).div_(divisor)


class MicroAdam(Method):
    """Adam on a window of the largest gradients; the rest is fed back in 4 bits."""

    name = "micro_adam"
    summary = "Adam on the largest gradients of the last steps; the rest is fed back in 4 bits"
    source = "arXiv 2405.15593"
    options_type = MicroAdamOptions
    options_help: ClassVar[dict[str, str]] = {
        "window": "how many sparse gradients are kept",
        "density": "the share of each block that a gradient keeps",
        "block": f"elements in which the largest are sought, at most {MAX_BLOCK}",
        "bucket": "elements of the error feedback with bounds of their own; divides the block, or a multiple of it",
        "bias_correction": "paper: by the number of steps; window: by those in the window, as Adam would",
        "alpha": "share of the error feedback that is applied, too: 0 for fine-tuning, above for pre-training",
        "values": "how the kept gradients are held: bf16 or fp32",
    }
    bytes_help = "0.96 bytes a parameter: 4 * window * density, 1/2 for the feedback and 4 / bucket for its bounds"
    slow = True
    default_lr = 1e-4
    default_weight_decay = 0.0
    sharded = False  # blocks are cut from the flat tensor

    def check_composition(self, options: MicroAdamOptions, compose: Any) -> None:
        if compose.cautious in ("paper", "official"):
            raise OptionProblem(
                "cautious",
                f"cautious: {compose.cautious} is unsound with micro_adam: it averages over all coordinates, but few"
                " move, so that the others would scale the update up many times over",
                "use cautious: support, which averages over those that move",
            )

    def view(self, shape: Shape, options: MicroAdamOptions) -> Shape:
        return (math.prod(shape),)

    def spec(self, shape: Shape, options: MicroAdamOptions, dtype: torch.dtype) -> dict[str, StateSpec]:
        count = math.prod(shape)
        kept, buckets = selected_in_all(count, options), -(-count // options.bucket)
        ring = Runs(options.block, selected(options.block, options.density), axis=1)
        bounds = StateSpec((buckets,), torch.bfloat16, runs=Runs(options.bucket))
        return {
            "step": STEP,
            "indices": StateSpec((options.window, kept), torch.int16, runs=ring),
            "values": StateSpec((options.window, kept), _VALUES[options.values], runs=ring),
            "error": StateSpec((-(-count // 2),), torch.uint8, runs=Runs(2)),
            "low": bounds,
            "high": bounds,
        }

    def scratch_bytes(self, shape: Shape, options: MicroAdamOptions) -> int:
        count = math.prod(shape)
        ring = options.window * (26 + _VALUES[options.values].itemsize) + 80  # the ring, its places and sums
        return selected_in_all(count, options) * ring + 2 * count + 80 * (-(-count // options.bucket))

    def stats(self, part: Part, ctx: Context, round_: Any) -> Tensors:
        return {"g": part.g}

    def prepare(self, visit: Visit, state: Tensors, ctx: Context) -> tuple[Tensors, Tensors]:
        options, count = ctx.options, math.prod(ctx.shape)
        g = visit(0, {}, {})["g"]  # boxes are independent, so this is the whole of it
        bounds = state["low"], state["high"]
        a = dequantize(state["error"], *bounds, count, options.bucket, g.dtype).add_(g)
        places = select(a, options)
        first = starts(places.numel(), options, a.device)
        row = (ctx.step - 1) % options.window
        indices, values = state["indices"].clone(), state["values"].clone()
        indices[row] = places
        places += first
        values[row] = a[places]
        a.index_fill_(0, places, 0.0).nan_to_num_(0.0, 0.0, 0.0)
        del places
        codes, low, high = quantize(a, options.bucket)
        del a
        places, moves = window_step(indices, values, first, g, ctx)
        u = torch.zeros_like(g).scatter_(0, places, moves)
        del places, moves
        if options.alpha:
            rest = dequantize(codes, low, high, count, options.bucket, g.dtype)
            u.add_(rest, alpha=options.alpha)
            codes, low, high = quantize(rest.mul_(1 - options.alpha), options.bucket)
        new = {"indices": indices, "values": values, "error": codes, "low": low, "high": high}
        return {"u": u.mul_(ctx.h.lr)}, new

    def update(self, part: Part, ctx: Context) -> tuple[Tensor, Tensors]:
        return part.small["u"], {}
