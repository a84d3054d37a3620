"""The parameter shapes of the models that the papers' memory tables are about; nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable

from memadvise.optim.registry import fitted, state_bytes, state_specs
from memadvise.plan.schema import Setting

Shapes = dict[str, tuple[int, ...]]
Choose = Callable[[str, tuple[int, ...]], Setting]


def gpt2(width: int, layers: int, *, vocabulary: int = 50257, context: int = 1024, biases: bool = True) -> Shapes:
    """GPT-2 as Hugging Face names and transposes it (Conv1D ``[in, out]``), the head tied to ``wte``.

    117M: ``gpt2(768, 12)``, 124,439,808 parameters; 345M: ``gpt2(1024, 24)``, 354,823,168.
    """
    shapes: Shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    for i in range(layers):
        block = {
            "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
            "attn.c_attn.weight": (width, 3 * width), "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width), "attn.c_proj.bias": (width,),
            "mlp.c_fc.weight": (width, 4 * width), "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (4 * width, width), "mlp.c_proj.bias": (width,),
        }  # fmt: skip
        shapes.update({f"h.{i}.{name}": shape for name, shape in block.items()})
    shapes.update({"ln_f.weight": (width,), "ln_f.bias": (width,)})
    return shapes if biases else {name: shape for name, shape in shapes.items() if not name.endswith("bias")}


def gpt2_split(width: int = 768, layers: int = 12, *, vocabulary: int = 50304, context: int = 1024) -> Shapes:
    """The SlimAdam experiments' GPT-2: q, k and v apart, ``[out, in]``, no biases, vocabulary padded to 50304.

    124,373,760 parameters.
    """
    shapes: Shapes = {"wte": (vocabulary, width), "wpe": (context, width)}
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
            shapes[f"h.{i}.{name}"] = (width, width)
        shapes[f"h.{i}.mlp_up"] = (4 * width, width)
        shapes[f"h.{i}.mlp_down"] = (width, 4 * width)
        shapes.update({f"h.{i}.ln_1": (width,), f"h.{i}.ln_2": (width,)})
    return {**shapes, "ln_f": (width,)}


def llama(
    width: int = 4096, layers: int = 32, *, vocabulary: int = 32000, intermediate: int = 11008, kv_width: int = 4096
) -> Shapes:
    """Llama-2-7B by default: 6,738,415,616 parameters, an untied head."""
    shapes: Shapes = {"embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        block = {
            "self_attn.q_proj.weight": (width, width), "self_attn.k_proj.weight": (kv_width, width),
            "self_attn.v_proj.weight": (kv_width, width), "self_attn.o_proj.weight": (width, width),
            "mlp.gate_proj.weight": (intermediate, width), "mlp.up_proj.weight": (intermediate, width),
            "mlp.down_proj.weight": (width, intermediate),
            "input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,),
        }  # fmt: skip
        shapes.update({f"layers.{i}.{name}": shape for name, shape in block.items()})
    return {**shapes, "norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def everywhere(setting: Setting) -> Choose:
    """One setting for a whole model, as the classes apply it."""
    return lambda name, shape: fitted(setting, shape)


def numel(shapes: Shapes) -> int:
    """The number of parameters."""
    return sum(math.prod(shape) for shape in shapes.values())


def model_bytes(shapes: Shapes, choose: Choose) -> int:
    """The exact bytes of all state, from the methods' specs alone."""
    return sum(state_bytes(choose(name, shape), shape) for name, shape in shapes.items())


def kept_second_moments(shapes: Shapes, choose: Choose) -> int:
    """How many values of the second moment are kept."""
    return numel({name: state_specs(choose(name, shape), shape)["exp_avg_sq"].shape for name, shape in shapes.items()})
