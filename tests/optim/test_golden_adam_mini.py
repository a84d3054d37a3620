"""Golden checks of Adam-mini (arXiv 2406.16793): partitions, block counts of known models, what blocks are for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from reference import adam
from test_golden_slimadam import START, follow, stream
from torch import Tensor, nn

from memadvise.errors import OptimizerError
from memadvise.optim import AdamMini, AdamW, SlimAdam
from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.optim.registry import state_bytes, state_specs, validate
from memadvise.plan.schema import Setting
from memadvise.probe.hessian import Energies, sign_pair_energies, sign_pairs
from memadvise.probe.partitions import ROWS, Partition


def num_blocks(setting: Setting, shape: tuple[int, ...]) -> int:
    return math.prod(state_specs(setting, shape)["exp_avg_sq"].shape)


def mini(partition: str, **options: object) -> Setting:
    return Setting("adam_mini", {"partition": partition, **options})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str)
def test_c1_vectors_are_adamw(dtype: torch.dtype, tolerance: float) -> None:
    start, grads = torch.linspace(-1, 1, 24).to(dtype), stream((24,), 100)
    by_default, v = follow(AdamMini, start, grads, partition="whole")  # a model's default leaves vectors dense
    dense, _ = follow(AdamW, start, grads)
    assert v.shape == (24,)
    assert torch.equal(by_default, dense)
    p = nn.Parameter(start.clone())
    rows = MemadviseOptimizer([("p", p)], {"p": mini("row")}, lr=1e-3, weight_decay=0.1)  # said of this vector
    for g in grads:
        p.grad = g.to(dtype)
        rows.step()
    assert rows.memory()[0].setting == "adam_mini(partition=row)"
    assert (p.detach() - dense).abs().max() < tolerance


@pytest.mark.parametrize(("partition", "axes"), [("row", (1,)), ("whole", (0, 1))])
def test_c2_rows_and_the_whole_are_slimadams(partition: str, axes: tuple[int, ...]) -> None:
    grads = stream((24, 10), 30)
    mini, v = follow(AdamMini, START, grads, partition=partition)
    slim, w = follow(SlimAdam, START, grads, axes=axes)
    assert torch.equal(mini, slim)
    assert torch.equal(v, w)


def test_c2_heads_are_rows_of_the_tensor_viewed_by_heads() -> None:
    grads = stream((24, 10), 30)
    heads, v = follow(AdamMini, START, grads, partition="head", heads=4)
    rows, w = follow(SlimAdam, START.reshape(4, 60), [g.reshape(4, 60) for g in grads], axes=(1,))
    torch.testing.assert_close(heads, rows.reshape(24, 10), rtol=0, atol=1e-14)
    torch.testing.assert_close(v, w, rtol=1e-13, atol=0)


def test_c2_transposed_storage_is_the_transpose() -> None:
    grads = stream((24, 10), 30)
    for options in ({"partition": "row"}, {"partition": "column"}, {"partition": "head", "heads": 6}):
        p, v = follow(AdamMini, START, grads, **options)
        q, w = follow(AdamMini, START.t().contiguous(), [g.t().contiguous() for g in grads], axis=1, **options)
        torch.testing.assert_close(p, q.t(), rtol=0, atol=1e-14)
        torch.testing.assert_close(v, w.t(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("axis", [0, 1])
def test_c2_segments_are_their_parts_stepped_apart(axis: int) -> None:
    start, grads = START, stream((24, 10), 30)
    segments = [[0, 12, 3], [12, 18, 2], [18, 24, 0]]  # q with 3 heads, k with 2, v by row
    parts = [follow(AdamMini, start[a:b], [g[a:b] for g in grads], **_part(heads)) for a, b, heads in segments]
    if axis:
        start, grads = start.t().contiguous(), [g.t().contiguous() for g in grads]
    fused, v = follow(AdamMini, start, grads, partition="head", segments=segments, axis=axis)
    assert v.numel() == 3 + 2 + 6
    torch.testing.assert_close(fused.t() if axis else fused, torch.cat([p for p, _ in parts]), rtol=0, atol=1e-14)
    torch.testing.assert_close(v.flatten(), torch.cat([w.flatten() for _, w in parts]), rtol=1e-13, atol=0)


def _part(heads: int) -> dict[str, object]:
    return {"partition": "head", "heads": heads} if heads else {"partition": "row"}


@pytest.mark.parametrize("options", [{"partition": "row"}, {"partition": "head", "heads": 4}, {"partition": "whole"}])
def test_c3_constant_magnitude_within_blocks_is_adamw(options: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(5)
    grads = []
    for _ in range(20):
        g = torch.randint(0, 2, (24, 10), generator=generator) * 2.0 - 1
        for number, block in enumerate(adam.partition((24, 10), **options)):  # type: ignore[arg-type]
            g.view(-1)[block] *= number + 1.0
        grads.append(g.double())
    blocks, _ = follow(AdamMini, START, grads, **options)
    dense, _ = follow(AdamW, START, grads)
    torch.testing.assert_close(blocks, dense, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("width", "heads", "head_dim"), [(32, 4, 8), (32, 4, 16), (896, 14, 64)])
def test_c4_heads_count_whatever_the_head_dimension(width: int, heads: int, head_dim: int) -> None:
    assert num_blocks(mini("head", heads=heads), (heads * head_dim, width)) == heads
    assert num_blocks(mini("head", heads=2), (2 * head_dim, width)) == 2  # grouped keys


def llama(
    layers: int, width: int, heads: int, kv: int, inner: int, vocab: int
) -> list[tuple[tuple[int, ...], Setting]]:
    """Shapes of a Llama with the partition of the paper; norms as scalars, as the official code has them."""
    head_dim = width // heads
    norm, row = ((width,), mini("whole")), mini("row")
    layer = [
        ((width, width), mini("head", heads=heads)),
        ((kv * head_dim, width), mini("head", heads=kv)),
        ((kv * head_dim, width), row),
        ((width, width), row),
        ((inner, width), row),
        ((inner, width), row),
        ((width, inner), row),
        norm,
        norm,
    ]
    return layer * layers + [((vocab, width), row), ((vocab, width), row), norm]


@pytest.mark.parametrize(
    ("arguments", "parameters", "blocks", "gigabytes"),
    [
        ((32, 4096, 32, 32, 11008, 32000), 6.738, 1_163_841, "26.96"),  # Llama-2-7B: 26.96 in the paper
        ((32, 4096, 32, 8, 14336, 128256), 8.030, 1_470_273, "32.13"),  # Llama-3-8B
        ((40, 5120, 40, 40, 13824, 32000), 13.016, 1_787_601, "52.07"),  # Llama-2-13B
    ],
)
def test_c4_block_counts_and_state_of_published_models(
    arguments: tuple[int, ...], parameters: float, blocks: int, gigabytes: str
) -> None:
    shapes = llama(*arguments)
    assert round(sum(math.prod(shape) for shape, _ in shapes) / 1e9, 3) == parameters
    assert sum(num_blocks(setting, shape) for shape, setting in shapes) == blocks
    total = sum(state_bytes(setting, shape) for shape, setting in shapes)
    assert total == 4 * sum(math.prod(shape) for shape, _ in shapes) + 4 * blocks + 4 * len(shapes)
    assert f"{total / 1e9:.2f}" == gigabytes


@pytest.mark.parametrize(("options", "cut"), [({"partition": "row"}, 7), ({"partition": "head", "heads": 4}, 12)])
def test_c5_stepping_two_pieces_is_stepping_the_whole(options: dict[str, object], cut: int) -> None:
    grads = stream((24, 10), 20)
    for dtype in (torch.float32, torch.float64):
        whole, v = follow(AdamMini, START.to(dtype), grads, **options)
        halves = {**options, "heads": 2} if "heads" in options else options
        top, v_top = follow(AdamMini, START[:cut].to(dtype), [g[:cut] for g in grads], **halves)
        bottom, v_bottom = follow(AdamMini, START[cut:].to(dtype), [g[cut:] for g in grads], **halves)
        assert torch.equal(whole, torch.cat([top, bottom]))
        assert torch.equal(v, torch.cat([v_top, v_bottom]))


def test_c5_sums_of_shards_give_the_mean_of_the_whole() -> None:
    from memadvise.optim.methods.blockmean import Blocks

    g = stream((24, 10), 1)[0]
    for blocks in (Blocks((0, 1)), Blocks((0,)), Blocks((1,), 0, ((0, 24, 4),))):
        whole = blocks.pool(blocks.sum_squares(g), (24, 10))
        first, second = blocks.sum_squares(g[:7]), blocks.sum_squares(g[7:])
        total = torch.cat([first, second]) if 0 not in blocks.axes else first + second
        torch.testing.assert_close(blocks.pool(total, (24, 10)), whole)


@pytest.mark.parametrize("seed", range(4))
def test_c6_three_block_quadratic(seed: int) -> None:
    """The paper's motivation: dense blocks of very different curvature. v stays that of the first gradient, b1 = 0."""
    generator = torch.Generator().manual_seed(seed)
    hessian = torch.zeros(90, 90, dtype=torch.float64)
    for number, values in enumerate(((1.0, 2.0, 3.0), (99.0, 100.0, 101.0), (4998.0, 4999.0, 5000.0))):
        basis, _ = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))
        part = slice(30 * number, 30 * number + 30)
        hessian[part, part] = basis @ torch.diag(torch.tensor(values * 10, dtype=torch.float64)) @ basis.t()
    start = torch.randn(3, 30, generator=generator, dtype=torch.float64)

    def loss(p: Tensor) -> Tensor:
        return 0.5 * p.flatten() @ hessian @ p.flatten()

    def best(setting: str) -> float:
        """The lowest relative loss over a grid of learning rates, after 300 steps."""
        results = []
        for lr in (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3):
            p = nn.Parameter(start.clone())
            make = AdamMini if setting == "rows" else AdamW
            optimizer = make([p], lr=lr, betas=(0.0, 0.999), eps=0.0, weight_decay=0.0)
            for number in range(300):
                optimizer.zero_grad()
                loss(p).backward()
                if number == 0:
                    optimizer.step()
                    frozen = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999)
                else:
                    with torch.no_grad():  # the same update with v frozen
                        p -= lr * p.grad / frozen.sqrt()
            results.append((loss(p) / loss(start)).item())
        return min(r for r in results if math.isfinite(r))

    rows, dense = best("rows"), best("adamw")
    assert rows < 1e-12
    assert rows * 1e6 < dense


def blocks_of_25(seed: int) -> tuple[Tensor, Partition, Partition]:
    """A random positive block-diagonal Hessian of 100 coordinates, its true partition, and the same labels shuffled."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(25, 25, generator=generator, dtype=torch.float64) for _ in range(4)]
    labels = torch.arange(4).repeat_interleave(25)
    order = torch.randperm(100, generator=generator)
    true, shuffled = (Partition(name, ROWS, x) for name, x in (("true", labels), ("shuffled", labels[order])))
    return torch.block_diag(*(x @ x.t() for x in factors)), true, shuffled


def energies(hessian: Tensor, partition: Partition) -> Energies:
    """Exactly, from the Hessian itself."""
    same, square = partition.labels[:, None] == partition.labels, hessian.square()
    return Energies(square.sum().item(), square.diagonal().sum().item(), square[same].sum().item())


def hvp(hessian: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda direction: (hessian @ direction.flatten()).view_as(direction)


LINE = torch.zeros(100, 1, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_c7_the_estimator_of_block_structure(seed: int) -> None:
    hessian, true, shuffled = blocks_of_25(seed)
    total, _, (inside,) = sign_pair_energies(hvp(hessian), LINE, [true], num_probes=8)
    assert inside == pytest.approx(total, rel=1e-12)  # block signs cancel: exact for every pair
    assert energies(hessian, true).score(true.chance(1)) == pytest.approx(1, abs=1e-12)

    exact = energies(hessian, shuffled)
    assert abs(exact.score(shuffled.chance(1))) < 0.1
    assert exact.rho == pytest.approx(0.64, abs=0.03)  # which is why the diagonal and chance are taken off
    total, _, (inside,) = sign_pair_energies(hvp(hessian), LINE, [shuffled], num_probes=64)
    assert sum(inside) / sum(total) == pytest.approx(exact.rho, abs=0.06)

    plain = sign_pairs(hvp(hessian), LINE, [true, shuffled], num_probes=8)
    scaled = sign_pairs(hvp(7 * hessian), LINE, [true, shuffled], num_probes=8)
    assert [v.score for v in scaled] == pytest.approx([v.score for v in plain], rel=1e-9)
    total, diagonal, _ = sign_pair_energies(hvp(hessian.diagonal().diag()), LINE, [true], num_probes=8)
    assert diagonal == pytest.approx(total, rel=1e-12)


def small_llama() -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (50, 32), "model.layers.0.self_attn.q_proj.weight": (64, 32),
        "model.layers.0.self_attn.k_proj.weight": (16, 32), "model.layers.0.mlp.gate_proj.weight": (40, 32),
        "model.layers.0.input_layernorm.weight": (32,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *small_llama().items(),
        ("transformer.h.0.attn.c_attn.weight", (32, 96)),  # GPT-2's transposed Conv1D
        ("transformer.h.0.mlp.c_fc.weight", (32, 128)),
        ("decoder.layers.0.final_layer_norm.weight", (32,)),  # OPT: IndexError in the official code
        ("bert.embeddings.LayerNorm.weight", (32,)),
        ("mlp.norm.weight", (32,)),
        ("encoder.query_norm.weight", (32,)),
        ("mlp.conv.weight", (8, 4, 3, 3)),
        ("patch_embed.proj.weight", (32, 3, 4, 4)),
        ("pos_embed", (1, 17, 32)),
        ("experts.w1", (4, 24, 32)),
        ("attn.wkv_b.weight", (56, 20)),
        ("logit_scale", ()),
    ],
)
def test_c8_any_name_takes_a_step_and_no_matrix_gets_a_scalar(name: str, shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.ones(shape))
    optimizer = MemadviseOptimizer([(name, p)], mini("row"), lr=0.1)
    p.grad = torch.full(shape, 2.0)
    optimizer.step()
    assert torch.allclose(p, torch.full(shape, 0.9))
    assert optimizer.state[p]["exp_avg_sq"].numel() >= max(shape[0] if shape else 1, 1)
    if len(shape) > 1:
        assert optimizer.state[p]["exp_avg_sq"].numel() > 1


def models() -> Iterator[nn.Module]:
    """Tiny ones, with the parameter names and shapes of the real ones."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "vocab_size": 64, "intermediate_size": 48, "max_position_embeddings": 16}
    opt = {**small, "vocab_size": 64, "ffn_dim": 48, "max_position_embeddings": 16, "word_embed_proj_dim": 32}
    gpt2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    for config in (
        transformers.LlamaConfig(**text, num_key_value_heads=2, head_dim=16),
        transformers.GPT2Config(**gpt2, bos_token_id=0, eos_token_id=0),
        transformers.OPTConfig(**opt),
        transformers.BertConfig(**text),
        transformers.ViTConfig(**small, intermediate_size=48, image_size=16, patch_size=4),
    ):
        yield transformers.AutoModel.from_config(config)
    yield nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=4), nn.Linear(8, 4))


@pytest.mark.parametrize("make", [AdamMini, SlimAdam])
def test_c8_every_parameter_of_real_models_takes_a_step_and_no_matrix_gets_a_scalar(
    make: type[MemadviseOptimizer],
) -> None:
    for model in models():
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = make(model.named_parameters(), lr=0.1)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for name, p in model.named_parameters():
            assert (p != before[name]).all(), name
            one_row = p.numel() == p.shape[-1]  # a class token [1, 1, d]
            assert optimizer.state[p]["exp_avg_sq"].numel() > 1 or one_row, name


def test_c8_partitions_of_convolutions_and_expert_stacks() -> None:
    assert state_specs(mini("row"), (8, 4, 3, 3))["exp_avg_sq"].shape == (8, 1, 1, 1)
    assert state_specs(mini("row"), (6, 24, 32))["exp_avg_sq"].shape == (6, 24, 1)
    assert state_specs(mini("column"), (6, 24, 32))["exp_avg_sq"].shape == (6, 1, 32)
    assert state_specs(mini("head", heads=4), (24, 32))["exp_avg_sq"].shape == (4, 1)
    assert state_specs(mini("head", heads=4, axis=1), (32, 24))["exp_avg_sq"].shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "shape", "words"),
    [
        ({"partition": "token"}, (4, 4), "partition 'token' is none of"),
        ({"partition": "head"}, (4, 4), "needs the number of heads"),
        ({"partition": "head", "heads": 0}, (4, 4), "at least 1"),
        ({"partition": "head", "heads": 3}, (4, 4), r"the 4 rows of \[4, 4\] do not divide in 3 heads"),
        ({"partition": "row", "heads": 2}, (4, 4), "heads does not go with partition: row"),
        ({"partition": "whole", "axis": 1}, (4, 4), "axis would do nothing with partition: whole"),
        ({"partition": "row", "axis": 2}, (4, 4), "axis should be 0 or 1"),
        ({"partition": "row", "axis": 1}, (4,), "does not fit the shape"),
        ({"partition": "column"}, (4,), "one value for a vector"),
        ({"partition": "head", "heads": 2}, (), "does not fit the shape"),
        ({"partition": "head", "heads": 2}, (4, 4, 4), "3-D shape"),
        ({"segments": [[0, 2, 1], [3, 4, 1]]}, (4, 4), "should start at 2"),
        ({"segments": [[0, 3, 2]]}, (3, 4), "do not divide in 2 heads"),
        ({"segments": [[0, 2, 1]]}, (4, 4), "segments stop at 2, the fan-out axis at 4"),
        ({"segments": [[0, 2]]}, (4, 4), "list of"),
        ({"segments": [[0, 4, 2]], "heads": 2, "partition": "head"}, (4, 4), "exclude each other"),
        ({"segments": [[0, 4, 2]], "partition": "whole"}, (4, 4), "do not go with partition: whole"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(OptimizerError, match=words):
        validate(Setting("adam_mini", options), shape, name="p")
