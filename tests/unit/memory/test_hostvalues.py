"""Values that a program reads back while its tensors are fake."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from memadvise.errors import TargetError
from memadvise.memory.session import fake_session
from memadvise.target import Target

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])


@contextlib.contextmanager
def _fakes(device="cpu"):
    target = Target(build_model=lambda: nn.Linear(2, 2), build_batches=lambda: [(IDS, torch.randn(2, 5))])
    with fake_session(target, device) as session:
        yield session


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_integers_of_the_batch_keep_their_values(device):
    with _fakes(device) as session:
        ids, _ = session.batches[0]
        mask = ids != 0
        assert ids.sum().item() == 31
        assert bool(mask.all()) is False
        assert bool(mask.any()) is True
        assert int(mask.sum(1)[1]) == 3
        assert ids.max().item() == 9
        assert torch.equal(ids[:, 3], ids[:, 1]) is False
        assert (torch.arange(5) < 3).sum().item() == 3
        assert not session.host_values.guesses


def test_shapes_that_depend_on_known_values():
    with _fakes() as session:
        ids, x = session.batches[0]
        mask = ids != 0
        assert x[mask].shape == (8,)
        assert mask.nonzero().shape == (8, 2)
        assert torch.masked_select(x, mask).shape == (8,)
        assert ids.unique().shape == (8,)


def test_writing_in_place_is_followed_and_unknown_writes_forget():
    with _fakes() as session:
        ids, x = session.batches[0]
        view = ids[0]
        view[0] = 100
        assert ids.max().item() == 100
        ids.copy_(x)  # nobody knows these
        assert ids.max().item() == 1
        assert len(session.host_values.guesses) == 1


def test_policy_for_what_was_computed():
    with _fakes() as session:
        _, x = session.batches[0]
        assert bool((x == x).all()) is True
        assert bool((x > 0).any()) is False
        assert x.sum().item() == 1.0
        assert x.argmax().item() == 1
        reads = list(session.host_values.guesses)
        assert all("test_hostvalues.py:" in read for read in reads)
        assert any("assumed True" in read for read in reads)
        assert any("assumed False" in read for read in reads)
        assert sum("assumed 1" in read for read in reads) == 2


def test_a_shape_that_depends_on_computed_numbers_is_refused_with_its_line():
    with _fakes() as session:
        _, x = session.batches[0]
        with pytest.raises(TargetError, match=r"test_hostvalues\.py:\d+ calls aten\.nonzero") as caught:
            (x > 0).nonzero()
        assert caught.value.hint is not None


def test_constants_keep_their_values():
    with _fakes() as session:
        assert torch.tensor([4, 5, 6]).sum().item() == 15
        assert torch.tensor(2.5).item() == 2.5
        assert torch.full((3,), 7).sum().item() == 21
        assert not session.host_values.guesses
