"""Features of a projection through the operations that carry them: from the autograd graph's nodes to layouts.

Autograd speaks backwards: what it calls a node's input is the operation's output. Here an operation's inputs are what
it read, ``node.next_functions``, and its outputs are numbered as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memadvise.layout import Layout

# What divides by a norm reads every feature but carries none of them.
_REDUCTIONS = (
    "MeanBackward", "SumBackward", "VarBackward", "VarMeanBackward", "StdBackward", "LinalgVectorNormBackward",
    "NormBackward", "AmaxBackward", "MaxBackward",
)  # fmt: skip


@dataclass(frozen=True)
class Flow:
    """Features of one source in one tensor: as laid out, or (``rest``) somewhere in it."""

    layout: Layout | None
    rest: int = 0
    exact: bool = True

    @property
    def mask(self) -> int:
        return self.rest | (self.layout.mask if self.layout else 0)

    def opaque(self, exact: bool = True) -> Flow:
        return Flow(None, self.mask, self.exact and exact)


def metadata(node: Any) -> Any:
    """One record for each output of an operation."""
    return getattr(node, "_input_metadata", None) or ()


def shape_of(node: Any, number: int = 0) -> tuple[int, ...]:
    """The shape of output ``number`` of an operation, or of a leaf; ``()`` where autograd does not say."""
    if hasattr(node, "variable"):
        return tuple(node.variable.shape)
    outputs = metadata(node)
    return tuple(outputs[number].shape) if number < len(outputs) else ()


def saved(node: Any, name: str, default: int = 0) -> int:
    """An integer argument that the operation keeps; never a tensor, whose reading could recompute a checkpoint."""
    value = getattr(node, f"_saved_{name}", None)
    if value is None:
        return default
    return _signed(int(value))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value  # autograd shows negative dimensions as unsigned


def _dims(node: Any) -> list[int]:
    return [_signed(d) for d in node._saved_dims]


def _cut(node: Any, number: int) -> tuple[int, int, int, int]:
    """(axis, start, stop, step) of a split's output or a slice."""
    axis = saved(node, "dim")
    size = shape_of(*node.next_functions[0])[axis]
    if node.name() == "SliceBackward0":
        start, stop = saved(node, "start"), saved(node, "end", size)
        start, stop = (value + size if value < 0 else min(value, size) for value in (start, stop))
        return axis, start, stop, saved(node, "step", 1)
    before = sum(shape_of(node, earlier)[axis] for earlier in range(number))
    return axis, before, before + shape_of(node, number)[axis], 1


def through(node: Any, number: int, inputs: list[dict[Any, Flow]]) -> dict[Any, Flow]:
    """The flows of output ``number`` of an operation, from those of its inputs."""
    name, shape = node.name(), shape_of(node, number)
    if name.startswith(_REDUCTIONS) or 0 in shape:  # nothing is left of an empty slice
        return {}
    if name in ("CatBackward0", "StackBackward0"):
        return _concatenated(node, inputs)
    if len(inputs) == 1 or not any(inputs[1:]):
        return {source: moved(node, name, number, flow, shape) for source, flow in inputs[0].items()}
    joined: dict[Any, Flow] = {}
    for flows in inputs:
        for source, flow in flows.items():
            layout = flow.layout.expand(shape) if flow.layout else None
            flow = Flow(layout, flow.rest, flow.exact) if layout else flow.opaque()
            joined[source] = _union(joined[source], flow) if source in joined else flow
    return joined


def _union(one: Flow, other: Flow) -> Flow:
    layout = one.layout or other.layout
    known = layout.mask if layout else 0
    return Flow(layout, (one.mask | other.mask) & ~known, one.exact and other.exact)


def moved(node: Any, name: str, number: int, flow: Flow, shape: tuple[int, ...]) -> Flow:
    """A flow through an operation with one input."""
    cuts = name in ("SliceBackward0", "SelectBackward0", "UnbindBackward0", "IndexBackward0") or name.startswith(
        "Split"
    )
    if flow.layout is None or flow.rest:
        # Which part of the unknown is cut off is unknown too; everything else only rearranges it.
        return flow.opaque(exact=not cuts)
    layout: Layout | None = flow.layout
    assert layout is not None
    axis = saved(node, "dim") if hasattr(node, "_saved_dim") and not isinstance(node._saved_dim, tuple) else 0
    if name == "TransposeBackward0":
        layout = layout.transpose(saved(node, "dim0"), saved(node, "dim1"))
    elif name == "TBackward0":
        layout = layout.transpose(0, 1)
    elif name == "PermuteBackward0":
        layout = layout.permute(_dims(node))
    elif name == "SelectBackward0":
        layout = layout.select(axis, saved(node, "index"))
    elif name == "UnbindBackward0":
        layout = layout.select(axis, number)
    elif name.startswith("Split") or name == "SliceBackward0":
        axis, start, stop, step = _cut(node, number)
        layout = layout.narrow(axis, start, stop, step)
    elif name == "ExpandBackward0":
        layout = layout.expand(shape)
    elif layout.shape != shape:
        layout = layout.view(shape) if _is_view(name) else None
    if layout is not None and layout.shape != shape:
        layout = None
    return Flow(layout, 0, flow.exact) if layout is not None else flow.opaque(exact=not cuts)


def _is_view(name: str) -> bool:
    return name.startswith(("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze")) and "Complex" not in name


def _concatenated(node: Any, inputs: list[dict[Any, Flow]]) -> dict[Any, Flow]:
    axis, joined = saved(node, "dim"), {}
    for source in {source for flows in inputs for source in flows}:
        parts = [flows[source] for flows in inputs if source in flows]
        layout = parts[0].layout if len(parts) == len(inputs) and node.name() == "CatBackward0" else None
        for part in parts[1:]:
            layout = layout.followed_by(part.layout, axis) if layout and part.layout and not part.rest else None
        mask = 0
        for part in parts:
            mask |= part.mask
        known = layout.mask if layout else 0
        joined[source] = Flow(layout, mask & ~known, all(part.exact for part in parts))
    return joined
