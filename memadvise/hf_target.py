"""Targets from a transformers configuration: ``hf:DIR_OR_CONFIG_JSON``, random weights, random batches, no network.

Only the configuration is read, by classes that transformers itself ships; nothing is downloaded and no code that a
configuration points to is ever run.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memadvise.errors import TargetError, UsageError
from memadvise.target import Target, require

if TYPE_CHECKING:
    import torch

    _Maker = Callable[[torch.Generator], dict[str, torch.Tensor]]

DTYPES = ("bfloat16", "float16", "float32")
DEFAULT_SEQ_LEN = 2048
_DEFAULT_IMAGE_SIZE = 224  # of configurations that name none (ResNet, ConvNeXt)
_IGNORED_LABEL = -100
_MASKED_SHARE = 0.15  # of BERT's masked tokens
_OWN_FILE_HINT = "write build_model() and build_batches() in a Python file instead: memadvise init model.py"

# Tasks in the order in which one is chosen for a configuration that names no class with a loss; the names of the
# mappings are those of transformers.models.auto.modeling_auto. Bidirectional encoders appear among the causal
# models too (as decoders), so masked comes first.
_TASKS = {
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}


def hf_target(spec: str, *, batch_size: int = 1, seq_len: int | None = None, dtype: str = "bfloat16") -> Target:
    """The target of a transformers configuration.

    Args:
        spec: ``hf:`` and a folder that holds ``config.json``, or the path of such a file.
        batch_size: samples in a batch.
        seq_len: tokens in a sample; default: the configuration's maximum, at most 2048. Not used for images.
        dtype: of weights and gradients: bfloat16, float16 or float32.

    Returns:
        A target whose model has the class that ``architectures`` names, or the class of the model type's training
        task (masked or causal language model, sequence to sequence, image classification), with random weights.

    Raises:
        TargetError: no such file, not JSON, a model type or class that transformers lacks or that has no loss.
        UsageError: an option out of range. EnvironmentProblem: transformers is not installed.
    """
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"{name} is {value!r}, not a positive integer", hint=f"give {name} as 1, 2, 8 ...")
    if dtype not in DTYPES:
        raise UsageError(f"'{dtype}' is not a dtype to train in", hint=f"one of: {', '.join(DTYPES)}")

    path = _config_path(spec)
    raw = _read(path)
    require("transformers", "hf")
    config = _config(path, raw)
    task, model_class = _model_class(path, config)
    if task == "image":
        if seq_len is not None:
            raise UsageError(f"{path} is an image model, which takes no seq_len", hint="leave it out")
    else:
        seq_len = _sequence_length(path, config.get_text_config(), seq_len)

    def build_model() -> torch.nn.Module:
        import torch

        torch.manual_seed(0)
        with _default_dtype(dtype):
            try:
                return model_class(copy.deepcopy(config))  # type: ignore[no-any-return]
            except (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError) as error:
                raise TargetError(
                    f"transformers cannot build {model_class.__name__} from {path}: {type(error).__name__}: {error}",
                    hint="compare the sizes in the configuration with a published one of the same model type",
                ) from error

    def batches(make_batch: _Maker) -> Iterator[dict[str, torch.Tensor]]:
        import torch

        generator = torch.Generator().manual_seed(0)
        while True:
            yield make_batch(generator)

    def of_images(batch_size: int = batch_size) -> Iterator[dict[str, torch.Tensor]]:
        return batches(_image_maker(config, batch_size, dtype))

    def of_tokens(batch_size: int = batch_size, seq_len: int | None = seq_len) -> Iterator[dict[str, torch.Tensor]]:
        length = _sequence_length(path, config.get_text_config(), seq_len)
        return batches(_token_maker(config, task, batch_size, length))

    build_batches = of_images if task == "image" else of_tokens
    return Target(build_model=build_model, build_batches=build_batches, spec=spec, path=path)


# ---------------------------------------------------------------- the configuration


def _config_path(spec: str) -> Path:
    given = spec.removeprefix("hf:")
    if not given:
        raise TargetError(f"'{spec}' names no configuration", hint="give hf: and a folder or a config.json")
    path = Path(given).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise TargetError(
            f"there is no file {path}",
            hint="hf: takes a local folder or config.json; a model's config.json alone is enough, and nothing is "
            "downloaded for you",
        )
    return path.resolve()


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TargetError(f"{path} is not JSON ({error})", hint="give the config.json of a model") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise TargetError(f"{path} has no 'model_type'", hint="give the config.json of a transformers model")
    return raw


def _config(path: Path, raw: dict[str, Any]) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    model_type = raw["model_type"]
    if model_type not in CONFIG_MAPPING_NAMES:
        custom = "; its own code (auto_map) is never run" if "auto_map" in raw else ""
        raise TargetError(
            f"transformers {transformers.__version__} has no model type '{model_type}' ({path}){custom}",
            hint=_OWN_FILE_HINT,
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as error:  # whatever the configuration class of this type checks, in its own exception types
        raise TargetError(f"{path} is not a valid configuration of type '{model_type}': {error}") from error
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.use_cache = False  # training keeps no key/value cache
    return config


def _model_class(path: Path, config: Any) -> tuple[str, Any]:
    """(task, class): the first of ``architectures`` that has a loss we can feed, else by the model type's task."""
    import transformers
    from transformers.models.auto import modeling_auto

    mappings = {task: dict(getattr(modeling_auto, name)) for task, name in _TASKS.items()}
    named = list(getattr(config, "architectures", None) or [])
    for task, mapping in mappings.items():
        for name in named:
            if any(name in ((known,) if isinstance(known, str) else known) for known in mapping.values()):
                return task, getattr(transformers, name)
    for name in named:
        found = getattr(transformers, name, None)
        if found is None:
            raise TargetError(
                f"transformers {transformers.__version__} has no class {name}, which {path} names", hint=_OWN_FILE_HINT
            )
        if "labels" in inspect.signature(found.forward).parameters:  # a loss of its own, with inputs of its own
            raise TargetError(f"{path} names {name}, whose batches memadvise cannot make up", hint=_OWN_FILE_HINT)
    for task, mapping in mappings.items():  # no class, or a base class without a loss
        known = mapping.get(config.model_type)
        if known is not None and not (task == "masked" and getattr(config, "is_decoder", False)):
            return task, getattr(transformers, known if isinstance(known, str) else known[0])
    raise TargetError(
        f"memadvise knows no training task for model type '{config.model_type}' ({path})", hint=_OWN_FILE_HINT
    )


@contextlib.contextmanager
def _default_dtype(dtype: str) -> Iterator[None]:
    """Parameters are made in ``dtype``; buffers that ask for float32, such as rotary frequencies, keep it."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------- batches


def _token_maker(config: Any, task: str, batch_size: int, length: int) -> _Maker:
    vocab_size, num_labels = config.get_text_config().vocab_size, getattr(config, "num_labels", 2)

    def make(generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        # float32 and int64 on the CPU whatever the default dtype and device of the moment are.
        ids = torch.randint(vocab_size, (batch_size, length), generator=generator)
        if task == "sequence":
            labels = torch.randint(num_labels, (batch_size,), generator=generator)
        elif task == "token":
            labels = torch.randint(num_labels, (batch_size, length), generator=generator)
        elif task == "masked":
            chosen = torch.rand((batch_size, length), generator=generator, dtype=torch.float32) < _MASKED_SHARE
            chosen[:, 0] = True  # a short sample without a single label would have no loss
            labels = ids.masked_fill(~chosen, _IGNORED_LABEL)
        else:
            labels = ids.clone()  # transformers shifts them itself
        return {"input_ids": ids, "labels": labels}

    return make


def _image_maker(config: Any, batch_size: int, dtype: str) -> _Maker:
    size = getattr(config, "image_size", None) or _DEFAULT_IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    shape = (batch_size, getattr(config, "num_channels", 3), height, width)

    def make(generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        pixels = torch.randn(shape, generator=generator, dtype=torch.float32).to(getattr(torch, dtype))
        return {"pixel_values": pixels, "labels": torch.randint(config.num_labels, (batch_size,), generator=generator)}

    return make


def _sequence_length(path: Path, text: Any, seq_len: int | None) -> int:
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions"))
    limit = next((value for value in limits if isinstance(value, int) and value > 0), None)
    if seq_len is None:
        longest = min(DEFAULT_SEQ_LEN, limit) if limit else DEFAULT_SEQ_LEN
        # RoBERTa's 514 positions carry 512 tokens: its first two are padding.
        return longest - longest % 8 if longest > 8 else longest
    if limit is not None and seq_len > limit:
        raise UsageError(
            f"seq_len {seq_len} is longer than the {limit} positions of {path}",
            hint=f"give at most {limit}, or change max_position_embeddings in the configuration",
        )
    return seq_len
