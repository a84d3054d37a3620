"""The headline run itself: 7 billion parameters train in 12 GB of this GPU, the loss falls, and the estimate holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memadvise.memory.architecture import local_device
from memadvise.optim import create_optimizer, quantize_weights
from memadvise.plan.load import load_plan
from memadvise.switches import apply_checkpoint
from memadvise.target import load_target
from memadvise.whatif import trace_setting

pytestmark = pytest.mark.gpu

FOLDER = Path(__file__).parents[2] / "examples" / "llama_7b"
LIMIT, STEPS = 12 * 10**9, 8


def _built_in_place(transformers: object) -> torch.nn.Module:
    """The model, block by block on the GPU and in int8 at once: it never exists in bfloat16."""
    config = transformers.LlamaConfig.from_pretrained(FOLDER)  # type: ignore[attr-defined]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[attr-defined]
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device="cuda")
    for part in (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head):
        part.to_empty(device="cuda")
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.02) if p.ndim == 2 else torch.nn.init.ones_(p)
        if any(p.ndim == 2 for p in part.parameters()):
            quantize_weights(part)
    return model.train()


@pytest.mark.slow
def test_seven_billion_parameters_train_in_12_gb() -> None:
    transformers = pytest.importorskip("transformers")
    plan = load_plan(FOLDER / "in_12gb.yaml")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.manual_seed(0)
    torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT / total))
    try:
        model = _built_in_place(transformers)
        apply_checkpoint(model, plan.switches.checkpoint)
        optimizer = create_optimizer(model, plan, lr=1e-3)
        ids = torch.randint(32000, (1, 256), device="cuda")
        losses = []
        for _ in range(STEPS):
            torch.cuda.reset_peak_memory_stats()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        peak, stats = torch.cuda.max_memory_allocated(), torch.cuda.memory_stats()
        asked = stats["requested_bytes.all.peak"]  # without rounding, and without what large blocks have to spare
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    target = load_target(f"hf:{FOLDER}", options={"batch_size": 1, "seq_len": 256, "dtype": "bfloat16"})
    ledger = trace_setting(target, plan, device=local_device(), label="plan")
    predicted = ledger.allocated_bytes
    print(f"peak {peak / 1e9:.2f} GB, estimated {predicted / 1e9:.2f} GB, losses {losses}")
    print(f"asked for {asked / 1e9:.2f} GB, estimated {ledger.peak_bytes / 1e9:.2f} GB")
    assert losses[-1] < losses[0]
    assert peak < LIMIT
    assert -0.02 * peak <= predicted - peak <= 0.03 * peak
