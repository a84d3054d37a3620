"""What every parameter *is*: embedding, query, fused projection, norm ... from module types and the graph, never names.

The module that owns a parameter decides first (``nn.Embedding``, a convolution, a norm, a recurrent layer). Which of
its uses a plain matrix has is read off one forward pass (:mod:`memadvise.dataflow`). What neither proves stays
``linear`` (a matrix multiplied with activations) or ``unknown``, for which nothing special is ever assumed.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from memadvise.dataflow import Finding, find_roles
from memadvise.ledger import Parameter, Segment
from memadvise.names import canonical_name

if TYPE_CHECKING:
    import torch
    from torch import nn

_TABLE_ROLES = {"token_embedding", "position_embedding"}


@dataclass
class _Record:
    """A parameter with every place it is registered at: (module name, module, attribute)."""

    tensor: torch.Tensor
    places: list[tuple[str, nn.Module, str]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        names = (f"{module}.{attribute}" if module else attribute for module, _, attribute in self.places)
        return list(dict.fromkeys(canonical_name(name) for name in names))


def describe_parameters(model: nn.Module, run_loss: Callable[[], torch.Tensor] | None = None) -> tuple[Parameter, ...]:
    """Describe every parameter of ``model`` once, in the order of ``model.named_parameters()``.

    Args:
        model: real or fake; it is not changed.
        run_loss: runs one forward pass of ``model`` (under whatever mode the caller is in) and returns the scalar
            loss with its graph. Without it, roles come from module types alone.

    Returns:
        One record a tensor; tied tensors have the further names as ``aliases``.
    """
    records: dict[int, _Record] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in module._parameters.items():
            if tensor is not None:
                records.setdefault(id(tensor), _Record(tensor)).places.append((module_name, module, attribute))

    findings: dict[int, Finding] = {}
    tables: dict[int, str] = {}
    if run_loss is not None:
        lookups = _Lookups(model)
        with lookups:
            loss = run_loss()
        findings, tables = find_roles(loss), lookups.roles()
        del loss
    frozen = any(not record.tensor.requires_grad for record in records.values())
    return tuple(_describe(record, findings.get(key), tables.get(key), frozen) for key, record in records.items())


def fingerprint(parameters: Iterable[Parameter]) -> str:
    """``sha256:...`` over name, shape and dtype of the trainable parameters, in any order."""
    lines = sorted(f"{p.name} {list(p.shape)} {p.dtype}" for p in parameters if p.trainable)
    return f"sha256:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


def _describe(record: _Record, finding: Finding | None, table: str | None, frozen: bool) -> Parameter:
    tensor = record.tensor
    places = [_static(tensor, module, attribute) for _, module, attribute in record.places]
    decided = _tied(places) or places[0]
    if table is not None and decided.role == "token_embedding":
        decided = replace(decided, role=table)
    if finding is not None:
        decided = _combined(decided, finding, frozen)
    module_name, module, _ = record.places[0]
    names = record.names
    return Parameter(
        name=names[0],
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        num_bytes=tensor.numel() * tensor.element_size(),
        trainable=tensor.requires_grad,
        role=decided.role,
        module=canonical_name(module_name),
        module_type=type(module).__name__,
        fan_in=decided.fan_in,
        fan_out=decided.fan_out,
        heads=decided.heads,
        segments=decided.segments,
        aliases=tuple(names[1:]),
    )


def _tied(places: list[Finding]) -> Finding | None:
    """An embedding registered as a projection's weight too, or the same thing in several places."""
    table = next((p for p in places if p.role == "token_embedding"), None)
    if table is not None and any(p.role == "linear" for p in places):
        return replace(table, role="tied_embedding")
    if len({p.role for p in places}) > 1:
        return replace(places[0], role="linear" if {p.role for p in places} <= {"linear", "unknown"} else "unknown")
    return None


def _combined(static: Finding, finding: Finding, frozen: bool) -> Finding:
    """The module's word, refined by the graph's where the module leaves the use open."""
    if static.role in {"linear", "unknown"}:
        return finding
    if static.role in _TABLE_ROLES and finding.role == "tied_embedding":
        return replace(static, role="tied_embedding")  # F.linear(x, embedding.weight)
    if static.role == "conv" and finding.role == "patch_embedding" and not frozen:
        # Behind a frozen layer, too, a convolution's input needs no gradient; that is not the image.
        return replace(static, role="patch_embedding")
    return static


# ---------------------------------------------------------------- module types


def _static(tensor: torch.Tensor, module: nn.Module, attribute: str) -> Finding:
    """What the type of the owning module says of its parameter."""
    from torch import nn
    from torch.nn.modules.batchnorm import _NormBase
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    ndim = tensor.ndim
    if sum(size > 1 for size in tensor.shape) <= 1 and ndim != 2:
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | _NormBase) or _is_vector_norm(module):
            return Finding("norm")
        is_bias = attribute == "bias" or isinstance(module, nn.RNNBase | nn.MultiheadAttention)
        return Finding("bias" if is_bias else "vector")
    if isinstance(module, nn.LayerNorm):
        return Finding("norm")  # over several dimensions
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Finding("token_embedding", (1,), (0,))
    if isinstance(module, _ConvNd):
        kernel = tuple(range(2, ndim))
        transposed = isinstance(module, _ConvTransposeNd)  # its weight is [in, out / groups, ...]
        return Finding("conv", (0, *kernel) if transposed else (1, *kernel), (1,) if transposed else (0,))
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return Finding("recurrent", (1,), (0,))
    if isinstance(module, nn.MultiheadAttention):
        return _attention_static(tensor, module, attribute)
    if ndim == 2 and _is_conv1d(module):
        return Finding("linear", (0,), (1,))
    if ndim == 2 and isinstance(module, nn.Linear):
        return Finding("linear", (1,), (0,))
    return Finding("unknown")


def _attention_static(tensor: torch.Tensor, module: nn.MultiheadAttention, attribute: str) -> Finding:
    """``nn.MultiheadAttention`` says itself what its attributes are: [q; k; v] rows, or one weight each."""
    width, heads = module.embed_dim, module.num_heads
    parts = ("attention_query", "attention_key", "attention_value")
    if attribute == "in_proj_weight":
        segments = tuple(Segment(role, i * width, (i + 1) * width, heads) for i, role in enumerate(parts))
        return Finding("attention_qkv", (1,), (0,), None, segments)
    for role, name in zip(parts, ("q_proj_weight", "k_proj_weight", "v_proj_weight"), strict=True):
        if attribute == name:
            return Finding(role, (1,), (0,), heads)
    return Finding("unknown")


def _is_conv1d(module: Any) -> bool:
    """Whether it is transformers' linear layer with weight [in, out]; transformers is not imported to find out."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)


def _is_vector_norm(module: Any) -> bool:
    """A norm of whatever library: no children, and a single parameter, a vector that scales."""
    own = [p for p in module.parameters() if p is not None]
    return len(own) == 1 and own[0].ndim == 1 and not any(True for _ in module.children())


# ---------------------------------------------------------------- what embeddings are looked up by


class _Lookups:
    """Watches the embeddings of a model while it runs: which are indexed by the model's own inputs."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []
        self._inputs: list[torch.Tensor] = []  # integer inputs of the whole model
        self._seen: list[tuple[int, torch.Tensor]] = []  # (id of the weight, indices), in order

    def __enter__(self) -> None:
        from torch import nn

        self._handles.append(self._model.register_forward_pre_hook(self._model_called, with_kwargs=True))
        for module in self._model.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                self._handles.append(module.register_forward_pre_hook(self._looked_up))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _model_called(self, module: Any, args: Any, kwargs: Any) -> None:
        self._inputs.extend(t for t in _tensors((args, kwargs)) if not t.is_floating_point() and not t.is_complex())

    def _looked_up(self, module: Any, args: Any) -> None:
        indices = next(iter(_tensors(args)), None)
        if indices is not None:
            self._seen.append((id(module.weight), indices))

    def roles(self) -> dict[int, str]:
        """``token_embedding`` for what is indexed by an input or a view of one, else ``position_embedding``.

        Where no embedding is (inputs were converted first), the first one indexed in an input's shape counts.
        """
        storages = {_storage(t) for t in self._inputs}
        tokens = {weight for weight, indices in self._seen if _storage(indices) in storages}
        if not tokens:
            shapes = {t.shape for t in self._inputs}
            alike = [weight for weight, indices in self._seen if indices.shape in shapes]
            tokens = set(alike[:1]) if self._inputs else {weight for weight, _ in self._seen}
        if not tokens:
            return {}
        return {weight: "token_embedding" if weight in tokens else "position_embedding" for weight, _ in self._seen}


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> list[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, tuple | list):
        return [t for item in value for t in _tensors(item)]
    return []
