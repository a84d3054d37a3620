"""Programs that misbehave while they are traced: what is said, with which line, and that torch is as it was."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from memadvise.cli.app import run as run_command
from memadvise.errors import TargetError, TargetRaised
from memadvise.ledger import MemoryLedger
from memadvise.memory.estimate import estimate
from memadvise.memory.measure import measure_cpu
from memadvise.target import Target

HERE = "test_trace_faults.py:"


def linear() -> nn.Module:
    return nn.Linear(64, 256)


def batches() -> list[torch.Tensor]:
    return [torch.ones(64, 64)] * 2


def mean(model, batch):
    return model(batch).square().mean()


def run(
    build: Callable[[], nn.Module] = linear, *, device: str = "cpu", tensors: str = "auto", **functions
) -> MemoryLedger:
    functions = {"build_batches": batches, "compute_loss": mean, **functions}
    return estimate(Target(build_model=build, **functions), device=device, tensors=tensors)


# ---------------------------------------------------------------- torch is as it was


def state_of_torch() -> dict[str, object]:
    """Every attribute of torch's public modules and of their classes, and what a program can set for all of it."""
    found: dict[str, object] = {}
    for name, module in sorted(sys.modules.items()):
        if module is None or not (name == "torch" or name.startswith(("torch.nn", "torch.optim", "torch.cuda"))):
            continue
        for key, value in list(vars(module).items()):
            if not isinstance(value, type(sys)) and not key.startswith("__"):
                found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name and name != "torch":
                found |= {f"{name}.{key}.{k}": v for k, v in vars(value).items() if callable(v)}
    for name in ("autograd", "_tensor", "amp.autocast_mode", "utils._foreach_utils"):
        module = sys.modules[f"torch.{name}"]
        found |= {f"{name}.{key}": value for key, value in vars(module).items() if callable(value)}
    found |= {f"Tensor.{key}": value for key, value in vars(torch.Tensor).items() if callable(value)}
    hooks = nn.modules.module
    found |= {
        "modes": (len(_get_current_dispatch_mode_stack()), len(_get_current_function_mode_stack())),
        "hooks": (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)),
        "settings": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision()),
        "device": torch.get_default_device(),
        "random": torch.get_rng_state().numpy().tobytes(),
        "kernels": torch._C._dispatch_dump("aten::linear") + torch._C._dispatch_dump("aten::dropout"),
    }
    return found


def _sets_everything() -> nn.Module:
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(True)
    model = linear().float()
    torch.set_default_device("cpu")
    return model


def _fails() -> nn.Module:
    raise ValueError("no weights today")


def _interrupted(model, batch):
    model(batch)
    raise KeyboardInterrupt


def _exits(model, batch):
    sys.exit(4)


def _patched_build() -> nn.Module:
    F.gelu = lambda x, approximate="none": x * x
    nn.Linear.forward = lambda self, x: F.linear(x, self.weight) + self.bias
    nn.Module.summary = lambda self: "mine"
    torch.softmax = lambda *args, **kwargs: args[0]
    return nn.Sequential(linear(), nn.GELU())


PROGRAMS = {
    "plain": ({}, None),
    "settings": ({"build": _sets_everything, "compute_loss": lambda m, b: m(b.float()).mean()}, None),
    "patches": ({"build": _patched_build}, None),
    "error": ({"build": _fails}, TargetRaised),
    "interrupt": ({"compute_loss": _interrupted}, KeyboardInterrupt),
    "exit": ({"compute_loss": _exits}, TargetRaised),
}


@pytest.mark.parametrize("tensors", ["fake", "real"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_torch_is_found_as_it_was(name: str, device: str, tensors: str) -> None:
    functions, error = PROGRAMS[name]
    run(device=device, tensors=tensors)  # what torch itself loads and caches on first use
    before = state_of_torch()
    if error is None:
        run(device=device, tensors=tensors, **functions)
    else:
        with pytest.raises(error):
            run(device=device, tensors=tensors, **functions)
    after = state_of_torch()
    assert {key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)} <= {
        key for key in before if before[key] == after.get(key)
    }


def test_patches_of_torch_are_told_with_their_lines() -> None:
    warnings = run(_patched_build).warnings
    for name in ("functional.gelu", "Linear.forward", "Module.summary", "torch.softmax"):
        (said,) = (w for w in warnings if name in w)
        assert HERE in said
        assert "afterwards torch is as it was" in said


def _own_state() -> torch.Tensor:
    return torch.zeros(5056, dtype=torch.uint8)


@pytest.mark.parametrize("value", [_own_state, None])
def test_what_the_trace_needs_of_torch_has_to_be_torchs_own(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_rng_state", value)
    with pytest.raises(TargetError, match=r"torch\.get_rng_state is (replaced|set to None) by the target") as caught:
        run()
    assert caught.value.exit_code == 2
    assert caught.value.hint is not None
    if value is not None:
        assert caught.value.where is not None
        assert caught.value.where.path.endswith("test_trace_faults.py")


# ---------------------------------------------------------------- models that do more than build


def _from_numpy() -> nn.Module:
    model = linear()
    model.weight = nn.Parameter(torch.from_numpy(np.ones((256, 64), np.float32)))
    model.table = torch.from_numpy(np.ones(100, np.float32))
    return model


def _from_a_checkpoint() -> nn.Module:
    model = linear()
    STORED.seek(0)
    model.load_state_dict(torch.load(STORED, weights_only=True))
    return model


STORED = io.BytesIO()
torch.save(nn.Linear(64, 256).state_dict(), STORED)
READY = linear()


@pytest.mark.parametrize("build", [_from_numpy, _from_a_checkpoint, lambda: READY])
def test_weights_that_are_there_already_cost_what_they_cost(build: Callable[[], nn.Module]) -> None:
    extra = 400 if build is _from_numpy else 0  # its table
    assert run(build).peak_bytes == run().peak_bytes + extra
    assert type(READY.weight) is nn.Parameter
    assert READY.weight.grad is None


def test_a_build_that_computes_with_its_weights_is_built_for_real() -> None:
    def build():
        model = linear()
        np.linalg.svd(model.weight.detach().numpy())
        return model

    ledger = run(build)
    assert ledger.peak_bytes == run().peak_bytes
    assert HERE in ledger.warnings[0]
    assert "numpy" in ledger.warnings[0]


def test_a_check_that_fails_on_a_guess_is_made_for_real() -> None:
    def build():
        model = linear()
        nn.init.zeros_(model.bias)
        assert model.bias.sum().item() == 0.0
        return model

    assert run(build).assumptions[0].startswith("Real tensors")


def test_a_teacher_that_the_model_does_not_hold_is_counted() -> None:
    """Both by the estimate and by the allocator."""

    def target() -> Target:
        held: list[nn.Module] = []

        def build():
            held[:] = [nn.Linear(64, 256).requires_grad_(False)]
            return linear()

        def loss(model, batch):
            return F.mse_loss(model(batch), held[0](batch))

        return Target(build_model=build, build_batches=batches, compute_loss=loss)

    traced, measured = estimate(target(), device="cpu"), measure_cpu(target())
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.001)
    assert traced.by_category["buffers"] == (64 + 1) * 256 * 4


# ---------------------------------------------------------------- CUDA where there is none


CALLS = """
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    pass
torch.cuda.current_stream().wait_stream(stream)
start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
start.record(); end.record(); end.synchronize(); start.elapsed_time(end)
assert torch.cuda.is_available() and torch.cuda.is_bf16_supported() and torch.cuda.device_count() == 1
assert torch.cuda.get_device_capability() == (9, 0)
assert torch.cuda.get_device_properties(0).total_memory > 0
free, total = torch.cuda.mem_get_info()
torch.cuda.memory_stats()["allocated_bytes.all.peak"]; torch.cuda.memory.reset_peak_memory_stats()
torch.cuda.manual_seed_all(0); torch.cuda.set_rng_state(torch.cuda.get_rng_state())
with torch.cuda.device(0):
    x = torch.zeros(3, device="cuda").to("cuda:0").cuda(non_blocking=True)
x.record_stream(stream)
torch.cuda.nvtx.range_push("step"); torch.cuda.nvtx.range_pop()
torch.cuda.ipc_collect(); torch.cuda.empty_cache(); torch.cuda.synchronize(); torch.cuda.set_device(0)
with torch.cuda.device_of(x), torch.autocast("cuda", dtype=torch.float16):
    pass
assert torch.amp.GradScaler("cuda").is_enabled()
torch.zeros(3, pin_memory=False).pin_memory()
"""


@pytest.mark.parametrize("tensors", ["fake", "real"])
def test_calls_to_cuda_are_answered(tensors: str) -> None:
    def build():
        exec(CALLS, {"torch": torch})
        return linear().cuda().to("cuda")

    def step(model, batch, optimizer):
        exec(CALLS, {"torch": torch})
        mean(model, batch.cuda()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def batches_on_cuda():
        exec(CALLS, {"torch": torch})
        return [batch.cuda() for batch in batches()]

    ledger = run(build, device="cuda", tensors=tensors, train_step=step, build_batches=batches_on_cuda)
    assert ledger.peak_bytes == run(device="cuda").peak_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize(
    "functions",
    [
        {"build": lambda: linear().cuda()},
        {"build_batches": lambda: [torch.ones(64, 64, device="cuda")]},
        {"compute_loss": lambda model, batch: mean(model, batch.to("cuda"))},
    ],
    ids=["model", "batch", "loss"],
)
def test_cuda_on_the_cpu_is_told_with_the_way_out(functions: dict[str, Callable[..., object]]) -> None:
    with pytest.raises(TargetRaised, match="CUDA") as caught:
        run(device="cpu", **functions)
    assert HERE in str(caught.value)
    assert "--device cuda" in str(caught.value.hint)


def test_a_batch_without_data_is_told_as_such() -> None:
    with pytest.raises(TargetError, match=r'shape .64, 64. on the device "meta"') as caught:
        run(build_batches=lambda: [torch.ones(64, 64, device="meta")])
    assert caught.value.exit_code == 2


def test_a_model_without_data_is_told_with_its_line() -> None:
    with pytest.raises(TargetRaised, match="meta") as caught:
        run(lambda: nn.Linear(64, 256, device="meta"))
    assert HERE in str(caught.value)


# ---------------------------------------------------------------- steps


def test_a_generator_that_ends_early_starts_anew() -> None:
    def one() -> Iterator[torch.Tensor]:
        yield torch.ones(64, 64)

    assert run(build_batches=one).peak_bytes == run().peak_bytes


def _keeping(what: str) -> Callable[..., None]:
    kept: list[object] = []

    def step(model, batch, optimizer):
        out = model(batch)
        loss = out.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append({"outputs": out, "losses": loss.detach(), "nothing": None}[what])

    return step


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_that_never_frees_is_noticed(device: str) -> None:
    (said,) = run(device=device, train_step=_keeping("outputs")).warnings
    assert said.startswith("the step never frees 64.00 KiB of what it allocates: step 1 ends with")
    assert HERE in said
    for harmless in ("losses", "nothing"):
        assert not run(device=device, train_step=_keeping(harmless)).warnings


def test_cycles_are_told_apart_from_what_is_never_freed() -> None:
    def step(model, batch, optimizer):
        out = model(batch)
        circle: list[object] = [out]
        circle.append(circle)
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    (said,) = run(train_step=step).warnings
    assert said.startswith("64.00 KiB of each step are held by reference cycles")


def test_every_host_read_is_told_with_its_line() -> None:
    def loss(model, batch):
        x, count = batch
        rows = int(count.sum())
        out = model(x[:rows])
        if out.isnan().any():
            out = out * 0
        return out.square().mean() * (2.0 if out.max() > 3 else 1.0)

    ledger = run(compute_loss=loss, build_batches=lambda: [(torch.ones(64, 64), torch.tensor([20, 12]))])
    (known,) = (a for a in ledger.assumptions if a.startswith("Host read"))
    assert "reads 32, known from the batch" in known
    assert HERE in known
    guessed = [w for w in ledger.warnings if "assumed False" in w]
    assert len(guessed) == 2
    assert all(HERE in w for w in guessed)


# ---------------------------------------------------------------- on the command line

FILE = """\
import torch
from torch import nn

def build_model():
    return nn.Linear(8, 8)

def build_batches():
    return [torch.ones(8, 8)] * 2

def compute_loss(model, batch):
    return model(batch).square().mean()
"""
LINES = {
    # what is added to FILE: (arguments, exit code, words on stderr)
    "torch.get_rng_state = lambda: None": ([], 2, "the trace needs torch's own"),
    "def build_batches(): return [torch.ones(8, 8, device='meta')]": ([], 2, "without data"),
    "def build_model(): return nn.Linear(8, 8).cuda()": (["--device", "cpu"], 3, "it asks for CUDA, and here is none"),
    "def compute_loss(model, batch): return model(batch[model(batch)[:, 0] > 0]).mean()": (
        *(["--tensors", "fake"], 2, "has a shape that depends on computed numbers"),
    ),
    "def compute_loss(model, batch): return model(batch[model(batch)[:, 0] < 99]).mean()": (
        *(["--tensors", "auto"], 0, "tracing one step"),
    ),
    "def build_model(): print('building'); return nn.Linear(8, 8)": (["--tensors", "real"], 0, "building"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("line", LINES)
def test_exit_codes(
    line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, code, words = LINES[line]
    monkeypatch.setattr(torch, "get_rng_state", torch.get_rng_state)  # put back: importing the file replaces it
    path = tmp_path / "model.py"
    path.write_text(f"{FILE}\n{line}\n", encoding="utf-8")
    output = tmp_path / "scan.json"
    assert run_command(["scan", str(path), "--no-probe", "-o", str(output), *arguments]) == code
    out, err = capfd.readouterr()
    assert words in err
    assert "Traceback" not in err
    assert output.exists() == (code == 0) == bool(out)
    if code == 0 and "batch[" in line:
        assert "Real tensors" in out
