"""Layouts against torch itself: the same views of a tensor that holds the number of its feature."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memadvise.layout import Layout, runs


def features(shape: tuple[int, ...], axis: int) -> torch.Tensor:
    """A tensor whose every element is the number of its feature."""
    size = [1] * len(shape)
    size[axis] = shape[axis]
    return torch.arange(shape[axis]).view(size).expand(shape).contiguous()


def as_tensor(layout: Layout) -> torch.Tensor:
    """What a layout says, written out."""
    flat = torch.tensor(layout.offset)
    for atoms in layout.dims:
        part = torch.tensor([0])
        for size, stride in atoms:
            part = (part.unsqueeze(1) + torch.arange(size) * stride).flatten()
        flat = flat.unsqueeze(-1) + part
    return flat


def agree(layout: Layout | None, tensor: torch.Tensor) -> None:
    assert layout is not None
    assert layout.shape == tuple(tensor.shape)
    assert torch.equal(as_tensor(layout), tensor)
    assert layout.mask == sum(1 << feature for feature in set(tensor.flatten().tolist()))


def test_fused_projection_as_timm_splits_it() -> None:
    tensor = features((6, 24), 1).reshape(2, 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
    layout = Layout.of_features((6, 24), -1).view((2, 3, 3, 2, 4))
    assert layout is not None
    layout = layout.permute((2, 0, 3, 1, 4))
    agree(layout, tensor)
    for part in range(3):
        agree(layout.select(0, part), tensor[part])
    assert runs(layout.select(0, 1).mask) == [(8, 16)]  # type: ignore[union-attr]


def test_interleaved_projection_as_neox_splits_it() -> None:
    tensor = features((6, 24), 1).view(2, 3, 2, 12).transpose(1, 2)[..., 4:8]
    layout = Layout.of_features((6, 24), 1).view((2, 3, 2, 12))
    assert layout is not None
    layout = layout.transpose(1, 2).narrow(-1, 4, 8)
    agree(layout, tensor)
    assert layout is not None
    assert runs(layout.mask) == [(4, 8), (16, 20)]


def test_expand_repeats_and_refuses_what_torch_refuses() -> None:
    layout = Layout.of_features((2, 1, 6), 2)
    agree(layout.expand((2, 5, 6)), features((2, 1, 6), 2).expand(2, 5, 6))
    agree(layout.expand((3, 2, 5, 6)), features((2, 1, 6), 2).expand(3, 2, 5, 6))
    assert layout.expand((2, 5, 7)) is None
    assert layout.expand((5, 6)) is None


def test_slices_with_a_step_and_inside_a_merged_dimension() -> None:
    tensor = features((2, 12), 1)
    layout = Layout.of_features((2, 12), 1)
    agree(layout.narrow(1, 1, 12, 2), tensor[:, 1::2])
    heads = tensor.view(2, 3, 4).permute(0, 2, 1).reshape(2, 12)  # features no longer in order
    merged = layout.view((2, 3, 4))
    assert merged is not None
    merged = merged.permute((0, 2, 1)).view((2, 12))
    agree(merged, heads)
    assert merged is not None
    agree(merged.narrow(1, 3, 9), heads[:, 3:9])
    agree(merged.narrow(1, 4, 5), heads[:, 4:5])
    assert merged.narrow(1, 2, 5) is None  # no longer a product of strides


def test_concatenation_in_order_continues_and_out_of_order_does_not() -> None:
    layout = Layout.of_features((2, 8), 1)
    first, second = layout.narrow(1, 0, 3), layout.narrow(1, 3, 8)
    assert first is not None
    assert second is not None
    agree(first.followed_by(second, -1), features((2, 8), 1))
    assert second.followed_by(first, -1) is None
    assert first.followed_by(second, 0) is None


def test_views_that_need_a_copy_of_the_pattern_are_unknown() -> None:
    assert Layout.of_features((4, 6), 1).view((3, 8)) is None
    assert Layout.of_features((4, 6), 1).view((4, 5)) is None


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_chain_of_views_agrees_with_torch(data: st.DataObject) -> None:
    shape: tuple[int, ...] = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    tensor, layout = features(shape, axis), Layout.of_features(shape, axis)
    for _ in range(data.draw(st.integers(1, 5))):
        ndim = tensor.ndim
        operation = data.draw(st.sampled_from(["permute", "select", "narrow", "merge", "split"]))
        found: Layout | None = layout
        if operation == "permute":
            order = data.draw(st.permutations(range(ndim)))
            tensor, found = tensor.permute(order), layout.permute(order)
        elif operation == "select" and ndim > 1:
            dim = data.draw(st.integers(0, ndim - 1))
            index = data.draw(st.integers(-tensor.shape[dim], tensor.shape[dim] - 1))
            tensor, found = tensor.select(dim, index), layout.select(dim, index)
        elif operation == "narrow":
            dim = data.draw(st.integers(0, ndim - 1))
            start = data.draw(st.integers(0, tensor.shape[dim] - 1))
            stop = data.draw(st.integers(start + 1, tensor.shape[dim]))
            tensor, found = tensor.narrow(dim, start, stop - start), layout.narrow(dim, start, stop)
        elif operation == "merge" and ndim > 1:
            dim = data.draw(st.integers(0, ndim - 2))
            tensor = tensor.flatten(dim, dim + 1)
            found = layout.view(tuple(tensor.shape))
        elif operation == "split" and tensor.shape[0] % 2 == 0:
            tensor = tensor.reshape(2, -1, *tensor.shape[1:])
            found = layout.view(tuple(tensor.shape))
        if found is None:
            return  # not describable is always an allowed answer; a wrong one is not
        layout = found
        agree(layout, tensor)


@pytest.mark.parametrize("ranges", [[], [(0, 1)], [(0, 5), (7, 9)], [(3, 4), (5, 6), (100, 164)]])
def test_runs_are_the_ranges_of_a_mask(ranges: list[tuple[int, int]]) -> None:
    mask = sum(1 << bit for start, stop in ranges for bit in range(start, stop))
    assert runs(mask) == ranges
