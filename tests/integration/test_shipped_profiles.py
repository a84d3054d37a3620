"""The profiles that travel with memadvise, and advice from one of them for a model that was not probed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import document, memadvise, succeed

from memadvise.advise.profile import load_profile, shipped_profiles
from memadvise.plan.load import load_plan

FAMILIES = ("encoder", "gnn", "gpt", "llama", "lstm", "resnet", "vit")
SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "vocab_size": 2048, "max_position_embeddings": 128}


def test_seven_families() -> None:
    assert tuple(sorted(shipped_profiles())) == FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_each_says_how_it_was_made(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    evidence = profile.evidence
    assert evidence["command"] == "python benchmarks/build_profiles.py"
    assert evidence["environment"]["torch"].startswith("2.")
    assert evidence["seeds"] >= 2
    assert all(steps >= 60 for steps in evidence["steps"])  # a probe whose halves disagree goes on
    assert all(last < first for first, last in evidence["losses"])  # it learned
    by_candidate = {v.candidate for v in profile.values}
    assert {"adamw, m int8, v int8", "mean(fan_in)", "factored", "apollo"} <= by_candidate
    # Eight bits are finer than one value for a whole matrix, wherever both were measured.
    scores = {(v.role, v.depth, v.candidate): v.abs_d1 for v in profile.values}
    pairs = [(s, scores[r, d, "mean(all)"]) for (r, d, c), s in scores.items()
             if c == "adamw, m int8, v int8" and (r, d, "mean(all)") in scores]  # fmt: skip
    assert pairs
    assert all(fine < coarse for fine, coarse in pairs)


@pytest.mark.slow
def test_advice_for_a_llama_that_was_not_probed(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("--no-probe", "--device", "cpu", "--batch-size", "2", "--seq-len", "64")
    peak = document(succeed(tmp_path, "scan", "hf:config.json", *options, "--format", "json").stdout)["memory"][0]
    budget = str(peak["peak_bytes"] * 2 // 3)
    unknown = memadvise(tmp_path, "recommend", "--budget", budget, "--profile", "lama")
    assert unknown.returncode == 2
    assert "shipped are: encoder, gnn, gpt, llama" in unknown.stderr
    forbidden = ("--forbid", "int8", "--forbid", "dynamic8")  # else eight bits everywhere need no score
    run = succeed(tmp_path, "recommend", "--budget", budget, "--profile", "llama", *forbidden, "--format", "json")
    assert any("profile llama by role and depth" in group["reason"] for group in document(run.stdout)["groups"])
    plan = load_plan(tmp_path / "memadvise.yaml")
    assert any(rule.options for rule in plan.rules)
    without = succeed(tmp_path, "recommend", "--budget", budget, *forbidden, "-o", "other.yaml", "--format", "json")
    assert not any("profile" in group["reason"] for group in document(without.stdout)["groups"])
