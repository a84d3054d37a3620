"""Shared fixtures: a target, golden files, renewed with ``pytest --update-golden``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from memadvise import ledger
from memadvise.plan.schema import ModelShape, Plan, Rule, Switches

# No test is timed: a busy machine must not fail one. Derandomised, so that a run tells about the code and nothing else.
hypothesis.settings.register_profile("memadvise", deadline=None, derandomize=True)
hypothesis.settings.load_profile("memadvise")

GOLDEN = Path(__file__).parent / "golden"
MIB = 2**20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/* anew instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: the text is exactly that of ``tests/golden/<name>``."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
            return
        assert path.is_file(), f"{path} is missing; look at the text and run pytest --update-golden"
        assert text == path.read_text(encoding="utf-8"), (
            f"{path} differs; if the new text is right: pytest --update-golden"
        )

    return check


# ---------------------------------------------------------------- ledgers made by hand, for reports and commands


def make_memory(
    *,
    optimizer: str = "torch.optim.AdamW (foreach)",
    scale: float = 1.0,
    micro_batches: int = 1,
    checkpoint: bool = False,
) -> ledger.MemoryLedger:
    """A ledger whose modules and categories each add up to its peak; ``scale`` is that of the optimizer state."""
    state, activations = round(800 * MIB * scale), (100 if checkpoint else 600) * MIB // micro_batches
    by_module: dict[str, dict[str, int]] = {"": {"inputs": 1 * MIB}}
    for i in range(4):
        share = {"optimizer_state": state // 8, "activations": activations // 8}
        by_module[f"transformer.h.{i}.attn"] = {"weights": 50 * MIB, "gradients": 50 * MIB, **share}
        by_module[f"transformer.h.{i}.mlp.c_fc"] = {"weights": 50 * MIB, "temporaries": 7 * MIB, **share}
    by_category: dict[str, int] = {}
    for categories in by_module.values():
        for category, size in categories.items():
            by_category[category] = by_category.get(category, 0) + size
    peak = sum(by_category.values())

    def phase(name: str, less: int) -> ledger.PhasePeak:
        """``less`` of the activations of attention are not there yet, or not any more."""
        modules = {module: dict(categories) for module, categories in by_module.items()}
        for i in range(4):
            modules[f"transformer.h.{i}.attn"]["activations"] -= less // 4
        categories = {**by_category, "activations": by_category["activations"] - less // 4 * 4}
        return ledger.PhasePeak(name, peak - less // 4 * 4, categories, modules)

    phases = (phase("forward", 20 * MIB), phase("backward", 0), phase("step", activations // 2))
    live = tuple(
        ledger.LiveTensor(size * MIB, kind, module, op, phase, where)
        for size, kind, module, op, phase, where in (
            (96, "activations", "transformer.h.0.mlp", "aten.gelu", "forward", "examples/gpt_text.py:41"),
            (50, "weights", "transformer.h.3.mlp.c_fc", "weight", "forward", None),
            (1, "inputs", "", "batch", "forward", None),
        )
    )
    timeline = tuple((i, peak * (i if i < 60 else 120 - i) // 60) for i in range(121))
    return ledger.MemoryLedger(
        source="estimate",
        device="cuda",
        optimizer=optimizer,
        micro_batches=micro_batches,
        checkpoint=("transformer.h.*",) if checkpoint else (),
        peak_bytes=peak,
        peak_phase="backward",
        state_bytes=state,
        by_category=by_category,
        by_module=by_module,
        phases=phases,
        live_at_peak=live,
        timeline=timeline,
        num_events=121,
        assumptions=("attention runs as scaled_dot_product_attention with the flash kernel",),
        warnings=("one operator has no fake implementation",) if micro_batches > 1 else (),
        reserved=(
            ledger.Reservation("default", peak + 150 * MIB, peak + 2 * MIB, 91),
            ledger.Reservation("expandable_segments:True", peak + 30 * MIB, peak, 2),
        ),
        overhead=(ledger.Overhead("CUDA context and loaded kernels", 250 * MIB, 750 * MIB, "not measured here"),),
    )


def make_scan(*, probe: bool = True) -> ledger.Scan:
    def parameter(name: str, shape: tuple[int, ...], role: str, module_type: str = "Linear") -> ledger.Parameter:
        matrix = len(shape) == 2
        count = shape[0] * shape[-1] if matrix else shape[0]
        return ledger.Parameter(
            name=name,
            shape=shape,
            dtype="float32",
            num_bytes=4 * count,
            trainable=True,
            role=role,
            module=name.rpartition(".")[0],
            module_type=module_type,
            fan_in=(1,) if matrix else (),
            fan_out=(0,) if matrix else (),
        )

    parameters = [parameter("transformer.wte.weight", (512, 128), "tied_embedding", "Embedding")]
    for i in range(4):
        parameters.append(parameter(f"transformer.h.{i}.attn.c_attn.weight", (384, 128), "attention_qkv"))
        parameters.append(parameter(f"transformer.h.{i}.mlp.c_fc.weight", (512, 128), "mlp_up"))
        parameters.append(parameter(f"transformer.h.{i}.ln_1.weight", (128,), "norm", "LayerNorm"))

    def measured(number: int, p: ledger.Parameter) -> ledger.ParameterProbe:
        if len(p.shape) < 2:
            return ledger.ParameterProbe(p.name, unknown="a vector is never compressed")
        return ledger.ParameterProbe(
            name=p.name,
            snr=(
                ledger.SnrValue((0,), 0.25 + number / 8, 0.2, 0.8),
                ledger.SnrValue((1,), 4.0 + number, 3.0, 0.2),
                ledger.SnrValue((0, 1), None, None, None),
            ),
            fidelity=(ledger.FidelityValue("adamw", 0.0, 0.0), ledger.FidelityValue("slimadam(axes=[1])", 0.5, 0.01)),
            hessian=(
                ledger.HessianValue("row", 0.75, 0.03, 0.1, "gradient-covariance", 64),
                ledger.HessianValue("whole", 0.125, 0.04, 0.1, "gradient-covariance", 64),
            ),
            snr_axes=(1,),
            partition="row",
            partition_evidence="row 0.75 +- 0.03 by gradient covariance, clear; whole 0.12 +- 0.04",
            partition_measured=True,
            sampled=16384 if number == 0 else None,
            num_recorded=2,
        )

    return ledger.Scan(
        target="examples/gpt_text.py",
        target_sha256="0" * 64,
        environment={"memadvise": "0.0.0", "torch": "2.13.0"},
        fingerprint="sha256:abc",
        parameters=tuple(parameters),
        memory=(
            make_memory(),
            make_memory(optimizer="memadvise adamw", micro_batches=2),
            make_memory(optimizer="memadvise adamw", checkpoint=True),
        ),
        probe=ledger.ProbeLedger(
            num_steps=60,
            recorded_steps=(30, 60),
            lr=1e-3,
            losses=(5.5, 3.25),
            parameters=tuple(measured(n, p) for n, p in enumerate(parameters)),
            runs=(
                ledger.OptimizerRun("adamw", {}, 1e-3, 20, 5.5, 3.75, 800 * MIB, 0.0125),
                ledger.OptimizerRun("slimadam", {"axes": [1]}, 1e-3, 20, 5.5, 3.78125, 400 * MIB, 0.011),
                ledger.OptimizerRun(
                    "sgd", {"momentum": 0.9}, 0.1, 3, 5.5, None, 400 * MIB, None, "the loss became NaN"
                ),
            ),
            warnings=("the loss did not fall",),
            shadow_bytes=MIB,
            shadow_limit_bytes=4096 * MIB,
            passes=1,
            rank_agreement=0.9875,
            notes=("build_batches() ended after 2: they were repeated",),
        )
        if probe
        else None,
    )


@dataclass(frozen=True)
class SampleChoice:
    pattern: str
    role: str
    count: int
    setting_key: str
    state_bytes_before: int
    state_bytes_after: int
    expected_harm: float | None
    reason: str
    weight_bytes_saved: int = 0
    confidence: str = "high"
    runners_up: tuple[str, ...] = ()
    lr_factor: float = 1.0


@dataclass(frozen=True)
class SampleRecommendation:
    """The fields of advise.recommend.Recommendation, so that reports and commands are tested without it."""

    plan: Plan
    needs_compression: bool
    before: ledger.MemoryLedger
    after: ledger.MemoryLedger | None
    budget_bytes: int
    margin_bytes: int
    groups: tuple[SampleChoice, ...]
    solver_note: str
    explanation: tuple[str, ...]


def make_recommendation(*, needed: bool = True, budget_bytes: int = 1700 * MIB) -> SampleRecommendation:
    before = make_memory()
    after = make_memory(optimizer="memadvise plan", scale=0.5) if needed else before
    rule = Rule("transformer.h.*.mlp.c_fc.weight", "slimadam", {"axes": [1]}, reason="SNR 6 along fan_in")
    return SampleRecommendation(
        plan=Plan(
            rules=(*((rule,) if needed else ()), Rule("**", "adamw", reason="the rest stays full")),
            switches=Switches(),
            model=ModelShape("sha256:abc", 1000, {"transformer.wte.weight": (512, 128)}),
            budget_bytes=budget_bytes,
            predicted_state_bytes=after.state_bytes,
            predicted_peak_bytes=after.peak_bytes,
            device="cuda",
            notes=("a note for the file",),
        ),
        needs_compression=needed,
        before=before,
        after=after,
        budget_bytes=budget_bytes,
        margin_bytes=budget_bytes - after.peak_bytes,
        groups=(
            SampleChoice("transformer.wte.weight", "tied_embedding", 1, "adamw", 512 * 1024, 512 * 1024, None, "kept"),
            SampleChoice(
                "transformer.h.*.mlp.c_fc.weight", "mlp_up", 4, "slimadam(axes=[1])", 800 * MIB, 401 * MIB, 0.0125,
                "SNR 6 along fan_in", confidence="fairly high",
                runners_up=("adafactor(momentum=0.9) (1.2 x the error)",),
            ),
        ),
        solver_note="optimal",
        explanation=("the plan peaks in the backward phase",),
    )  # fmt: skip


@pytest.fixture
def sample_scan() -> ledger.Scan:
    return make_scan()


@pytest.fixture
def sample_recommendation() -> SampleRecommendation:
    return make_recommendation()


MLP = """
import torch
from torch import nn

def build_model():
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 16))

def build_batches():
    return [torch.randn(32, 64) for _ in range(2)]

def compute_loss(model, batch):
    return model(batch).square().mean()
"""


@pytest.fixture
def mlp_file(tmp_path: Path) -> Path:
    """A target file of two layers."""
    path = tmp_path / "model.py"
    path.write_text(MLP)
    return path
