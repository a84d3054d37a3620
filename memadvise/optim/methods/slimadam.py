"""SlimAdam (arXiv 2503.01843): Adam whose second moment is averaged over chosen axes.

::

    v <- b2 v + (1 - b2) mean_K(g^2)        K = ``axes``, any non-empty subset of a tensor's axes

and otherwise AdamW, v broadcast over K. For a linear layer's ``[out, in]``, ``axes: [1]`` keeps one value an output
(its fan_in averaged), ``[0]`` one an input, ``[0, 1]`` one for the matrix; embeddings ``[vocab, d]`` want ``[1]``.

State: 4 bytes a parameter for m, 4 a kept entry of v, 4 for the step.
Defaults: AdamW's; the paper finds that the learning rate needs no change. Which axes a tensor tolerates is measured
(the SNR of v); there is no default that suits every tensor, ``[1]`` is the paper's choice for most of them.

Deviations from the official code: v in float32 (it is tiny; in bfloat16 it freezes), and weight decay on every
parameter of its group. ``compat: official`` decays tensors of two and more axes only, and takes ``axes: []`` (a full
second moment), which vectors and scalars get where one setting is given to a whole model. eps is outside the root,
after the bias correction, in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from memadvise.optim.method import OptionProblem, Options, Shape, is_int
from memadvise.optim.methods.blockmean import COMPAT_HELP, BlockMeanAdam, Blocks, check_compat


@dataclass(frozen=True)
class SlimAdamOptions(Options):
    """``axes``: the axes averaged in v; non-negative, without repeats. ``compat``: see the module."""

    axes: tuple[int, ...] = (1,)
    compat: str | None = None

    def __post_init__(self) -> None:
        check_compat(self.compat)
        axes: Any = self.axes
        if not isinstance(axes, list | tuple) or not all(is_int(a) for a in axes):
            raise OptionProblem("axes", f"axes should be a list of axis numbers, found {axes!r}", "such as axes: [1]")
        if not axes and not self.compat:
            raise OptionProblem("axes", "axes is empty: nothing would be averaged", "or use method: adamw")
        if axes and min(axes) < 0:
            raise OptionProblem("axes", f"axes {list(axes)} has a negative axis", "count axes from 0, the first")
        if len(set(axes)) != len(axes):
            raise OptionProblem("axes", f"axes {list(axes)} names an axis twice")
        object.__setattr__(self, "axes", tuple(sorted(axes)))


class SlimAdam(BlockMeanAdam):
    """The second moment averaged over ``axes``."""

    name = "slimadam"
    summary = "the second moment averaged over chosen axes"
    source = "arXiv 2503.01843"
    options_type = SlimAdamOptions
    options_help: ClassVar[dict[str, str]] = {
        "axes": "the axes averaged in the second moment, for example [1]; [0] keeps one value an input",
        "compat": COMPAT_HELP,
    }
    bytes_help = "4 bytes a parameter, and 4 for each kept entry of the second moment"

    def check(self, shape: Shape, options: SlimAdamOptions) -> None:
        if options.axes and options.axes[-1] >= len(shape):
            last = len(shape) - 1
            raise OptionProblem(
                "axes",
                f"axes {list(options.axes)} do not fit a tensor of shape {list(shape)}",
                f"its axes are 0 to {last}" if shape else "a scalar has no axis: use method: adamw",
            )

    def blocks(self, shape: Shape, options: SlimAdamOptions) -> Blocks:
        return Blocks(options.axes)

    def decays(self, shape: Shape, options: SlimAdamOptions) -> str:
        return "never" if options.compat and len(shape) < 2 else "before"

    def for_vectors(self, options: dict[str, Any]) -> dict[str, Any] | None:
        return {**options, "axes": []} if options.get("compat") else None
