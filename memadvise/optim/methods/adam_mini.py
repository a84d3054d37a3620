"""Adam-mini (arXiv 2406.16793, Algorithm 1): one second moment a Hessian block.

::

    v_b <- b2 v_b + (1 - b2) mean(g_b^2)    for every block b; otherwise AdamW, v broadcast over its block

The paper's Principle 1: blocks are the smallest dense sub-blocks of the Hessian: one a head for query and key, one an
output neuron (row) for the other matrices, one a token for embeddings. The block comes from ``partition``, never from
the parameter's name:

* ``row``: one block an entry of the fan-out axis (``[out, in]``: a row; a convolution ``[out, in, *k]``: an output
  channel; an expert stack ``[E, out, in]``: a row of an expert; a vector: every coordinate, that is AdamW). A shape
  does not tell a 1-D convolution ``[out, in, k]`` from a stack: it gets the finer partition, one value a kernel;
* ``head``: ``heads`` equal groups of rows. Right also where head_dim is not dim / heads, and for grouped key heads;
* ``column``: averaged over the fan-out axis, the reverse of ``row`` for matrices (not in the paper);
* ``whole``: one value for the tensor, which the paper finds unstable at 1B parameters.

``segments`` describe a fused QKV along the fan-out axis: ``[[start, stop, heads], ...]``, 0 heads = by row.
``axis: 1`` says that the fan-out axis is the second (Hugging Face's transposed Conv1D ``[in, out]``).

State: 4 bytes a parameter for m, 4 a block, 4 for the step. Defaults: AdamW's (the official code's betas and eps;
its weight decay is 0 and off for names containing "ln", "norm" or "bias": make parameter groups instead).
Deviations from the official code: statistics in float32; vectors keep dense state when a whole model is set to
adam_mini (the code keeps one scalar for a norm); the partition is set, not guessed from names.

``compat: official`` does not decay vectors and scalars (which the code's names stand for), and ``heads`` are those of
the model: a block is dim / heads rows, dim the fan-in. That is one a head, of grouped keys too, where head_dim is
dim / heads, and another cut where it is not. Vectors of a model have one value a coordinate (the code's biases); for
its norms say ``partition: whole``, as for convolutions, which the code does not cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from memadvise.optim.method import OptionProblem, Options, Shape, is_int
from memadvise.optim.methods.blockmean import COMPAT_HELP, BlockMeanAdam, Blocks, check_compat

PARTITIONS = ("row", "column", "whole", "head")


@dataclass(frozen=True)
class AdamMiniOptions(Options):
    """See the module; ``heads`` belongs to ``partition: head``, ``segments`` replace a partition by row or head."""

    partition: str = "row"
    heads: int | None = None
    segments: tuple[tuple[int, int, int], ...] = ()
    axis: int = 0
    compat: str | None = None

    def __post_init__(self) -> None:
        check_compat(self.compat)
        if self.partition not in PARTITIONS:
            raise OptionProblem("partition", f"partition '{self.partition}' is none of {', '.join(PARTITIONS)}")
        if not is_int(self.axis) or self.axis not in (0, 1):
            raise OptionProblem("axis", f"axis should be 0 or 1, found {self.axis!r}", "1 is for a Conv1D [in, out]")
        if self.heads is not None and (not is_int(self.heads) or self.heads < 1):
            raise OptionProblem("heads", f"heads should be an integer of at least 1, found {self.heads!r}")
        segments: Any = self.segments
        if not isinstance(segments, list | tuple) or not all(_is_segment(s) for s in segments):
            raise OptionProblem(
                "segments",
                f"segments should be a list of [start, stop, heads], found {segments!r}",
                "for example: segments: [[0, 768, 12], [768, 1536, 12], [1536, 2304, 0]]",
            )
        if segments and self.partition not in ("row", "head"):
            raise OptionProblem("segments", f"segments do not go with partition: {self.partition}", "use row or head")
        if segments and self.heads is not None:
            raise OptionProblem("heads", "heads and segments exclude each other", "each segment names its own heads")
        if not segments and self.partition == "head" and self.heads is None:
            raise OptionProblem("partition", "partition: head needs the number of heads", "add for example heads: 12")
        if self.heads is not None and self.partition != "head":
            raise OptionProblem("heads", f"heads does not go with partition: {self.partition}", "use partition: head")
        if self.axis and self.partition == "whole":
            raise OptionProblem("axis", "axis would do nothing with partition: whole", "remove axis")
        expected = 0
        for start, stop, heads in segments:
            if start != expected or stop <= start:
                raise OptionProblem(
                    "segments",
                    f"segment [{start}, {stop}, {heads}] should start at {expected} and stop later",
                    "segments cover the fan-out axis in order, without gaps",
                )
            if heads and (stop - start) % heads:
                raise OptionProblem(
                    "segments", f"the rows of segment [{start}, {stop}, {heads}] do not divide in {heads} heads"
                )
            expected = stop
        if self.compat and (self.segments or self.axis or self.partition == "column"):
            given = "segments" if self.segments else "axis" if self.axis else "partition"
            raise OptionProblem(given, f"the official code has no such {given}", "leave compat out")
        object.__setattr__(self, "segments", tuple(tuple(segment) for segment in segments))


def _is_segment(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(is_int(v) and v >= 0 for v in value)


class AdamMini(BlockMeanAdam):
    """One second moment a block of a partition."""

    name = "adam_mini"
    summary = "one second moment a block of the Hessian: by head, row, column or whole"
    source = "arXiv 2406.16793"
    options_type = AdamMiniOptions
    options_help: ClassVar[dict[str, str]] = {
        "partition": "row, column, whole or head",
        "heads": "the number of heads, for partition: head",
        "segments": "for a fused QKV: [[start, stop, heads], ...] along the fan-out axis; 0 heads = by row",
        "axis": "the fan-out axis: 0, or 1 for a transposed Conv1D [in, out]",
        "compat": COMPAT_HELP,
    }
    bytes_help = "4 bytes a parameter, and 4 for each block"

    def check(self, shape: Shape, options: AdamMiniOptions) -> None:
        if options.partition == "whole" or (options.partition == "row" and not shape and not options.segments):
            return
        if options.axis >= max(len(shape), 1) or not shape:
            raise OptionProblem(
                "axis" if shape else "partition",
                f"partition: {options.partition} along axis {options.axis} does not fit the shape {list(shape)}",
                "use method: adamw for it",
            )
        if options.partition == "column" and len(shape) < 2:
            raise OptionProblem(
                "partition",
                f"partition: column would keep one value for a vector of shape {list(shape)}",
                "use method: adamw for it, or say partition: whole if that is meant",
            )
        if len(shape) == 3 and (options.axis or options.segments or options.heads) and options.partition != "column":
            # [E, out, in] or a 1-D convolution [out, in, k]: which axis holds the heads cannot be told from the shape.
            raise OptionProblem("partition", f"heads, segments and axis: 1 do not fit the 3-D shape {list(shape)}")
        if options.compat:
            self._check_official(shape, options)
            return
        size = shape[options.axis]
        if options.heads is not None and size % options.heads:
            raise OptionProblem("heads", f"the {size} rows of {list(shape)} do not divide in {options.heads} heads")
        if options.segments and options.segments[-1][1] != size:
            raise OptionProblem("segments", f"segments stop at {options.segments[-1][1]}, the fan-out axis at {size}")

    def _check_official(self, shape: Shape, options: AdamMiniOptions) -> None:
        if len(shape) > 2:
            raise OptionProblem(
                "compat", f"the official code does not cut the shape {list(shape)}", "use partition: whole for it"
            )
        if options.heads is None:
            return
        dim = shape[1] if len(shape) == 2 else 0
        if not dim or dim % options.heads or shape[0] % (dim // options.heads):
            raise OptionProblem(
                "heads",
                f"{list(shape)} does not divide in blocks of the official code, {dim} / {options.heads} rows each",
                "leave compat out: heads are then those of this tensor",
            )

    def decays(self, shape: Shape, options: AdamMiniOptions) -> str:
        return "never" if options.compat and len(shape) < 2 else "before"

    def for_vectors(self, options: dict[str, Any]) -> dict[str, Any] | None:
        return {"partition": "row", "compat": options["compat"]} if options.get("compat") else None

    def blocks(self, shape: Shape, options: AdamMiniOptions) -> Blocks:
        all_axes = tuple(range(len(shape)))
        if options.partition == "whole":
            return Blocks(all_axes)
        stack = len(shape) == 3  # [E, out, in]: the leading axis is kept, whatever is averaged
        if options.partition == "column":
            return Blocks((1 if stack else options.axis,))
        if stack:
            return Blocks((2,))
        axes = tuple(a for a in all_axes if a != options.axis)
        if options.segments:
            return Blocks(axes, options.axis, tuple((a, b, heads or b - a) for a, b, heads in options.segments))
        if options.heads is not None:
            rows = shape[options.axis]
            heads = rows * options.heads // shape[1] if options.compat else options.heads
            return Blocks(axes, options.axis, ((0, rows, heads),))
        return Blocks(axes)
