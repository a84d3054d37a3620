"""What an optimizer step costs in time, relative to AdamW's, as ``benchmarks/results/cpu_step_time.txt`` measured it.

CPU seconds of one thread over those of torch's fused AdamW, float32, 42 million parameters: the column ``CPU ratio``.
They rank methods; on another device, or beside a long forward and backward pass, they say little.
"""

from __future__ import annotations

from memadvise.plan.schema import Setting

SOURCE = "CPU, float32, 42 million parameters, relative to torch's fused AdamW"

# By method; where its options matter, the label of the row in the table says which were measured.
METHOD_COSTS = {
    "adamw": 1.0,
    "slimadam": 1.0,
    "adam_mini": 1.0,
    "lion": 0.86,
    "sgd": 0.77,
    "adafactor": 1.41,
    "came": 2.75,
    "micro_adam": 16.5,
    "adapprox": 4.9,
    "rmsprop": 0.91,
    "adagrad": 0.86,
    "apollo": 4.7,
    "apollo_mini": 1.2,
    "galore": 3.75,
}
# Added by a moment held in a codec: half of what both add to AdamW; beside a mean, int8 adds 1.15.
CODEC_COSTS = {"bf16": 0.85, "int8": 1.25, "dynamic8": 21.4, "int4": 20.5}
MEASURED_AS = {
    "adamw": "memadvise adamw",
    "slimadam": "memadvise slimadam axes [1] (row means)",
    "adam_mini": "memadvise adam_mini heads",
    "lion": "memadvise lion",
    "sgd": "memadvise sgd momentum 0.9",
    "adafactor": "memadvise adafactor",
    "came": "memadvise came",
    "micro_adam": "memadvise micro_adam",
    "adapprox": "memadvise adapprox rank 4 every 4, warm",
    "rmsprop": "memadvise rmsprop",
    "adagrad": "memadvise adagrad",
    "apollo": "memadvise apollo gaussian",
    "apollo_mini": "memadvise apollo_mini",
    "galore": "memadvise galore",
}


def step_cost(setting: Setting) -> float:
    """The time of one step of a parameter under ``setting``, over that under AdamW."""
    moments = (str(setting.options.get(f"{moment}_moment", "full")) for moment in ("first", "second"))
    return METHOD_COSTS[setting.method] + sum(CODEC_COSTS.get(codec, 0.0) for codec in moments)
