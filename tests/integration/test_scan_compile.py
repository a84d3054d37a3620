"""The bound for a step under torch.compile against the allocator's events of a step that inductor really compiled."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch._inductor.utils
from torch import nn

from memadvise.cli.app import run
from memadvise.ledger import MemoryLedger, load_scan
from memadvise.memory.allocator_log import allocator_log
from memadvise.memory.compiled import estimate_compiled
from memadvise.memory.estimate import estimate
from memadvise.memory.semantics import random_state_kept
from memadvise.memory.session import own_copy, tensors_of
from memadvise.memory.tensors import default_optimizer, garbage_collection_paused, model_tensors, state_tensors
from memadvise.switches import train_step
from memadvise.target import Target


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64)) for _ in range(4)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


class Breaking(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        return self.layers[1](x).square().mean()


def mlp(kind: type[nn.Module] = Mlp) -> Target:
    return Target(build_model=kind, build_batches=lambda: [torch.randn(256, 64) for _ in range(2)])


def gpt2() -> Target:
    transformers = pytest.importorskip("transformers")

    def build_model() -> nn.Module:
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 512}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, use_cache=False, eos_token_id=0))
        model.loss_type = "ForCausalLM"  # else transformers logs a line in its forward pass, where dynamo breaks off
        return model  # type: ignore[no-any-return]

    def build_batches() -> list[dict[str, torch.Tensor]]:
        ids = torch.randint(512, (4, 64))
        return [{"input_ids": ids, "labels": ids}] * 2

    return Target(build_model=build_model, build_batches=build_batches)


def real_peak(target: Target) -> int:
    """The peak of a real step whose model inductor has compiled, by the allocator's events."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Scalar code: the same buffers, and half the time in the C++ compiler. Nothing from the disk: what an earlier
    # process compiled there might hide what this one would.
    scalar, fresh = torch._inductor.config.patch({"cpp.simdlen": 1}), torch._inductor.utils.fresh_cache()
    with scalar, fresh, random_state_kept(), garbage_collection_paused():
        model = target.model()
        compiled, optimizer = torch.compile(model), default_optimizer(model)
        batches = [own_copy(batch) for batch in target.batches(3)]
        for batch in batches[:2]:
            train_step(target, compiled, batch, optimizer)
        held = [tensor for _, _, tensor in model_tensors(model)] + [tensor for _, tensor in state_tensors(optimizer)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*held, *tensors_of(batches[2]))}
        with allocator_log() as log:
            train_step(target, compiled, batches[2], optimizer)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    return sum(s.nbytes() for s in storages.values()) + max(itertools.accumulate(log.sizes()))


def activations(ledger: MemoryLedger) -> int:
    return max(phase.by_category.get("activations", 0) for phase in ledger.phases)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize("make", [mlp, gpt2], ids=["mlp", "gpt2"])
def test_a_compiled_step_stays_below_the_bound(make: Callable[[], Target]) -> None:
    bound, real = estimate_compiled(make(), device="cpu"), real_peak(make())
    print(f"bound {bound.peak_bytes:,}, compiled {real:,}: {bound.peak_bytes / real:.3f}")
    assert real <= bound.peak_bytes <= 1.25 * real  # a bound that says anything


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("make", [mlp, pytest.param(gpt2, marks=pytest.mark.slow)], ids=["mlp", "gpt2"])
def test_what_is_kept_is_no_more_than_eager_execution_keeps(make: Callable[[], Target], device: str) -> None:
    eager, bound = estimate(make(), device=device), estimate_compiled(make(), device=device)
    assert bound.source == "bound"
    assert not bound.warnings
    assert "upper bound" in bound.assumptions[0]
    assert "1 graph of the model" in bound.assumptions[1]
    assert activations(bound) <= activations(eager)
    assert bound.state_bytes == eager.state_bytes
    assert sum(bound.by_category.values()) == bound.peak_bytes
    # The optimizer is not compiled, and finds nothing of the backward pass alive.
    assert abs(bound.phase("step").peak_bytes - eager.phase("step").peak_bytes) <= 1024  # the loss, held for a log
    named = sum(sum(cells.values()) for module, cells in bound.by_module.items() if not module.startswith("("))
    assert named > 0.7 * (bound.peak_bytes - bound.by_category.get("workspace", 0))  # a library's is no module's


def test_a_graph_break_is_named() -> None:
    bound = estimate_compiled(mlp(Breaking), device="cpu")
    assert bound.source == "bound"
    assert "2 graphs of the model" in bound.assumptions[1]
    (warning,) = bound.warnings
    assert "torch._dynamo.graph_break()" in warning
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "graph_break()" in text)
    assert "torch.compile breaks the graph" in warning
    assert f"{Path(__file__).name}:{line}" in warning


class NotCompilable(Mlp):
    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Logging(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logging.getLogger("a model").warning("a line")
        return super().forward(x)


def test_a_break_before_the_first_operation_is_named() -> None:
    warnings = estimate_compiled(mlp(Logging), device="cpu").warnings
    assert any("breaks the graph: logging.Logger method not supported" in warning for warning in warnings)


def test_a_model_that_is_not_compiled_falls_back_to_eager_with_a_warning() -> None:
    eager, bound = estimate(mlp(NotCompilable), device="cpu"), estimate_compiled(mlp(NotCompilable), device="cpu")
    assert bound.source == "estimate"
    assert (bound.peak_bytes, bound.by_category) == (eager.peak_bytes, eager.by_category)
    assert "the model could not be compiled" in bound.warnings[-1]


class Attention(nn.Module):
    """Every operator whose kernel is another one while a trace runs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.out = nn.Linear(64, 192), nn.RMSNorm(64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.view(4, 64, 4, 16).transpose(1, 2) for part in self.qkv(self.norm(x)).view(4, 64, 192).chunk(3, -1)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True) + (q @ k.mT).softmax(-1) @ v
        y = self.out(nn.functional.dropout(y.transpose(1, 2).reshape(256, 64), 0.0))
        return nn.functional.cross_entropy(y.log_softmax(-1), y.detach().argmax(-1))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_compiled_afterwards_has_all_its_gradients(device: str) -> None:
    target = mlp(Attention)
    estimate_compiled(target, device=device)
    torch._dynamo.reset()
    model, batch = target.model(), torch.randn(256, 64)
    names = [name for name, _ in model.named_parameters()]
    eager = torch.autograd.grad(model(batch), list(model.parameters()))
    with torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(model, backend="aot_eager")(batch).backward()
    for name, expected in zip(names, eager, strict=True):
        gradient = model.get_parameter(name).grad
        assert gradient is not None, f"{name} has no gradient"
        torch.testing.assert_close(gradient, expected)


def test_torch_is_as_it_was() -> None:
    before: Any = (torch._dynamo.eval_frame._stance.stance, dict(nn.modules.module._global_forward_hooks))
    estimate_compiled(mlp(), device="cpu")
    assert (torch._dynamo.eval_frame._stance.stance, dict(nn.modules.module._global_forward_hooks)) == before
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_the_command(mlp_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, file = mlp_file, tmp_path / "scan.json"
    assert run(["scan", str(target), "--no-probe", "--compile", "-o", str(file)]) == 0
    out = capsys.readouterr().out
    assert "Under torch.compile: an upper bound" in out
    scan = load_scan(file)
    assert scan.compiled is not None
    assert scan.compiled.source == "bound"
    assert run(["compare-ledgers", str(file), f"{file}:compiled"]) == 0
    assert "bound" in capsys.readouterr().out
