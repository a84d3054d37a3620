"""APOLLO-Mini (arXiv 2412.05270): Adam's step size, one a matrix, from a gradient projected to rank 1.

:mod:`APOLLO <.apollo>` with ``rank: 1, scaling: tensor, scale: 128``: with channels on the larger side (n) of a matrix
and a random vector P drawn anew every ``update_every`` steps::

    R = G P;  N = Adam's direction of R;  S = |N| / |R| G, its growth limited
    p <- p (1 - lr wd) - lr sqrt(scale) S

Note the square root: the factor is sqrt(128) = 11.3, "alpha = sqrt(128)" in the paper.

State: of a matrix, in float32, 8 n bytes, 4 for the step, and 8 for the limiter, as in APOLLO. Matrices with a side of
1 keep AdamW's state.

Defaults are the paper's: lr 0.01 (0.02 gives its best numbers), betas (0.9, 0.999), eps 1e-6, no weight decay. The size
of an update is about sqrt(scale / m) of Adam's, m the smaller side: 0.18 at 4096, but 2 at 32. A matrix much smaller
than 128 wants a smaller ``scale``, or AdamW.

Deviations from the official code, and ``compat: official``: APOLLO's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memadvise.optim.methods.apollo import SCALED_HELP, Apollo, ScaledOptions


@dataclass(frozen=True)
class ApolloMiniOptions(ScaledOptions):
    """Rank 1 and one factor a matrix."""

    scale: float = 128.0
    rank: ClassVar[int] = 1
    scaling: ClassVar[str] = "tensor"


class ApolloMini(Apollo):
    """APOLLO of rank 1 with one factor a matrix."""

    name = "apollo_mini"
    summary = "Adam's step size for each matrix, from a gradient projected to rank 1"
    options_type = ApolloMiniOptions
    options_help: ClassVar[dict[str, str]] = SCALED_HELP
    bytes_help = "0.004 bytes a parameter of a large matrix: 8 for each channel of the larger side"
