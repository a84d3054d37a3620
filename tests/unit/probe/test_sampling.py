import math

import pytest
import torch

from memadvise.ledger import Parameter
from memadvise.optim.registry import problems_of
from memadvise.plan.schema import Setting
from memadvise.probe import shadow
from memadvise.probe.sampling import LIMIT, draw, fitted_to, kept_shape, strides_of
from memadvise.probe.shadow import TensorShadows

ROWS = Setting("slimadam", {"axes": [1]})


def parameter(shape, role="linear", **more):
    size = 4 * math.prod(shape)
    return Parameter("w", shape, "float32", size, True, role, "m", "Linear", fan_in=(1,), fan_out=(0,), **more)


def test_small_tensors_are_watched_whole():
    assert strides_of(parameter((280, 280)), (ROWS,)) == (1, 1)
    assert strides_of(parameter((5,)), (ROWS,)) == (1,)


@pytest.mark.parametrize(
    "shape", [(768, 768), (2304, 768), (50257, 768), (14336, 4096), (512, 512, 3, 3), (8, 4096, 512)]
)
def test_large_ones_are_reduced_to_the_limit(shape):
    strides = strides_of(parameter(shape), ())
    kept = math.prod(kept_shape(shape, strides))
    assert LIMIT / 4 < kept <= LIMIT
    sample = draw(parameter(shape), strides, torch.zeros(1), 0)
    assert sample.weight == pytest.approx(math.prod(shape) / kept)
    for index, size, stride in zip(sample.index, shape, strides, strict=True):
        if index is not None:
            assert torch.equal(index // stride, torch.arange(size // stride))  # one of each run of neighbours


def test_heads_stay_whole_and_segments_move():
    heads = Setting("adam_mini", {"partition": "head", "heads": 32})
    strides = strides_of(parameter((4096, 4096)), (heads,))
    assert 128 % strides[0] == 0
    segments = [[0, 768, 12], [768, 1536, 12], [1536, 2304, 0]]
    fused = Setting("adam_mini", {"partition": "head", "segments": segments})
    strides = strides_of(parameter((2304, 768)), (fused,))
    assert strides[0] > 1
    fitted = fitted_to(fused, strides)
    assert not problems_of(fitted, kept_shape((2304, 768), strides), name="w")
    assert [stop for _, stop, _ in fitted.options["segments"]] == [768 // strides[0] * i for i in (1, 2, 3)]


def test_a_tensor_is_left_whole_where_a_candidate_would_not_fit_a_part():
    shape = (1024, 1024)
    assert strides_of(parameter(shape), (Setting("apollo", {"rank": 1000, "scale": 1.0}),)) == (1, 1)


def test_frequent_tokens_stand_for_themselves():
    table = parameter((4096, 256), role="token_embedding")
    strides = strides_of(table, (ROWS,))
    kept = 4096 // strides[0]
    first = torch.zeros(4096, 256)
    heavy = torch.randperm(4096, generator=torch.Generator().manual_seed(1))[: kept // 2]
    first[heavy] = 1.0
    sample = draw(table, strides, first, 0)
    rows, counts = sample.index[0], sample.weight.flatten()
    assert set(heavy.tolist()) <= set(rows.tolist())
    assert len(set(rows.tolist())) == kept
    assert counts.sum().item() == pytest.approx(4096)
    assert counts[torch.isin(rows, heavy)].unique().tolist() == [1.0]


def test_a_sample_scores_as_the_whole_does(monkeypatch):
    """Rows of a table whose sizes fall like Zipf's law: weighted, the part has the score of the whole."""
    shape = (4096, 256)
    table = parameter(shape, role="token_embedding")
    settings = (ROWS, Setting("adamw", {"second_moment": "int4"}), Setting("adafactor", {"momentum": 0.9}))
    generator = torch.Generator().manual_seed(0)
    scale = 1e-2 / torch.arange(1.0, 4097.0)[torch.randperm(4096, generator=generator)].unsqueeze(1)
    stream = [scale * torch.randn(shape, generator=generator) for _ in range(8)]
    part = TensorShadows(table, settings, (0.9, 0.95), 1e-8, stream[0])
    monkeypatch.setattr(shadow, "strides_of", lambda parameter, settings: (1, 1))
    whole = TensorShadows(table, settings, (0.9, 0.95), 1e-8, stream[0])
    m, v = torch.zeros(shape), torch.zeros(shape)
    for step, g in enumerate(stream):
        m, v = torch.lerp(m, g, 0.1), torch.lerp(v, g * g, 0.05)
        for shadows in (part, whole):
            shadows.step(g, (m, v, step + 1), step, record=step >= 6, begin=False, end=False)
    assert (part.sampled, whole.sampled) == (512 * 256, None)
    for a, b in zip(part.values(), whole.values(), strict=True):
        assert a.abs_d1 == pytest.approx(b.abs_d1, rel=0.1)
