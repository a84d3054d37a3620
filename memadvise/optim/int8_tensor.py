"""The tensor that int8 weights are: floats to whoever looks, bytes in memory.

For why it is so, see :mod:`memadvise.optim.int8_weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from memadvise.errors import OptimizerError
from memadvise.optim.codecs.codec import Rows, rows_of
from memadvise.optim.int8_groups import decode, encode_
from memadvise.optim.tracing import valueless

GROUP = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CHUNK = 1 << 22  # elements quantized at once where nothing else bounds it
_aten = torch.ops.aten
_View = tuple[Any, tuple[Any, ...], int | None]  # operation, its arguments after the tensor, which of its outputs


class Int8Weight(Tensor):
    """A floating-point tensor held in :attr:`nbytes_held` bytes, about 1.02 an element.

    Its dtype is that of the floats it stands for. Views of it (``t``, ``view``, slices ...) share its bytes; any other
    operation sees the floats, made for the occasion: as large as the whole tensor while it runs, save for embeddings,
    which make the rows they look up. ``to(device)`` moves the bytes and ``to(dtype)`` changes what it stands for. In
    place it takes whole new values only (``copy_`` and the plain initialisers), rounded to the nearest.

    Attributes:
        codes: uint8, of the tensor's shape. scale, zero: bfloat16 and uint8, [rows, groups a row].
        group: elements that share a scale.
        views: the views, oldest first, that lead from the tensor that owns the bytes to this one.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: int
    views: tuple[_View, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Int8Weight],
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        *,
        dtype: torch.dtype,
        group: int,
        views: tuple[_View, ...] = (),
        requires_grad: bool = False,
    ) -> Int8Weight:
        """Wrap the bytes as they are; :meth:`from_float` computes them."""
        seen = _viewed(codes, views)
        self: Int8Weight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, seen.shape, strides=seen.stride(), storage_offset=seen.storage_offset(),
            dtype=dtype, device=codes.device, requires_grad=requires_grad,
        )  # fmt: skip
        self.codes, self.scale, self.zero, self.group, self.views = codes, scale, zero, group, views
        return self

    @staticmethod
    def from_float(values: Tensor, group: int = GROUP) -> Int8Weight:
        """``values`` (not empty) rounded to the nearest; they come back within half a scale of their group."""
        if values.dtype not in DTYPES or not values.numel():
            kind = f"{str(values.dtype).removeprefix('torch.')} tensor of shape {list(values.shape)}"
            raise OptimizerError(f"a {kind} cannot be held in int8 groups", hint="it takes floats, one at least")
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise OptimizerError(f"group should be a number of elements, found {group!r}")
        rows = rows_of(tuple(values.shape), group)
        codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
        scale = torch.zeros(rows.count, -(-rows.length // group), dtype=torch.bfloat16, device=values.device)
        made = Int8Weight(codes, scale, torch.zeros_like(scale, dtype=torch.uint8), dtype=values.dtype, group=group)
        made._write(values.detach())
        return made

    @property
    def rows(self) -> Rows:
        """The rows that groups lie in, of the tensor that owns the bytes."""
        return Rows(self.scale.shape[0], self.codes.numel() // self.scale.shape[0])

    @property
    def blocks(self) -> tuple[Rows, int]:
        """As which rows, and groups in them, a part can be taken out: one long row where no group is shorter."""
        rows = self.rows
        return (rows if rows.length % self.group else Rows(1, self.codes.numel())), self.group

    @property
    def nbytes_held(self) -> int:
        """The bytes of codes, scales and zero points (``nbytes`` are those of the floats it stands for)."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def dequantize(self) -> Tensor:
        """The floats, an ordinary tensor; a gradient passes through unchanged."""
        made: Tensor = _Dequantize.apply(self)  # type: ignore[no-untyped-call]
        return made

    def region(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [rows, length], scales and zero points of the elements ``start:stop`` in row-major order, as views:
        whole rows of :attr:`blocks`, or a part of one that begins and ends with a group.
        """
        rows, group = self.blocks
        codes, scale, zero = (t.view(rows.count, -1) for t in (self.codes, self.scale, self.zero))
        row, offset = divmod(start, rows.length)
        if not offset and not stop % rows.length:
            last = stop // rows.length
            return codes[row:last], scale[row:last], zero[row:last]
        end = stop - row * rows.length
        groups = slice(offset // group, -(-end // group))
        return codes[row : row + 1, offset:end], scale[row : row + 1, groups], zero[row : row + 1, groups]

    def _write(self, values: Tensor) -> None:
        """Take ``values``, of this shape, rounded to the nearest; in chunks, so that temporaries stay small."""
        rows = self.rows
        values = values.expand(self.codes.shape).reshape(rows.count, rows.length)
        step = max(_CHUNK // max(rows.length, 1), 1)
        firsts = range(0, rows.count, step)
        for first in firsts if not valueless() else [*firsts[:1], *firsts[-1:]]:  # all chunks allocate alike
            last = min(first + step, rows.count)
            wide = values[first:last].to(torch.promote_types(values.dtype, torch.float32))
            codes, scale, zero = self.region(first * rows.length, last * rows.length)
            scale.zero_()  # a fresh one, whatever was held before
            encode_(wide.view(codes.shape), codes, scale, zero, self.group, None)

    # ------------------------------------------------------------ what torch asks of a wrapper

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale", "zero"], (self.dtype, self.group, self.views)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Int8Weight:
        dtype, group, views = context
        parts = inner["codes"], inner["scale"], inner["zero"]
        return Int8Weight(*parts, dtype=dtype, group=group, views=views)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        grad = ", requires_grad=True" if self.requires_grad else ""
        kind = f"dtype={self.dtype}, group={self.group}, device={self.device}{grad}"
        return f"Int8Weight(shape={list(self.shape)}, {kind})"

    def _again(self, change: Callable[[Tensor], Tensor], **changes: Any) -> Int8Weight:
        """The same with ``change`` applied to its tensors."""
        inner = change(self.codes), change(self.scale), change(self.zero)
        return Int8Weight(*inner, **{"dtype": self.dtype, "group": self.group, "views": self.views, **changes})

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Weight:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        if not self.is_leaf:
            raise RuntimeError("only leaves of the graph can be copied with deepcopy, as of any tensor")
        with torch.no_grad():
            made = self._again(torch.Tensor.clone)
        made = _restore(made, self.requires_grad, isinstance(self, nn.Parameter))
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.views:
            return self.detach().dequantize().__reduce_ex__(protocol)
        kind = (self.dtype, self.group, self.requires_grad, isinstance(self, nn.Parameter))
        return _rebuild_int8, (self.codes, self.scale, self.zero, *kind)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """As of any tensor: the same memory without a history."""
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, Int8Weight):
            raise OptimizerError(
                "int8 weights cannot become an ordinary tensor by p.data = ...",
                hint="use p.copy_(values) for new values, or dequantize_weights(model)",
            )
        torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.codes, self.scale, self.zero = new.codes, new.scale, new.zero
        self.group, self.views = new.group, new.views

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OWN and isinstance(args[0], Int8Weight):
            return _OWN[func](func, args, kwargs)
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if written:
            _refuse_to_change(func, written, args, kwargs)
        args, kwargs = tree_map_only(Int8Weight, _floats, (args, kwargs))
        return func(*args, **kwargs)


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Int8Weight) -> Tensor:
        return _floats(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def _viewed(base: Tensor, views: tuple[_View, ...]) -> Tensor:
    for func, arguments, index in views:
        seen = func(base, *arguments)
        base = seen if index is None else seen[index]
    return base


def _floats(w: Int8Weight) -> Tensor:
    """What ``w`` stands for. A product of the two bytes and the bfloat16 scale is rounded to the dtype once."""
    wide = torch.float32 if w.dtype == torch.float16 else w.dtype  # float16 has not the range of the scales
    rows = w.rows
    out = torch.empty(rows.count, rows.length, dtype=wide, device=w.codes.device)
    codes = w.codes.view(rows.count, rows.length)
    return _viewed(decode(codes, w.scale, w.zero, w.group, out).to(w.dtype).view(w.codes.shape), w.views)


def _restore(w: Int8Weight, requires_grad: bool, parameter: bool) -> Int8Weight:
    made: Any = nn.Parameter(w, requires_grad) if parameter else w.requires_grad_(requires_grad)
    return made  # type: ignore[no-any-return]  # a Parameter of a tensor subclass is of that subclass


def _rebuild_int8(
    codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype, group: int, requires_grad: bool, parameter: bool
) -> Int8Weight:
    """What torch.load calls."""
    return _restore(Int8Weight(codes, scale, zero, dtype=dtype, group=group), requires_grad, parameter)


torch.serialization.add_safe_globals([_rebuild_int8])  # for torch.load(weights_only=True), once this is imported

# ---------------------------------------------------------------- operations that know the bytes


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    w = args[0]
    if kwargs:
        return func(_floats(w), *args[1:], **kwargs)

    def one(index: int | None) -> Int8Weight:
        return w._again(lambda t: t, views=(*w.views, (func, tuple(args[1:]), index)))

    seen = func(_viewed(w.codes, w.views), *args[1:])
    return one(None) if isinstance(seen, Tensor) else [one(index) for index in range(len(seen))]


def _alias(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]._again(lambda t: t)


def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    w = args[0]
    return func(_floats(w), **kwargs) if w.views else w._again(torch.Tensor.clone)


def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    w, dtype, device = args[0], kwargs.get("dtype") or args[0].dtype, kwargs.get("device")
    if dtype not in DTYPES:
        return func(_floats(w), **kwargs)
    blocking = not kwargs.get("non_blocking", False)

    def copied(t: Tensor) -> Tensor:
        return t.to(device or t.device, copy=True, non_blocking=not blocking)

    return w._again(copied, dtype=dtype)


def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    w, source = args[0], args[1]
    _check_owner(func, w)
    alike = isinstance(source, Int8Weight) and not source.views and source.group == w.group
    if alike and source.codes.shape == w.codes.shape:
        for name in ("codes", "scale", "zero"):
            getattr(w, name).copy_(getattr(source, name))
    else:
        w._write((_floats(source) if isinstance(source, Int8Weight) else source).to(w.codes.device))
    return w


def _fill(func: Any, args: Any, kwargs: Any) -> Any:
    _check_owner(func, args[0])
    args[0]._write(func(torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device), *args[1:], **kwargs))
    return args[0]


def _like(func: Any, args: Any, kwargs: Any) -> Any:
    """``zeros_like`` and its kin: an ordinary tensor, from one of that shape that takes no memory."""
    w = args[0]
    return func(torch.empty((), dtype=w.dtype, device=w.device).expand(w.shape), *args[1:], **kwargs)


def _embedding(func: Any, args: Any, kwargs: Any) -> Any:
    w, indices = args[0], args[1]
    rows = w.rows
    if w.views or w.ndim != 2 or rows.count != w.shape[0]:
        return func(_floats(w), *args[1:], **kwargs)
    flat = indices.reshape(-1)
    taken = [t.index_select(0, flat) for t in (w.codes, w.scale, w.zero)]
    found = Int8Weight(*taken, dtype=w.dtype, group=w.group)
    return _floats(found).view(*indices.shape, rows.length) if flat.numel() else _like_empty(w, indices.shape)


def _like_empty(w: Int8Weight, shape: Any) -> Tensor:
    return torch.empty(*shape, w.shape[1], dtype=w.dtype, device=w.device)


_OWN: dict[Any, Callable[[Any, Any, Any], Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.lift_fresh.default: _alias,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy_,
    _aten.embedding.default: _embedding,
}
_OWN |= dict.fromkeys(
    (
        _aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.view.default, _aten.unsqueeze.default,
        _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.expand.default, _aten.slice.Tensor,
        _aten.select.int, _aten.split.Tensor, _aten.split_with_sizes.default, _aten.unbind.int,
    ),
    _view,
)  # fmt: skip
_OWN |= dict.fromkeys(
    (
        _aten.zero_.default, _aten.fill_.Scalar, _aten.fill_.Tensor, _aten.normal_.default, _aten.uniform_.default,
    ),
    _fill,
)  # fmt: skip
_OWN |= dict.fromkeys(
    (
        _aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default,
        _aten.rand_like.default, _aten.randn_like.default, _aten.new_empty.default, _aten.new_zeros.default,
        _aten.new_ones.default, _aten.new_full.default, _aten.new_empty_strided.default,
    ),
    _like,
)  # fmt: skip


def _check_owner(func: Any, w: Int8Weight) -> None:
    if w.views:
        raise OptimizerError(
            f"a part of int8 weights cannot be changed in place ({func})",
            hint="change the whole parameter with copy_, or use dequantize_weights(model) first",
        )


def _refuse_to_change(func: Any, written: list[str], args: Any, kwargs: Any) -> None:
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    for name in written:
        value = given.get(name)
        if any(isinstance(t, Int8Weight) for t in (value if isinstance(value, list | tuple) else (value,))):
            raise OptimizerError(
                f"int8 weights cannot be changed in place by {func}: rounding would swallow small changes",
                hint="step them with an optimizer of memadvise.optim, set them whole with copy_, or use "
                "dequantize_weights(model) first",
            )
