"""Groups of integers with a scale and a zero point, as int8 weights are held: rounding to them, and back.

For why it is so, see :mod:`memadvise.optim.int8_weights`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_TOP, _KEEP = 255, 240
_TINY = torch.finfo(torch.bfloat16).tiny


def _pieces(length: int, group: int) -> Iterator[tuple[slice, slice, int]]:
    """(columns, groups, size) of the whole groups of a row, and of a shorter last one."""
    full = length // group
    if full:
        yield slice(0, full * group), slice(0, full), group
    if length % group:
        yield slice(full * group, length), slice(full, full + 1), length % group


def decode(codes: Tensor, scale: Tensor, zero: Tensor, group: int, out: Tensor) -> Tensor:
    """The weights of some rows into ``out``, [rows, length] of a float dtype; exact in float32."""
    out.copy_(codes)
    for columns, groups, size in _pieces(codes.shape[1], group):
        blocks = out[:, columns].unflatten(1, (-1, size))
        z, s = (t[:, groups, None].to(out.dtype) for t in (zero, scale))
        blocks.sub_(z).mul_(s)
    return out


def encode_(values: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, group: int, noise: Tensor | None) -> None:
    """Overwrite some rows by ``values`` (float, [rows, length]), with scales and zero points that fit them.

    With ``noise``, uniform in [0, 1) and of the same shape, codes are rounded up or down at random so that the weights
    are right on average; without, to the nearest.
    """
    for columns, groups, size in _pieces(codes.shape[1], group):
        x = values[:, columns].unflatten(1, (-1, size))
        low, high = x.amin(-1).clamp_(max=0), x.amax(-1).clamp_(min=0)
        s = _fitting_scale(low, high, scale[:, groups].to(x.dtype))
        z = (low / s).floor_().neg_()
        x = x / s[..., None]
        if noise is None:
            x.round_()
        else:  # by the remainder itself: adding noise before rounding down would move weights that lie on the grid
            down = x.floor()
            up = x.sub_(down).sub_(noise[:, columns].unflatten(1, (-1, size))).ceil_()  # 1 if noise is below, else 0
            x = down.add_(up)
        codes[:, columns].unflatten(1, (-1, size)).copy_(x.add_(z[..., None]).clamp_(0, _TOP))
        scale[:, groups], zero[:, groups] = s, z


def _fitting_scale(low: Tensor, high: Tensor, held: Tensor) -> Tensor:
    """The scale of groups from ``low`` <= 0 to ``high`` >= 0: the one held, if it still serves, else a fresh one."""
    steps = _TOP - 1.001  # a little below 254, for the rounding of this division
    wanted = (high / steps - low / steps).to(torch.float32).clamp_(min=_TINY)
    up = (wanted.view(torch.int32) + 0xFFFF).bitwise_and_(-0x10000).view(torch.float32)  # the next bfloat16 from above
    fresh = torch.where(wanted.isfinite(), up, wanted).to(low.dtype)
    levels = (high / held).ceil_() - (low / held).floor_()  # NaN for a scale of 0: not kept
    return torch.where((levels >= _KEEP) & (levels <= _TOP), held, fresh)
