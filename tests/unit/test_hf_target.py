from __future__ import annotations

import builtins
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from memadvise.errors import EnvironmentProblem, TargetError, UsageError
from memadvise.hf_target import hf_target
from memadvise.target import load_target

TINY: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 24,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50,
        "n_positions": 16,
    },
    "bert": {
        "architectures": ["BertModel"], "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 20,
    },
    "roberta": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
        "max_position_embeddings": 26, "pad_token_id": 1,
    },
    "vit": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8,
        "patch_size": 4, "num_channels": 1,
    },
    "t5": {
        "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
        "decoder_start_token_id": 0,
    },
}  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",  # the configuration names the class without a loss
    "roberta": "RobertaForMaskedLM",
    "vit": "ViTForImageClassification",
    "t5": "T5ForConditionalGeneration",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write(folder: Path, model_type: str, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": model_type, **TINY.get(model_type, {}), **changes}))
    return path


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_a_configuration_becomes_a_model_that_trains(model_type: str, tmp_path: Path) -> None:
    options = {"batch_size": 2, "dtype": "float32", **({"seq_len": 12} if model_type == "t5" else {})}
    target = load_target(f"hf:{write(tmp_path, model_type)}", options=options)
    model, batches = target.model(), target.batches(2)
    assert type(model).__name__ == CLASSES[model_type]
    assert not torch.equal(next(iter(batches[0].values())), next(iter(batches[1].values())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [float(target.step(model.eval(), batches[0], optimizer) or 0.0) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_two_builds_are_identical(tmp_path: Path) -> None:
    target = hf_target(f"hf:{write(tmp_path, 'llama')}")
    first, second = target.model().state_dict(), target.model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(target.batches(1)[0]["input_ids"], target.batches(1)[0]["input_ids"])


def test_a_folder_names_its_configuration(tmp_path: Path) -> None:
    path = write(tmp_path, "llama")
    target = hf_target(f"hf:{tmp_path}")
    assert target.path == path.resolve()
    assert target.sha256() is not None


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_weights_have_the_dtype_and_rotary_frequencies_keep_float32(
    dtype: str, kind: torch.dtype, tmp_path: Path
) -> None:
    model = hf_target(f"hf:{write(tmp_path, 'llama')}", dtype=dtype).model()
    assert {p.dtype for p in model.parameters()} == {kind}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32


def test_no_cache_is_kept(tmp_path: Path) -> None:
    target = hf_target(f"hf:{write(tmp_path, 'llama', use_cache=True)}")
    output = target.model()(**target.batches(1)[0])
    assert output.past_key_values is None


@pytest.mark.parametrize(
    ("model_type", "seq_len", "length"),
    [("llama", None, 24), ("llama", 5, 5), ("roberta", None, 24), ("t5", None, 2048), ("bert", None, 16)],
)
def test_samples_are_as_long_as_asked_for_or_as_the_configuration_allows(
    model_type: str, seq_len: int | None, length: int, tmp_path: Path
) -> None:
    (batch,) = hf_target(f"hf:{write(tmp_path, model_type)}", batch_size=3, seq_len=seq_len).batches(1)
    assert batch["input_ids"].shape == (3, length)
    assert int(batch["input_ids"].max()) < 50


def test_masked_models_learn_about_one_token_in_seven(tmp_path: Path) -> None:
    (batch,) = hf_target(f"hf:{write(tmp_path, 'bert')}", batch_size=200).batches(1)
    share = (batch["labels"] != -100).float().mean().item()
    assert 0.15 < share < 0.26  # 15 % and the first token of each sample of 16
    assert (batch["labels"] != -100).any(dim=1).all()


@pytest.mark.parametrize(
    ("architecture", "shape"), [("BertForSequenceClassification", (2,)), ("BertForTokenClassification", (2, 16))]
)
def test_classifiers_get_labels_of_their_shape(architecture: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    target = hf_target(f"hf:{write(tmp_path, 'bert', architectures=[architecture])}", batch_size=2, dtype="float32")
    model, (batch,) = target.model(), target.batches(1)
    assert type(model).__name__ == architecture
    assert batch["labels"].shape == shape
    assert target.loss(model, batch).isfinite()


def test_image_batches_follow_the_configuration(tmp_path: Path) -> None:
    (batch,) = hf_target(f"hf:{write(tmp_path, 'vit')}", batch_size=5).batches(1)
    assert batch["pixel_values"].shape == (5, 1, 8, 8)
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["labels"].shape == (5,)


def failure(spec: str, kind: type[Exception] = TargetError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        hf_target(spec, **options).model()
    return str(caught.value)


def test_a_missing_file_is_named_and_nothing_is_downloaded(tmp_path: Path) -> None:
    assert "config.json" in failure(f"hf:{tmp_path}")
    text = failure("hf:meta-llama/Llama-2-7b-hf")
    assert "there is no file meta-llama/Llama-2-7b-hf" in text
    assert "nothing is downloaded" in text
    assert "names no configuration" in failure("hf:")


@pytest.mark.parametrize("content", ["{", "", "\xff\xfe", "[1]", "{}", '{"model_type": 3}'])
def test_what_is_no_configuration_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    text = failure(f"hf:{path}")
    assert str(path) in text
    assert "is not JSON" in text or "has no 'model_type'" in text


def test_unknown_model_types_are_named_and_their_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    path = write(tmp_path, "nope", auto_map={"AutoConfig": "evil.Config"})
    text = failure(f"hf:{path}")
    assert "no model type 'nope'" in text
    assert "never run" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForDreaming"]}, "no class LlamaForDreaming"),
        ({"hidden_size": "wide"}, "not a valid configuration of type 'llama'"),
        ({"num_attention_heads": 0}, "not a valid configuration of type 'llama'"),
        ({"hidden_act": "unheard-of"}, "cannot build LlamaForCausalLM"),
    ],
)
def test_a_wrong_configuration_is_a_target_error(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    text = failure(f"hf:{write(tmp_path, 'llama', **changes)}")
    assert words in text
    assert str(tmp_path) in text


def test_a_class_with_inputs_of_its_own_is_refused(tmp_path: Path) -> None:
    text = failure(f"hf:{write(tmp_path, 'bert', architectures=['BertForPreTraining'])}")
    assert "BertForPreTraining" in text
    assert "memadvise init" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"seq_len": -4}, "seq_len is -4"),
        ({"seq_len": 25}, "longer than the 24 positions"),
        ({"dtype": "float8"}, "'float8' is not a dtype"),
    ],
)
def test_options_out_of_range_are_usage_errors(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in failure(f"hf:{write(tmp_path, 'llama')}", UsageError, **options)


def test_images_take_no_sequence_length(tmp_path: Path) -> None:
    assert "image model" in failure(f"hf:{write(tmp_path, 'vit')}", UsageError, seq_len=8)


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "llama")
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("memadvise.target.importlib.import_module", without)
    assert "pip install 'memadvise[hf]'" in failure(f"hf:{path}", EnvironmentProblem)
