"""The headline of the field: a Llama of 7 billion parameters trains in 12 GB (batch 1, 256 tokens)."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import EXAMPLES, succeed

from memadvise.ledger import MemoryLedger
from memadvise.plan.load import load_plan
from memadvise.target import load_target
from memadvise.whatif import trace_setting

pytest.importorskip("transformers")

FOLDER = EXAMPLES / "llama_7b"
PLAN = FOLDER / "in_12gb.yaml"
OPTIONS = {"batch_size": 1, "seq_len": 256, "dtype": "bfloat16"}
MIB = 2**20
WIDTH, INNER, VOCABULARY = 4096, 11008, 32000
IN_A_LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER


def small(folder: Path, layers: int) -> Path:
    """The same Llama with fewer blocks."""
    config = (FOLDER / "config.json").read_text().replace('"num_hidden_layers": 32', f'"num_hidden_layers": {layers}')
    (folder / "config.json").write_text(config)
    return folder


def hold(ledger: MemoryLedger, layers: int) -> None:
    """Every category is what it must be."""
    print(f"{ledger.peak_bytes / 1e9:.2f} GB in the {ledger.peak_phase}:")
    print({category: f"{size / MIB:.1f} MiB" for category, size in ledger.by_category.items()})
    matrices = layers * IN_A_LAYER + 2 * VOCABULARY * WIDTH
    vectors = (2 * layers + 1) * WIDTH
    assert ledger.by_category["weights"] == matrices * (1 + 3 / 128) + 2 * vectors
    assert ledger.by_category["gradients"] <= 2 * VOCABULARY * WIDTH  # one at a time, and none larger than the head's
    assert ledger.by_category["workspace"] == 64 * MIB
    assert ledger.state_bytes < matrices / 300  # rank 1
    assert ledger.by_category["activations"] < 16 * MIB + layers * 2 * MIB  # a block's input each: 256 x 4096 x 2 bytes
    floats = 2 * VOCABULARY * WIDTH  # of the head, for its products
    assert floats <= ledger.by_category["temporaries"] < floats + 64 * MIB


@pytest.mark.slow
def test_the_breakdown_of_a_shallow_one(tmp_path: Path) -> None:
    target = load_target(f"hf:{small(tmp_path, 2)}", options=OPTIONS)
    hold(trace_setting(target, load_plan(PLAN), device="cuda", label="plan"), 2)


@pytest.mark.slow
def test_seven_billion_parameters_fit() -> None:
    """The peak, and with it what the allocator reserves and the CUDA context."""
    target = load_target(f"hf:{FOLDER}", options=OPTIONS)
    ledger = trace_setting(target, load_plan(PLAN), device="cuda", label="plan")
    hold(ledger, 32)
    assert 7.5e9 < ledger.peak_bytes < 7.7e9  # 7.61 on an H200, without what blocks have to spare
    assert ledger.comfortable_bytes < 12e9


@pytest.mark.slow
def test_the_command_says_so(tmp_path: Path) -> None:
    target = f"hf:{small(tmp_path, 2)}"
    words = ["--batch-size", "1", "--seq-len", "256", "--dtype", "bfloat16", "--plan", PLAN, "--budget", "12GB"]
    assert "GiB" in succeed(tmp_path, "check", target, *words, "--no-progress").stdout
