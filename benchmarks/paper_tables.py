"""The papers' memory tables, from the methods' state specs alone: nothing is allocated, nothing is rounded by hand.

    python benchmarks/paper_tables.py

Each row stands beside the published figure and what that figure leaves out.
"""

from __future__ import annotations

from bench_support.output import table
from bench_support.shapes import (
    Choose,
    Shapes,
    everywhere,
    gpt2,
    gpt2_split,
    kept_second_moments,
    llama,
    model_bytes,
    numel,
)

from memadvise.optim.registry import state_specs
from memadvise.plan.schema import Setting

MIB, GIB, GB = 2**20, 2**30, 10**9
ADAMW = everywhere(Setting("adamw"))

# ---------------------------------------------------------------- Adapprox (2403.14958), CAME, Adafactor on GPT-2

GPT2 = {"117M": gpt2(768, 12), "345M": gpt2(1024, 24)}
GPT2_METHODS: dict[str, Setting] = {
    "AdamW": Setting("adamw"),
    "Adafactor, first moment": Setting("adafactor", {"momentum": 0.9}),
    "CAME": Setting("came"),
    "Adapprox, rank 1 (k_min)": Setting("adapprox", {"rank": 1}),
    "Adapprox, rank 1/4 (k_max)": Setting("adapprox"),
    "Adafactor": Setting("adafactor"),
    "Adapprox, rank 1, no first moment": Setting("adapprox", {"rank": 1, "momentum": False}),
    "Adapprox, rank 1/4, no first moment": Setting("adapprox", {"momentum": False}),
}


def saved(shapes: Shapes, setting: Setting) -> tuple[float, float]:
    """(MiB of state, per cent saved against AdamW)."""
    found, dense = model_bytes(shapes, everywhere(setting)), model_bytes(shapes, ADAMW)
    return found / MIB, 100 * (1 - found / dense)


PUBLISHED = {
    ("117M", "Adapprox, rank 1 (k_min)"): "49.9 %",
    ("117M", "Adapprox, rank 1/4 (k_max)"): "34.5 %",
    ("345M", "Adapprox, rank 1 (k_min)"): "49.9 %",
    ("345M", "Adapprox, rank 1/4 (k_max)"): "33.8 %",
    ("117M", "Adapprox, rank 1, no first moment"): "99.9 %",
    ("117M", "Adapprox, rank 1/4, no first moment"): "84.5 %",
    ("345M", "Adapprox, rank 1, no first moment"): "99.9 %",
    ("345M", "Adapprox, rank 1/4, no first moment"): "83.8 %",
}


def gpt2_rows() -> list[list[object]]:
    """Model, method, MiB, saved, published."""
    rows: list[list[object]] = []
    for model, shapes in GPT2.items():
        for label, setting in GPT2_METHODS.items():
            mib, percent = saved(shapes, setting)
            rows.append([model, label, f"{mib:.2f}", f"{percent:.2f} %", PUBLISHED.get((model, label), "")])
    return rows


# ---------------------------------------------------------------- Adam-mini (2406.16793) on Llama-2-7B

LLAMA = llama()


def adam_mini(name: str, shape: tuple[int, ...]) -> Setting:
    """The paper's partition: heads for query and key, one scalar for a norm, else one value an output row."""
    if "q_proj" in name or "k_proj" in name:
        return Setting("adam_mini", {"partition": "head", "heads": 32})
    return Setting("adam_mini", {"partition": "whole" if len(shape) == 1 else "row"})


def num_blocks(shapes: Shapes, choose: Choose) -> int:
    """The number of second moments."""
    return kept_second_moments(shapes, choose)


# ---------------------------------------------------------------- SlimAdam (2503.01843) on its GPT-2

SLIM = gpt2_split()


def slim_static(name: str, shape: tuple[int, ...]) -> Setting:
    """The paper's rule table: fan_in of query, key and tables; fan_out of value, output and MLP; norms in full."""
    if len(shape) == 1:
        return Setting("adamw")
    axis = 1 if name in ("wte", "wpe") or name.endswith(("q_proj", "k_proj")) else 0
    return Setting("slimadam", {"axes": [axis]})


def slim_measured(name: str, shape: tuple[int, ...]) -> Setting:
    """The rules shipped for a cutoff of 1 (SNR at lr 3e-4): the static table with one full tensor and four turned."""
    if name == "h.2.q_proj":
        return Setting("adamw")
    if name == "h.3.q_proj":
        return Setting("slimadam", {"axes": [0]})
    if name in ("h.9.mlp_up", "h.10.mlp_up", "h.11.mlp_up"):
        return Setting("slimadam", {"axes": [1]})
    return slim_static(name, shape)


# ---------------------------------------------------------------- MicroAdam (2405.15593), APOLLO (2412.05270) at 7B


def micro_adam(window: int) -> int:
    """Bytes of MicroAdam's state at 7B with the buckets of 100,000 of the authors' scripts and blocks that fit."""
    options = {"window": window, "block": 20_000, "bucket": 100_000}
    return model_bytes(LLAMA, everywhere(Setting("micro_adam", options)))


def projected() -> Shapes:
    """The tensors APOLLO projects: attention and MLP matrices."""
    return {name: shape for name, shape in LLAMA.items() if "proj" in name}


def rest() -> Shapes:
    """What the paper's figure leaves out: embedding, head and norms."""
    return {name: shape for name, shape in LLAMA.items() if "proj" not in name}


def as_bf16(shapes: Shapes, choose: Choose) -> int:
    """The bytes if floating state were bfloat16, as in the paper; ours is float32 (bfloat16 averages freeze)."""
    total = 0
    for name, shape in shapes.items():
        for spec in state_specs(choose(name, shape), shape).values():
            total += spec.num_bytes // (2 if spec.dtype.is_floating_point and spec.shape else 1)
    return total


def llama_rows() -> list[list[object]]:
    """Method, ours, published, what is left out."""
    apollo, mini = everywhere(Setting("apollo", {"rank": 256})), everywhere(Setting("apollo_mini"))
    embedding = as_bf16(rest(), ADAMW)
    return [
        ["AdamW", f"{model_bytes(LLAMA, ADAMW) / GB:.2f} GB", "53.92 GB", "nothing"],
        ["Adam-mini", f"{model_bytes(LLAMA, adam_mini) / GB:.2f} GB", "26.96 GB",
         f"nothing; {num_blocks(LLAMA, adam_mini):,} blocks"],
        ["MicroAdam, window 10", f"{micro_adam(10) / GIB:.2f} GiB", "5.65 GiB",
         f"nothing; {micro_adam(10) / numel(LLAMA):.3f} B a parameter"],
        ["MicroAdam, window 20", f"{micro_adam(20) / GIB:.2f} GiB", "8.16 GiB", "nothing"],
        ["APOLLO, rank 256, in bf16", f"{as_bf16(projected(), apollo) / GB:.2f} GB", "1.6 GB",
         f"embedding, head, norms: {embedding / GB:.2f} GB of AdamW's state in bf16"],
        ["APOLLO, rank 256, as we keep it", f"{model_bytes(projected(), apollo) / GB:.2f} GB", "",
         f"embedding, head, norms: {model_bytes(rest(), ADAMW) / GB:.2f} GB of AdamW's state"],
        ["APOLLO-Mini, in bf16", f"{as_bf16(projected(), mini) / GB:.4f} GB", "0.0 GB", "the same"],
        ["APOLLO-Mini, as we keep it", f"{model_bytes(projected(), mini) / GB:.4f} GB", "", "the same"],
    ]  # fmt: skip


def slim_rows() -> list[list[object]]:
    """Rules, kept values, saved."""
    total = numel(SLIM)
    rows: list[list[object]] = []
    for label, choose, published in (
        ("static table", slim_static, "99.88 % (153,472)"), ("measured, cutoff 1", slim_measured, "99.40 % (749,440)"),
    ):  # fmt: skip
        kept = kept_second_moments(SLIM, choose)
        rows.append([label, kept, f"{100 * (1 - kept / total):.2f} %", published])
    return rows


def main() -> None:
    """Print the tables."""
    print("GPT-2, all parameters, float32 state (Adapprox, 2403.14958, abstract and source; vectors keep full state)\n")
    print(table(["model", "method", "MiB", "saved", "published"], gpt2_rows()))
    print("\nGPT-2 124M of the SlimAdam experiments (2503.01843): second moments kept;")
    print("left out: the first moment, as large as AdamW's\n")
    print(table(["rules", "kept", "saved", "published"], slim_rows()))
    print("\nLlama-2-7B, 6,738,415,616 parameters (Adam-mini 2406.16793, MicroAdam 2405.15593, APOLLO 2412.05270)\n")
    print(table(["method", "state", "published", "left out of the figure"], llama_rows()))


if __name__ == "__main__":
    main()
