"""Depth extrapolated from 2, 3 and 4 blocks is the whole trace, event for event; else it is refused."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memadvise.memory.depth import _insertions, trace_by_depth
from memadvise.memory.estimate import estimate
from memadvise.memory.repeats import Blocks, NotRepeated, find_blocks, leave_blocks
from memadvise.memory.trace import trace_step
from memadvise.optim.create import create_optimizer
from memadvise.plan.schema import Setting, Switches
from memadvise.target import Target, load_target

WIDTH = 32


class Block(nn.Module):
    """Attention-free, with a residual, a norm and a shape of its own inside."""

    def __init__(self, index: int, hidden: int = 3 * WIDTH, *, scale: float = 1.0) -> None:
        super().__init__()
        self.index, self.scale = index, scale
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x)))) * self.scale


class Stack(nn.Module):
    """An embedding, blocks in a list, a head."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Dense(Stack):
    """Every block sees what all blocks before it gave: memory grows with the square of the depth."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        seen = [self.embed(ids)]
        for block in self.blocks:
            seen.append(block(torch.cat(seen).view(len(seen), *seen[0].shape).mean(0)))
        return self.head(seen[-1])


def _loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def _target(build):
    batch = (torch.zeros(4, 16, dtype=torch.int64), torch.zeros(4, 16, dtype=torch.int64))
    return Target(build_model=build, build_batches=lambda: iter([batch] * 2), compute_loss=_loss)


def _blocks(count):
    return [Block(i) for i in range(count)]


def _hf(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return load_target(f"hf:{folder}", options={"batch_size": 2, "seq_len": 64, "dtype": "bfloat16"})


def _assert_exact(target, trace=trace_step):
    derived, whole = trace_by_depth(target, trace), trace(target)
    assert len(derived.events) == len(whole.events)
    added = [line for line in derived.assumptions if line.startswith("Depth extrapolated")]
    assert len(added) == 1
    for name in (f.name for f in dataclasses.fields(whole)):
        expected = [*whole.assumptions, *added] if name == "assumptions" else getattr(whole, name)
        assert getattr(derived, name) == expected, name


VARIANTS = {
    "as it stands": trace_step,
    "checkpointing": partial(trace_step, switches=Switches(checkpoint=("blocks.*",))),
    "micro-batches": partial(trace_step, switches=Switches(micro_batches=2)),
    "cpu": partial(trace_step, device="cpu"),
    "SGD": partial(trace_step, make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)),
    "memadvise": partial(
        trace_step, make_optimizer=lambda model: create_optimizer(model, Setting("adafactor"), lr=1e-3)
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stack_of_blocks_is_derived_exactly(name):
    _assert_exact(_target(lambda: Stack(_blocks(7))), VARIANTS[name])


def test_blocks_between_others_in_one_list():
    def build():
        return Stack([Block(0, 2 * WIDTH), *(Block(i) for i in range(1, 9)), Block(9, 5 * WIDTH), Block(10, WIDTH)])

    assert find_blocks(build(), at_least=5)[1] == Blocks("blocks", 1, 8)
    _assert_exact(_target(build))


def test_a_sequential_that_is_the_model():
    def build():
        return nn.Sequential(nn.Embedding(50, WIDTH), *_blocks(7), nn.Linear(WIDTH, 50))

    _assert_exact(_target(build))


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip


def test_llama_with_grouped_queries(tmp_path):
    _assert_exact(_hf(tmp_path, **LLAMA))


@pytest.mark.slow
def test_llama_with_checkpointing(tmp_path):
    _assert_exact(_hf(tmp_path, **LLAMA), partial(trace_step, switches=Switches(checkpoint=("model.layers.*",))))


def test_gpt2_with_dropout_and_a_tied_head(tmp_path):
    target = _hf(tmp_path, model_type="gpt2", n_embd=64, n_layer=6, n_head=4, vocab_size=128, n_positions=64)
    _assert_exact(target)


@pytest.mark.slow
def test_t5_whose_first_block_is_another(tmp_path):
    """The encoder's blocks are extrapolated (all but the first, which has the position bias), the decoder's traced."""
    target = _hf(
        tmp_path, model_type="t5", d_model=64, d_kv=16, d_ff=128, num_layers=7, num_decoder_layers=1, num_heads=4,
        vocab_size=128, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    _assert_exact(target)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Stack(_blocks(4)), "no 5 equal blocks in a row"),
        (lambda: Stack([Block(i, (2 + i % 2) * WIDTH) for i in range(9)]), "no 5 equal blocks"),
        (lambda: Stack([Block(i, scale=2.0 if i == 4 else 1.0) for i in range(9)]), "no 5 equal blocks"),
        (lambda: Dense(_blocks(9)), "another block does not"),
    ],
)
def test_what_is_not_repeated_is_refused(build, says):
    with pytest.raises(NotRepeated, match=says):
        trace_by_depth(_target(build), trace_step)


def test_a_model_that_counts_on_its_depth_is_refused():
    class Indexed(Stack):
        def forward(self, ids):
            x = self.embed(ids)
            for i in range(9):
                x = self.blocks[i](x)
            return self.head(x)

    with pytest.raises(NotRepeated, match="does not run with 2 blocks"):
        trace_by_depth(_target(lambda: Indexed(_blocks(9))), trace_step)


def test_what_is_refused_is_traced_whole_and_says_why():
    target = _target(lambda: Dense(_blocks(6)))
    whole, asked = estimate(target), estimate(target, extrapolate_depth=True)
    assert dataclasses.replace(asked, warnings=whole.warnings) == whole
    assert "all of it was traced" in asked.warnings[-1]


def test_the_ledger_says_what_was_done():
    target = _target(lambda: Stack(_blocks(6)))
    whole, derived = estimate(target), estimate(target, extrapolate_depth=True)
    assert derived.assumptions[-1].startswith(
        "Depth extrapolated: traced with 2, 3 and 4 of the 6 equal blocks blocks.0"
    )
    assert dataclasses.replace(derived, assumptions=whole.assumptions) == whole


def test_a_model_that_was_built_before_has_all_its_blocks_afterwards():
    model = Stack(_blocks(6))
    trace_by_depth(_target(lambda: model), trace_step)
    assert len(model.blocks) == 6
    assert [block.index for block in model.blocks] == list(range(6))


def test_fewer_blocks_move_up_what_follows():
    model = Stack([*_blocks(6), Block(6, WIDTH)])
    container, blocks = find_blocks(model, at_least=5)
    assert len(leave_blocks(container, blocks, 2)) == 7
    assert [block.index for block in model.blocks] == [0, 1, 6]
    assert list(model.blocks._modules) == ["0", "1", "2"]


# ---------------------------------------------------------------- insertions

PARTS = st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=5)


@given(PARTS, PARTS)
def test_runs_are_found_whatever_the_strings_have_in_common(fixed, repeated):
    def string(depth):
        pairs = [(a, repeated[i] if i < len(repeated) else []) for i, a in enumerate(fixed)]
        return [x for a, b in pairs for x in [*a, *(b * depth)]]

    first, second, third = string(2), string(3), string(4)
    runs = _insertions(first, second, third)
    without, twice, done = [], [], 0
    for start, stop in runs:
        assert done <= start < stop
        without += second[done:start]
        twice += second[done:stop] + second[start:stop]
        done = stop
    assert without + second[done:] == first
    assert twice + second[done:] == third


@pytest.mark.parametrize(
    "strings", [([1, 2, 3], [1, 3, 3, 3], [1, 3, 3, 3, 3]), ([1], [1, 2], [1, 2, 3]), ([1], [1, 2], [1, 2, 2, 2])]
)
def test_strings_that_do_not_grow_by_the_same_runs_are_refused(strings):
    with pytest.raises(NotRepeated, match="another block does not"):
        _insertions(*strings)
