"""What each weight is used for, read off the autograd graph of one forward pass.

Nothing here looks at names or values: only at which operation feeds which, and at shapes. So it works the same for
real tensors and for fake ones, and for every library. Roles are given where the graph proves them:

* attention: the projection that alone feeds the query, key or value of an attention (a fused kernel, or
  matmul - softmax - matmul), and the one fed by its result;
* MLP: the projection that reads an activation's result and writes to a residual sum is ``mlp_down``; what feeds it is
  ``mlp_up``, or ``mlp_gate`` (through the activation) and ``mlp_up`` (around it);
* head: the projection nearest to the loss that no other projection reads from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from memadvise.flows import Flow, metadata, moved, shape_of, through
from memadvise.layout import Layout, runs
from memadvise.ledger import Segment

if TYPE_CHECKING:
    import torch

_MATMUL_OPERANDS = {"MmBackward0": (0, 1), "AddmmBackward0": (1, 2), "BmmBackward0": (0, 1), "BaddbmmBackward0": (1, 2)}
_CONVOLUTIONS = ("ConvolutionBackward0", "ConvolutionOverrideableBackward0", "MkldnnConvolutionBackward0")
_EMBEDDINGS = ("EmbeddingBackward0", "EmbeddingBagBackward0")
_SOFTMAX = ("SoftmaxBackward0", "SafeSoftmaxBackward0")
_FUSED_ATTENTION = "ScaledDotProduct"  # the start of the names of all of torch's kernels
_SUMS = ("AddBackward0", "SubBackward0", "IndexAddBackward0", "AddcmulBackward0")
_ACTIVATIONS = (
    "GeluBackward0", "ReluBackward0", "SiluBackward0", "SigmoidBackward0", "TanhBackward0", "LeakyReluBackward0",
    "EluBackward0", "CeluBackward0", "HardtanhBackward0", "HardswishBackward0", "HardsigmoidBackward0", "MishBackward0",
    "SoftplusBackward0", "PreluKernelBackward0", "ThresholdBackward0", "GluBackward0", "ErfBackward0",
    "LogSigmoidBackward0",
)  # fmt: skip
_WEIGHT_VIEWS = (
    "TBackward0", "TransposeBackward0", "PermuteBackward0", "ToCopyBackward0", "CloneBackward0", "AliasBackward0",
    "UnsqueezeBackward0", "ExpandBackward0", "ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0",
    "SplitBackward0", "SplitWithSizesBackward0", "SliceBackward0", "SqueezeBackward0", "SqueezeBackward1",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What one weight is: its role and the axes of its shape; no axes where it is used both ways round."""

    role: str
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()
    heads: int | None = None
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class _Weight:
    """The leaf behind a matmul's operand: rows ``start:start + rows`` of its axis ``fan_out``."""

    leaf: torch.Tensor
    fan_in: int
    fan_out: int
    start: int
    rows: int


@dataclass(frozen=True)
class _Matmul:
    weight: _Weight | None  # None for activations and frozen weights
    data: int  # which of next_functions is the activation
    axis: int = -1  # where the features are in the result


@dataclass(frozen=True)
class _Attention:
    inputs: tuple[tuple[str, Any, int, int], ...]  # role, node, output number, head_dim
    value_dim: int


@dataclass(frozen=True)
class _Claim:
    role: str
    mask: int  # rows of the weight
    head_dim: int
    exact: bool
    by_head: bool  # heads are consecutive rows


@dataclass(frozen=True)
class _Sources:
    """The matmuls, attentions and convolutions that a tensor comes from directly, and whether through an activation.

    ``residual``: through a sum of things from different sources, so that "directly" says little.
    """

    through: frozenset[tuple[Any, bool]] = frozenset()
    residual: bool = False

    @property
    def nodes(self) -> frozenset[Any]:
        return frozenset(node for node, _ in self.through)


def find_roles(loss: torch.Tensor) -> dict[int, Finding]:
    """The findings of the graph behind ``loss``, by ``id()`` of the leaf tensor."""
    return _Graph(loss).findings() if loss.grad_fn is not None else {}


class _Graph:
    def __init__(self, loss: torch.Tensor) -> None:
        self.order = _producers_first(loss.grad_fn)
        self.position = {node: number for number, node in enumerate(self.order)}
        self.matmuls: dict[Any, _Matmul] = {}
        for node in self.order:
            matmul = _matmul(node)
            if matmul is not None:
                self.matmuls[node] = matmul
        self.attentions: dict[Any, _Attention] = {}
        for node in self.order:
            attention = self._attention(node)
            if attention is not None:
                self.attentions[node] = attention
        self.writers: dict[Any, set[Any]] = defaultdict(set)
        self.sources = self._all_sources()

    # ------------------------------------------------------------ what things are

    def _attention(self, node: Any) -> _Attention | None:
        inputs = node.next_functions
        if node.name().startswith(_FUSED_ATTENTION) and len(inputs) >= 3:
            query, key, value = inputs[:3]
        else:
            matmul = self.matmuls.get(node)
            if matmul is None or matmul.weight is not None or node.name() not in _MATMUL_OPERANDS:
                return None
            first, second = _MATMUL_OPERANDS[node.name()]
            softmax = self._nearest(inputs[first][0], _SOFTMAX)
            if softmax is None:
                return None
            scores = self._nearest(softmax.next_functions[0][0], tuple(_MATMUL_OPERANDS))
            if scores is None or self.matmuls[scores].weight is not None:
                return None
            left, right = _MATMUL_OPERANDS[scores.name()]
            query, key, value = scores.next_functions[left], scores.next_functions[right], inputs[second]
        if any(entry[0] is None for entry in (query, key, value)):
            return None
        head_dim, value_dim = shape_of(*query)[-1], shape_of(*value)[-1]
        return _Attention(
            (
                ("attention_query", *query, head_dim),
                ("attention_key", *key, head_dim),
                ("attention_value", *value, value_dim),
            ),
            value_dim,
        )

    def _nearest(self, node: Any, names: tuple[str, ...]) -> Any:
        """The one node of these names above ``node`` before any other matmul; None if there is none or several."""
        found, seen, waiting = [], set(), [node]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name() in names:
                found.append(node)
            elif node not in self.matmuls and not node.name().startswith(_FUSED_ATTENTION):
                waiting.extend(entry[0] for entry in node.next_functions)
        return found[0] if len(found) == 1 else None

    def _all_sources(self) -> dict[Any, _Sources | None]:
        """For every node; None for what depends on parameters only. Fills ``writers``: who adds to a residual."""
        sources: dict[Any, _Sources | None] = {}
        for node in self.order:
            name = node.name()
            if hasattr(node, "variable"):
                sources[node] = None
            elif node in self.matmuls or node in self.attentions or name in _CONVOLUTIONS:
                sources[node] = _Sources(frozenset([(node, False)]))
            elif name in _EMBEDDINGS:
                sources[node] = _Sources()
            else:
                inputs = [s for entry in node.next_functions if (s := sources.get(entry[0])) is not None]
                sources[node] = self._joined(node, name, inputs) if inputs else None
        return sources

    def _joined(self, node: Any, name: str, inputs: list[_Sources]) -> _Sources:
        through = frozenset().union(*(s.through for s in inputs))
        residual = any(s.residual for s in inputs)
        # Sums of scalars are those of losses.
        if name in _SUMS and len({s.nodes for s in inputs}) > 1 and len(shape_of(node)) > 1:
            residual = True
            for branch in inputs:
                if not branch.residual:
                    for source, activated in branch.through:
                        if not activated:
                            self.writers[source].add(node)
        if name in _ACTIVATIONS:
            through = frozenset((source, True) for source, _ in through)
        return _Sources(through, residual)

    # ------------------------------------------------------------ who uses what

    def findings(self) -> dict[int, Finding]:
        claims: dict[int, list[_Claim]] = defaultdict(list)
        roles: dict[int, set[tuple[str, int | None]]] = defaultdict(set)
        uses: dict[int, list[_Weight]] = defaultdict(list)
        for matmul in self.matmuls.values():
            if matmul.weight is not None:
                uses[id(matmul.weight.leaf)].append(matmul.weight)
        for node in self.attentions:
            for leaf, claim in self._attention_claims(node):
                claims[leaf].append(claim)
        for node, role, heads in [*self._outputs(), *self._mlps(), *self._heads()]:
            weight = self.matmuls[node].weight
            if weight is not None:
                roles[id(weight.leaf)].add((role, heads))

        found: dict[int, Finding] = {}
        for leaf, weights in uses.items():
            if len({(w.fan_in, w.fan_out) for w in weights}) > 1:
                found[leaf] = Finding("linear")  # used both ways round, as in a tied autoencoder
                continue
            first = weights[0]
            finding = Finding("linear", (first.fan_in,), (first.fan_out,))
            rows = first.leaf.shape[first.fan_out]
            if claims[leaf] and not roles[leaf]:
                finding = _attention_finding(finding, claims[leaf], rows)
            elif len(roles[leaf]) == 1 and not claims[leaf]:
                ((role, heads),) = roles[leaf]
                finding = replace(finding, role=role, heads=heads)
            found[leaf] = finding
        for node in self.order:
            found.update(self._looked_up(node, uses))
            found.update(self._first_convolution(node))
            found.update(self._position_table(node, found))
        return found

    def _looked_up(self, node: Any, uses: Mapping[int, list[_Weight]]) -> dict[int, Finding]:
        """A table ``[entries, width]``, and whether it is multiplied with activations too."""
        leaf = _leaf(node.next_functions[0][0]) if node.name() in _EMBEDDINGS else None
        if leaf is None:
            return {}
        return {id(leaf): Finding("tied_embedding" if uses.get(id(leaf)) else "token_embedding", (1,), (0,))}

    def _attention_claims(self, node: Any) -> Iterable[tuple[int, _Claim]]:
        for role, producer, number, head_dim in self.attentions[node].inputs:
            flows = self._flows(producer, number)
            if len(flows) != 1:
                continue
            ((source, flow),) = flows.items()
            weight = self.matmuls[source].weight if source in self.matmuls else None
            if weight is None:
                continue
            layout = flow.layout
            by_head = layout is None or ((head_dim, 1),) in layout.dims or head_dim == 1
            yield id(weight.leaf), _Claim(role, flow.mask << weight.start, head_dim, flow.exact, by_head)

    def _outputs(self) -> Iterable[tuple[Any, str, int | None]]:
        for node, matmul in self.matmuls.items():
            feeding = self._feeding(node)
            attentions = [source for source in feeding.nodes if source in self.attentions]
            if matmul.weight is not None and len(attentions) == 1 and not feeding.residual:
                columns, value_dim = (
                    matmul.weight.leaf.shape[matmul.weight.fan_in],
                    self.attentions[attentions[0]].value_dim,
                )
                yield node, "attention_output", columns // value_dim if columns % value_dim == 0 else None

    def _mlps(self) -> Iterable[tuple[Any, str, int | None]]:
        for node, matmul in self.matmuls.items():
            feeding = self._feeding(node)
            if matmul.weight is None or feeding.residual or node not in self.writers:
                continue
            through_activation = {source for source, activated in feeding.through if activated}
            around = feeding.nodes - through_activation
            known = all(source in self.matmuls and self.matmuls[source].weight is not None for source in feeding.nodes)
            if not known or len(through_activation) != 1 or len(around) > 1:
                continue
            yield node, "mlp_down", None
            yield from ((source, "mlp_gate" if around else "mlp_up", None) for source in through_activation)
            yield from ((source, "mlp_up", None) for source in around)

    def _heads(self) -> Iterable[tuple[Any, str, int | None]]:
        read = frozenset().union(*(self._feeding(node).nodes for node in self.matmuls))
        for attention in self.attentions.values():
            for _, producer, _, _ in attention.inputs:
                read |= (self.sources.get(producer) or _Sources()).nodes
        last = self.sources[self.order[-1]] or _Sources()
        for node in last.nodes - read:
            if node in self.matmuls and node not in self.writers:
                yield node, "head", None

    def _feeding(self, node: Any) -> _Sources:
        matmul = self.matmuls[node]
        return self.sources.get(node.next_functions[matmul.data][0]) or _Sources()

    def _first_convolution(self, node: Any) -> dict[int, Finding]:
        """A convolution of something that needs no gradient: the images themselves."""
        if node.name() not in _CONVOLUTIONS or node.next_functions[0][0] is not None:
            return {}
        weight = _leaf(node.next_functions[1][0])
        return {} if weight is None else {id(weight): Finding("patch_embedding")}

    def _position_table(self, node: Any, found: dict[int, Finding]) -> dict[int, Finding]:
        """A leaf ``[..., positions, width]`` added, as it is or cut, to something of the same width."""
        if node.name() != "AddBackward0" or len(node.next_functions) != 2:
            return {}
        for table, data in (node.next_functions, node.next_functions[::-1]):
            leaf = _leaf(
                table[0], through=("SliceBackward0", "UnsqueezeBackward0", "ExpandBackward0", "ToCopyBackward0")
            )
            sources = self.sources.get(data[0])
            if leaf is None or sources is None or leaf.ndim < 2 or id(leaf) in found:
                continue
            width = shape_of(*data)[-1:]
            if sum(size > 1 for size in leaf.shape) == 2 and leaf.shape[-1:] == width and leaf.shape[-2] > 1:
                axes = (leaf.ndim - 1,), (leaf.ndim - 2,)
                if not any(source in self.matmuls and not self.matmuls[source].weight for source in sources.nodes):
                    return {id(leaf): Finding("position_embedding", *axes)}
        return {}

    # ------------------------------------------------------------ features through views

    def _flows(self, node: Any, number: int) -> dict[Any, Flow]:
        """Source -> its features, for output ``number`` of ``node``, up to the nearest matmuls and convolutions."""
        region, waiting = set(), [node]
        while waiting:
            current = waiting.pop()
            if current is None or current in region or hasattr(current, "variable"):
                continue
            region.add(current)
            if not self._is_source(current):
                waiting.extend(entry[0] for entry in current.next_functions)
        flows: dict[tuple[Any, int], dict[Any, Flow]] = {}
        for current in sorted(region, key=self.position.__getitem__):
            if self._is_source(current):
                matmul = self.matmuls.get(current)
                layout = Layout.of_features(shape_of(current, 0), matmul.axis) if matmul else None
                flows[current, 0] = {current: Flow(layout, 0, matmul is not None)}
                continue
            inputs = [flows.get(entry, {}) for entry in current.next_functions]
            for output in range(len(metadata(current))):
                flows[current, output] = through(current, output, inputs)
        return flows.get((node, number), {})

    def _is_source(self, node: Any) -> bool:
        name = node.name()
        return node in self.matmuls or node in self.attentions or name in _CONVOLUTIONS or name in _EMBEDDINGS


def _attention_finding(finding: Finding, claims: list[_Claim], rows: int) -> Finding:
    masks: dict[str, int] = {}
    for claim in claims:
        masks[claim.role] = masks.get(claim.role, 0) | claim.mask
    heads = {c.role: _heads(c, masks[c.role].bit_count()) for c in claims}
    exact = all(claim.exact for claim in claims)
    if len(masks) == 1:
        ((role, mask),) = masks.items()
        whole = exact and mask == (1 << rows) - 1
        return replace(finding, role=role, heads=heads[role]) if whole else finding
    fused = replace(finding, role="attention_qkv")
    ranges = {role: runs(mask) for role, mask in masks.items()}
    if not exact or any(len(found) != 1 for found in ranges.values()):
        return fused  # interleaved by head, or not known: no segments
    parts = sorted((start, stop, role) for role, ((start, stop),) in ranges.items())
    if any(stop > start for (_, stop, _), (start, _, _) in pairwise(parts)):
        return fused  # shared rows
    segments, position = [], 0
    for start, stop, role in parts:
        if start > position:
            segments.append(Segment("linear", position, start))
        segments.append(Segment(role, start, stop, heads[role]))
        position = stop
    if position < rows:
        segments.append(Segment("linear", position, rows))
    return replace(fused, segments=tuple(segments))


def _heads(claim: _Claim, rows: int) -> int | None:
    return rows // claim.head_dim if claim.by_head and rows % claim.head_dim == 0 else None


# ---------------------------------------------------------------- autograd nodes


def _producers_first(root: Any) -> list[Any]:
    order, done, waiting = [], set(), [(root, False)]
    while waiting:
        node, children_done = waiting.pop()
        if children_done:
            order.append(node)
        elif node is not None and node not in done:
            done.add(node)
            waiting.append((node, True))
            waiting.extend((entry[0], False) for entry in node.next_functions)
    return order


def _leaf(node: Any, through: tuple[str, ...] = ("ToCopyBackward0",)) -> torch.Tensor | None:
    while node is not None and node.name() in through:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _matmul(node: Any) -> _Matmul | None:
    name = node.name()
    if name == "LinearBackward0":
        first, second = 0, 1
    elif name in _MATMUL_OPERANDS:
        first, second = _MATMUL_OPERANDS[name]
    else:
        return None
    weight = _weight(*node.next_functions[second], into=-1 if name == "LinearBackward0" else -2)
    if weight is not None:
        return _Matmul(weight, first)
    if node.next_functions[second][0] is not None:
        weight = _weight(*node.next_functions[first], into=-1)
    return _Matmul(weight, second, -2) if weight is not None else _Matmul(None, first)


def _weight(node: Any, number: int, *, into: int) -> _Weight | None:
    """The 2-D leaf behind an operand whose dimension ``into`` (-1 or -2) is summed over; None for anything else."""
    chain = []
    while node is not None and not hasattr(node, "variable"):
        if node.name() not in _WEIGHT_VIEWS:
            return None
        chain.append((node, number))
        node, number = node.next_functions[0]
    leaf = getattr(node, "variable", None)
    if leaf is None or leaf.ndim != 2:
        return None
    flows = [Flow(Layout.of_features(leaf.shape, axis)) for axis in (0, 1)]
    for step, output in reversed(chain):
        flows = [moved(step, step.name(), output, flow, shape_of(step, output)) for flow in flows]
    layouts = [flow.layout for flow in flows if flow.layout is not None]
    out = -3 - into
    for axis, layout in enumerate(layouts if len(layouts) == 2 else []):
        # Axes of size 1 leave no trace; then the other axis tells.
        outwards = any(stride for _, stride in layout.dims[out])
        if outwards or any(stride for _, stride in layout.dims[into]):
            fan_out = axis if outwards else 1 - axis
            return _Weight(leaf, 1 - fan_out, fan_out, layouts[fan_out].offset, layouts[fan_out].shape[out])
    return None
