"""Roles of parameters of real (tiny) models; every name here is chosen to mislead whoever reads names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memadvise.ledger import Parameter, Segment
from memadvise.roles import describe_parameters, fingerprint
from memadvise.switches import apply_checkpoint

IDS = torch.arange(24).view(2, 12) % 50
WIDTH, HEADS = 16, 4
HEAD_DIM = WIDTH // HEADS


def describe(model: nn.Module, loss: Callable[[], torch.Tensor] | None = None) -> dict[str, Parameter]:
    found = describe_parameters(model, loss)
    assert [p.name for p in found] == [name for name, _ in model.named_parameters()]
    return {p.name: p for p in found}


def roles(found: dict[str, Parameter], prefix: str = "") -> dict[str, str]:
    """Roles of the matrices below ``prefix``."""
    return {
        name.removeprefix(prefix).removesuffix(".weight"): p.role
        for name, p in found.items()
        if name.startswith(prefix) and len(p.shape) > 1
    }


def blocked(*parts: tuple[str, int, int]) -> tuple[Segment, ...]:
    """(role, rows, heads) one after the other."""
    segments, position = [], 0
    for role, rows, heads in parts:
        segments.append(Segment(f"attention_{role}", position, position + rows, heads))
        position += rows
    return tuple(segments)


# ---------------------------------------------------------------- transformers


def transformers_model(kind: str, attention: str, **changes: Any) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    import transformers as hf

    common = {"vocab_size": 50, "attn_implementation": attention, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    text = {"input_ids": IDS, "labels": IDS}
    model: Any
    if kind == "gpt2":
        config = hf.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=16, **common, **changes)
        model, batch = hf.GPT2LMHeadModel(config), text
    elif kind == "llama":
        config = hf.LlamaConfig(num_key_value_heads=2, **sizes, **common, **changes)
        model, batch = hf.LlamaForCausalLM(config), text
    elif kind == "bert":
        model, batch = hf.BertForMaskedLM(hf.BertConfig(**sizes, **common, **changes)), text
    elif kind == "neox":
        model, batch = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes, **common, **changes)), text
    elif kind == "phi3":
        config = hf.Phi3Config(num_key_value_heads=2, pad_token_id=0, **sizes, **common, **changes)
        model, batch = hf.Phi3ForCausalLM(config), text
    else:
        config = hf.ViTConfig(image_size=8, patch_size=4, num_channels=1, attn_implementation=attention, **sizes)
        model = hf.ViTForImageClassification(config)
        batch = {"pixel_values": torch.ones(2, 1, 8, 8), "labels": torch.tensor([0, 1])}
    return model.train(), lambda: model(**batch).loss


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_gpt2_with_its_transposed_fused_projection(attention: str) -> None:
    found = describe(*transformers_model("gpt2", attention))
    for layer in range(2):
        prefix = f"transformer.h.{layer}."
        assert roles(found, prefix) == {
            "attn.c_attn": "attention_qkv",
            "attn.c_proj": "attention_output",
            "mlp.c_fc": "mlp_up",
            "mlp.c_proj": "mlp_down",
        }
        fused = found[f"{prefix}attn.c_attn.weight"]
        assert (fused.shape, fused.fan_in, fused.fan_out) == ((16, 48), (0,), (1,))
        assert fused.segments == blocked(("query", 16, 4), ("key", 16, 4), ("value", 16, 4))
        assert found[f"{prefix}mlp.c_fc.weight"].fan_out == (1,)
        assert found[f"{prefix}ln_1.weight"].role == "norm"
        assert found[f"{prefix}attn.c_attn.bias"].role == "bias"
    tied = found["transformer.wte.weight"]
    assert (tied.role, tied.aliases) == ("tied_embedding", ("lm_head.weight",))
    assert found["transformer.wpe.weight"].role == "position_embedding"


def test_llama_with_grouped_queries(attention: str) -> None:
    found = describe(*transformers_model("llama", attention))
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        assert roles(found, prefix) == {
            "self_attn.q_proj": "attention_query",
            "self_attn.k_proj": "attention_key",
            "self_attn.v_proj": "attention_value",
            "self_attn.o_proj": "attention_output",
            "mlp.gate_proj": "mlp_gate",
            "mlp.up_proj": "mlp_up",
            "mlp.down_proj": "mlp_down",
        }
        heads = [found[f"{prefix}self_attn.{name}_proj.weight"].heads for name in "qkvo"]
        assert heads == [4, 2, 2, 4]
        assert found[f"{prefix}input_layernorm.weight"].role == "norm"
    assert found["model.embed_tokens.weight"].role == "token_embedding"
    assert found["lm_head.weight"].role == "head"


def test_llama_with_a_head_size_of_its_own() -> None:
    found = describe(*transformers_model("llama", "sdpa", head_dim=8))
    query = found["model.layers.0.self_attn.q_proj.weight"]
    assert (query.shape, query.heads) == ((32, 16), 4)  # not width / heads


def test_bert_whose_embeddings_hold_a_norm(attention: str) -> None:
    found = describe(*transformers_model("bert", attention))
    assert roles(found, "bert.encoder.layer.1.") == {
        "attention.self.query": "attention_query",
        "attention.self.key": "attention_key",
        "attention.self.value": "attention_value",
        "attention.output.dense": "attention_output",
        "intermediate.dense": "mlp_up",
        "output.dense": "mlp_down",
    }
    assert found["bert.embeddings.LayerNorm.weight"].role == "norm"
    assert found["bert.encoder.layer.0.attention.self.query.bias"].role == "bias"
    assert found["bert.embeddings.word_embeddings.weight"].role == "tied_embedding"
    assert found["bert.embeddings.position_embeddings.weight"].role == "position_embedding"
    assert found["cls.predictions.transform.dense.weight"].role == "linear"  # before the head, no residual


def test_vit_and_its_bare_position_table(attention: str) -> None:
    found = describe(*transformers_model("vit", attention))
    # What the blocks are called changes between versions of transformers; what they are does not.
    blocks = [role for name, role in roles(found).items() if ".0." in name]
    assert sorted(blocks) == sorted(
        ["attention_query", "attention_key", "attention_value", "attention_output", "mlp_up", "mlp_down"]
    )
    patches = found["vit.embeddings.patch_embeddings.projection.weight"]
    assert (patches.role, patches.fan_in, patches.fan_out) == ("patch_embedding", (1, 2, 3), (0,))
    table = found["vit.embeddings.position_embeddings"]
    assert (table.role, table.shape, table.fan_in, table.fan_out) == ("position_embedding", (1, 5, 16), (2,), (1,))
    assert found["vit.embeddings.cls_token"].role == "vector"
    assert found["classifier.weight"].role == "head"


def test_neox_interleaves_by_head_and_gets_no_segments(attention: str) -> None:
    found = describe(*transformers_model("neox", attention))
    fused = found["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert (fused.role, fused.segments, fused.heads) == ("attention_qkv", (), None)
    assert found["gpt_neox.layers.0.attention.dense.weight"].role == "attention_output"


def test_phi3_fuses_with_fewer_keys_than_queries(attention: str) -> None:
    found = describe(*transformers_model("phi3", attention))
    fused = found["model.layers.0.self_attn.qkv_proj.weight"]
    assert fused.segments == blocked(("query", 16, 4), ("key", 8, 2), ("value", 8, 2))
    assert found["model.layers.0.mlp.gate_up_proj.weight"].role == "mlp_up"


def test_the_same_under_fake_tensors_and_under_checkpointing() -> None:
    real = describe_parameters(*transformers_model("llama", "sdpa"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert describe_parameters(*transformers_model("llama", "sdpa")) == real
    model, loss = transformers_model("llama", "sdpa")
    assert apply_checkpoint(model, ["model.layers.*"])
    assert describe_parameters(model, loss) == real


# ---------------------------------------------------------------- modules with misleading names


class Fused(nn.Module):
    """Attention with one projection; ``layout`` says how its rows are ordered."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.mlp_norm = nn.Linear(WIDTH, 3 * WIDTH)  # a wrong name
        self.key = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        y = self.mlp_norm(x)
        if self.layout == "timm":
            q, k, v = y.reshape(b, n, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.layout == "chunk":
            q, k, v = (t.view(b, n, HEADS, HEAD_DIM).transpose(1, 2) for t in y.chunk(3, dim=-1))
        elif self.layout == "values first":
            v, q, k = (t.view(b, n, HEADS, HEAD_DIM).transpose(1, 2) for t in y.split(WIDTH, dim=-1))
        elif self.layout == "neox":
            q, k, v = y.view(b, n, HEADS, 3 * HEAD_DIM).transpose(1, 2).chunk(3, dim=-1)
        elif self.layout == "strided heads":
            q, k, v = (t.view(b, n, HEAD_DIM, HEADS).permute(0, 3, 1, 2) for t in y.chunk(3, dim=-1))
        elif self.layout == "rotated":
            q, k, v = (t.view(b, n, HEADS, HEAD_DIM).transpose(1, 2) for t in y.chunk(3, dim=-1))
            angle = torch.linspace(0, 1, n).unsqueeze(1)
            q, k = (
                t * angle.cos() + torch.cat((-t[..., HEAD_DIM // 2 :], t[..., : HEAD_DIM // 2]), -1) * angle.sin()
                for t in (q, k)
            )
        else:  # "gather": by indices, which the graph does not show
            index = torch.arange(3 * WIDTH)
            q, k, v = (
                y[..., index[i * WIDTH : (i + 1) * WIDTH]].view(b, n, HEADS, HEAD_DIM).transpose(1, 2) for i in range(3)
            )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.key(y.transpose(1, 2).reshape(b, n, WIDTH))


class Wrapped(nn.Module):
    """Embedding, one residual block, head: the least that has a beginning and an end."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.query, self.block, self.norm = nn.Embedding(50, WIDTH), block, nn.LayerNorm(WIDTH)
        self.value = nn.Linear(WIDTH, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.query(ids)
        return self.value(x + self.block(self.norm(x)))

    def loss(self) -> torch.Tensor:
        return F.cross_entropy(self(IDS).flatten(0, 1), IDS.flatten())


IN_ORDER = blocked(("query", WIDTH, HEADS), ("key", WIDTH, HEADS), ("value", WIDTH, HEADS))


@pytest.mark.parametrize(
    ("layout", "segments"),
    [
        ("timm", IN_ORDER),
        ("chunk", IN_ORDER),
        ("rotated", IN_ORDER),
        ("values first", blocked(("value", WIDTH, HEADS), ("query", WIDTH, HEADS), ("key", WIDTH, HEADS))),
        ("strided heads", tuple(Segment(s.role, s.start, s.stop, None) for s in IN_ORDER)),
        ("neox", ()),
        ("gather", ()),
    ],
)
def test_the_rows_of_a_fused_projection(layout: str, segments: tuple[Segment, ...]) -> None:
    model = Wrapped(Fused(layout))
    found = describe(model, model.loss)
    fused = found["block.mlp_norm.weight"]
    assert fused.role == "attention_qkv"
    assert fused.segments == segments
    assert found["block.key.weight"].role == "attention_output"
    assert found["block.key.weight"].heads == HEADS
    assert found["query.weight"].role == "token_embedding"
    assert found["value.weight"].role == "head"


def test_segments_are_the_rows_that_really_feed_the_query() -> None:
    """The graph's word against the gradient's: which rows of the weight does the query depend on?"""
    model = Wrapped(Fused("values first"))
    weight = model.block.mlp_norm.weight  # type: ignore[union-attr]
    seen: dict[str, torch.Tensor] = {}
    original = F.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for name, tensor in (("query", q), ("key", k), ("value", v)):
            (gradient,) = torch.autograd.grad(tensor.sum(), weight, retain_graph=True)  # type: ignore[arg-type]
            seen[f"attention_{name}"] = gradient.abs().sum(1).nonzero().flatten()
        return original(q, k, v)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        model.loss()
    for segment in describe(model, model.loss)["block.mlp_norm.weight"].segments:
        assert seen[segment.role].tolist() == list(range(segment.start, segment.stop))


def test_transformer_encoder_layer_whose_names_no_rule_knows() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    model = Wrapped(nn.Sequential(layer, nn.TransformerEncoderLayer(WIDTH, HEADS, 32, norm_first=True)))
    for found in (describe(model), describe(model, model.loss)):
        for number in range(2):
            fused = found[f"block.{number}.self_attn.in_proj_weight"]
            assert (fused.role, fused.segments) == ("attention_qkv", IN_ORDER)
            assert found[f"block.{number}.self_attn.in_proj_bias"].role == "bias"
            assert found[f"block.{number}.norm1.weight"].role == "norm"
    assert roles(found, "block.1.") == {
        "self_attn.in_proj_weight": "attention_qkv",
        "self_attn.out_proj": "attention_output",
        "linear1": "mlp_up",
        "linear2": "mlp_down",
    }


def test_multihead_attention_with_separate_weights() -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, kdim=8, vdim=12, add_bias_kv=True)
    found = describe(module)
    assert [found[f"{n}_proj_weight"].role for n in "qkv"] == [f"attention_{n}" for n in ("query", "key", "value")]
    assert found["q_proj_weight"].heads == HEADS
    assert found["in_proj_bias"].role == found["bias_k"].role == "bias"


def test_cross_attention_that_slices_one_weight() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x.flip(1), x.flip(1))[0]

    model = Wrapped(Cross())
    found = describe(model, model.loss)
    assert found["block.attention.in_proj_weight"].segments == IN_ORDER
    assert found["block.attention.out_proj.weight"].role == "attention_output"


class Named(nn.Module):
    """An MLP whose parts have the names of other things."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.k_proj, self.monkey = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.embed = nn.Linear(24, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "plain":
            return self.embed(F.gelu(self.k_proj(x)))
        if self.kind == "gated":
            return self.embed(self.k_proj(x) * F.silu(self.monkey(x)))
        if self.kind == "by hand":  # GPT-2's GELU, with a sum inside
            y = self.k_proj(x)
            return self.embed(0.5 * y * (1 + torch.tanh(0.8 * (y + 0.04 * y**3))))
        return self.embed(self.k_proj(x) + self.monkey(x))  # no activation


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", {"k_proj": "mlp_up", "monkey": "linear", "embed": "mlp_down"}),
        ("gated", {"k_proj": "mlp_up", "monkey": "mlp_gate", "embed": "mlp_down"}),
        ("by hand", {"k_proj": "mlp_up", "monkey": "linear", "embed": "mlp_down"}),
        ("linear", {"k_proj": "linear", "monkey": "linear", "embed": "linear"}),
    ],
)
def test_mlps_are_known_by_what_flows_through_them(kind: str, expected: dict[str, str]) -> None:
    model = Wrapped(Named(kind))
    assert roles(describe(model, model.loss), "block.") == expected


def test_a_chain_of_layers_without_a_residual_stays_linear_up_to_its_head() -> None:
    model = nn.ModuleDict(
        {"network": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))}
    )
    network = model["network"]
    found = describe(model, lambda: F.mse_loss(network(torch.ones(4, 8)), torch.zeros(4, 3)))
    assert roles(found) == {"network.0": "linear", "network.2": "linear", "network.4": "head"}


def test_convolutions_and_norms_of_a_small_network() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(2, 8),
        nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(4 * 25, 10),
    )  # fmt: skip
    found = describe(model, lambda: F.cross_entropy(model(torch.ones(2, 3, 8, 8)), torch.tensor([1, 2])))
    assert roles(found) == {"0": "patch_embedding", "3": "conv", "5": "conv", "7": "head"}
    assert (found["3.weight"].fan_in, found["3.weight"].fan_out) == ((1, 2, 3), (0,))
    assert (found["5.weight"].fan_in, found["5.weight"].fan_out) == ((0, 2, 3), (1,))
    assert found["1.weight"].role == found["1.bias"].role == found["4.weight"].role == "norm"
    assert found["0.bias"].role == "bias"


def test_behind_a_frozen_stem_no_convolution_sees_the_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model[0].requires_grad_(False)
    found = describe(model, lambda: model(torch.ones(2, 3, 8, 8)).sum())
    assert roles(found) == {"0": "conv", "2": "conv"}
    assert [found[f"{i}.weight"].trainable for i in (0, 2)] == [False, True]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights(kind: type[nn.RNNBase]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.query = kind(WIDTH, 12, num_layers=2), nn.Linear(12, 50)
            self.wte = nn.Embedding(50, WIDTH)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.query(self.rnn(self.wte(ids))[0]).flatten(0, 1), ids.flatten())

    model = Model()
    found = describe(model, lambda: model(IDS))
    assert set(roles(found, "rnn.").values()) == {"recurrent"}
    assert found["rnn.bias_hh_l1"].role == "bias"
    assert found["query.weight"].role == "head"


# ---------------------------------------------------------------- ties, bare parameters, what stays open


class Bare(nn.Module):
    """No module owns a weight: everything is a parameter of this one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.randn(50, WIDTH))
        self.ln_f = nn.Parameter(torch.randn(1, 20, WIDTH))
        self.bias_table = nn.Parameter(torch.randn(WIDTH, 24))
        self.gamma = nn.Parameter(torch.randn(24, WIDTH))
        self.unused = nn.Parameter(torch.randn(3, 4))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, self.norm) + self.ln_f[:, : ids.shape[1]]
        x = x + F.relu(x * self.scale @ self.bias_table) @ self.gamma
        x = x + torch.einsum("btd,edf->btf", x, self.experts)
        return F.cross_entropy(F.linear(x, self.norm).flatten(0, 1), ids.flatten())


def test_bare_parameters_are_known_by_their_use() -> None:
    model = Bare()
    found = describe(model, lambda: model(IDS))
    assert (found["ln_f"].role, found["ln_f"].fan_out) == ("position_embedding", (1,))
    assert (found["bias_table"].role, found["bias_table"].fan_in, found["bias_table"].fan_out) == ("mlp_up", (0,), (1,))
    assert found["gamma"].role == "mlp_down"
    assert found["norm"].role == "tied_embedding"
    assert found["scale"].role == "vector"
    assert found["unused"].role == found["experts"].role == "unknown"
    assert found["experts"].fan_out == ()
    without = describe(model)
    assert {p.role for p in without.values()} == {"unknown", "vector"}


def test_a_tie_that_only_the_forward_pass_shows() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, WIDTH)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(F.linear(self.table(ids), self.table.weight).flatten(0, 1), ids.flatten())

    model = Tied()
    assert describe(model)["table.weight"].role == "token_embedding"
    assert describe(model, lambda: model(IDS))["table.weight"].role == "tied_embedding"


def test_a_weight_used_both_ways_round_has_no_axes() -> None:
    layer = nn.Linear(8, 6, bias=False)
    x = torch.ones(3, 8)
    found = describe(layer, lambda: ((x @ layer.weight.T).relu() @ layer.weight).sum())
    assert (found["weight"].role, found["weight"].fan_in, found["weight"].fan_out) == ("linear", (), ())


def test_gated_attention_projections_that_feed_more_than_the_query_stay_linear() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(WIDTH, 2 * WIDTH)
            self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, n, _ = x.shape
            q, gate = self.query(x).chunk(2, -1)
            heads = (t.view(b, n, HEADS, -1).transpose(1, 2) for t in (q, self.key(x), self.value(x)))
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(b, n, -1) * gate.sigmoid()

    model = Wrapped(Gated())
    assert roles(describe(model, model.loss), "block.") == {
        "query": "linear", "key": "attention_key", "value": "attention_value",
    }  # fmt: skip


def test_without_a_forward_pass_modules_speak_for_themselves() -> None:
    found = describe(transformers_model("gpt2", "sdpa")[0])
    assert found["transformer.h.0.attn.c_attn.weight"].role == "linear"
    assert found["transformer.h.0.attn.c_attn.weight"].fan_out == (1,)
    assert found["transformer.wte.weight"].role == "tied_embedding"
    assert found["transformer.wpe.weight"].role == "token_embedding"  # only its use tells


def test_tables_indexed_by_converted_inputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.things = nn.Embedding(12, WIDTH), nn.Embedding(50, WIDTH)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return (self.places(torch.arange(ids.shape[1])) + self.things(ids.long())).sum()

    model = Model()
    found = describe(model, lambda: model(IDS.to(torch.int32)))
    assert found["things.weight"].role == "token_embedding"
    assert found["places.weight"].role == "position_embedding"


def test_hooks_are_gone_afterwards_also_when_the_model_raises() -> None:
    model = Wrapped(Named("plain"))
    describe(model, model.loss)
    with pytest.raises(RuntimeError, match="on purpose"):
        describe_parameters(model, lambda: (_ for _ in ()).throw(RuntimeError("on purpose")))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_names_are_canonical_and_bytes_exact() -> None:
    inner = nn.Sequential(nn.Linear(4, 3)).to(torch.bfloat16)
    model = nn.Module()
    model._orig_mod = inner
    (weight, bias) = describe_parameters(model)
    assert (weight.name, weight.module, weight.module_type) == ("0.weight", "0", "Linear")
    assert (weight.dtype, weight.num_bytes, weight.numel) == ("bfloat16", 24, 12)
    assert bias.num_bytes == 6


def test_fingerprint_is_of_names_shapes_and_dtypes_of_what_is_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    parameters = describe_parameters(model)
    base = fingerprint(parameters)
    assert base.startswith("sha256:")
    assert len(base) == 7 + 64
    assert fingerprint(reversed(parameters)) == base
    assert fingerprint(describe_parameters(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))) == base
    assert fingerprint(describe_parameters(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)))) != base
    assert fingerprint(describe_parameters(model.double())) != base
    model.float()[1].requires_grad_(False)
    assert fingerprint(describe_parameters(model)) != base
