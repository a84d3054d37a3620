"""Closed forms and categories of estimated steps."""

from __future__ import annotations

import resource
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memadvise.errors import TargetError, TargetRaised, UsageError
from memadvise.memory.architecture import device_model
from memadvise.memory.estimate import estimate
from memadvise.memory.measure import measure_cpu
from memadvise.memory.trace import trace_step
from memadvise.optim.create import create_optimizer
from memadvise.optim.registry import state_bytes as predicted_bytes
from memadvise.plan.schema import Setting, Switches
from memadvise.target import Target

WIDTH, DEPTH = 512, 6
PARAMETER_BYTES = DEPTH * WIDTH * WIDTH * 4


def _stack():
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(DEPTH)))


def _loss(model, batch):
    return model(batch).square().mean()


def _target(rows=4, **functions):
    return Target(
        **{
            "build_model": _stack,
            "build_batches": lambda: [torch.randn(rows, WIDTH)],
            "compute_loss": _loss,
            **functions,
        }
    )


def _adamw(**options):
    return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, **options)


@pytest.mark.parametrize(
    ("options", "copies", "name"),
    [
        ({}, 5, "foreach"),  # w, g, m, v and the square roots of all v at once
        ({"foreach": True}, 5, "foreach"),
        ({"fused": True}, 4, "fused"),
        ({"foreach": False}, 4 + 3 / DEPTH, "for-loop"),  # sqrt, its quotient, and the denominator of the one before
    ],
)
def test_adamw_step_in_copies_of_the_parameters(options, copies, name):
    without_cublas = device_model("cuda", cublas_workspace=0)  # as large as this model
    ledger = estimate(_target(), device=without_cublas, optimizer=_adamw(**options))
    assert ledger.phase("step").peak_bytes == pytest.approx(copies * PARAMETER_BYTES, rel=0.003)
    assert ledger.optimizer == f"torch.optim.AdamW ({name})"


def test_default_optimizer_is_adamw_as_the_device_gives_it():
    assert estimate(_target()).optimizer == "torch.optim.AdamW (foreach)"
    assert estimate(_target(), device="cpu").optimizer == "torch.optim.AdamW (for-loop)"
    assert estimate(_target(), optimizer_name="mine").optimizer == "mine"


def test_foreach_temporary_is_a_temporary_and_state_is_the_state():
    ledger = estimate(_target())
    assert ledger.by_category["temporaries"] == pytest.approx(PARAMETER_BYTES, rel=0.01)
    assert ledger.by_category["optimizer_state"] == 2 * PARAMETER_BYTES
    assert ledger.by_category["weights"] == ledger.by_category["gradients"] == PARAMETER_BYTES
    assert ledger.state_bytes == 2 * PARAMETER_BYTES + 4 * DEPTH  # with the step counts, on the host
    assert ledger.by_module["(optimizer)"]["temporaries"] == pytest.approx(PARAMETER_BYTES, rel=0.01)
    assert ledger.by_module["3.0"] == {
        "weights": PARAMETER_BYTES // DEPTH,
        "gradients": PARAMETER_BYTES // DEPTH,
        "optimizer_state": 2 * PARAMETER_BYTES // DEPTH,
    }


def test_state_on_the_device_counts_its_step():
    ledger = estimate(_target(), optimizer=_adamw(fused=True))
    assert ledger.by_category["optimizer_state"] == 2 * PARAMETER_BYTES + 512 * DEPTH


def test_plain_sgd_has_no_state():
    ledger = estimate(_target(), optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    assert ledger.state_bytes == 0
    assert "optimizer_state" not in ledger.by_category


def test_accumulation_adds_exactly_one_copy_of_the_gradients():
    rows = 4096  # activations dominate: the peak is at the start of the backward pass
    half = estimate(_target(rows // 2), device="cpu").phase("forward")
    whole = estimate(_target(rows), device="cpu", switches=Switches(micro_batches=2)).phase("forward")
    extra_input = rows // 2 * WIDTH * 4
    assert whole.by_category["gradients"] == PARAMETER_BYTES
    assert whole.peak_bytes == half.peak_bytes + PARAMETER_BYTES + extra_input + 4  # and the loss of the first half


def test_kept_zero_gradients_are_gradients():
    def train_step(model, batch, optimizer):
        _loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    assert estimate(_target(train_step=train_step)).phase("forward").by_category["gradients"] == PARAMETER_BYTES


def test_activations_in_closed_form():
    rows = 1024
    one = rows * WIDTH * 4

    def forward(model, **options):
        target = _target(rows, build_model=lambda: nn.Sequential(*model))
        return estimate(target, device="cpu", **options).phase("forward").by_category["activations"]

    def layers(count):
        return [m for _ in range(count) for m in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]

    # Every tanh keeps its output, which is what the next product and the square of the loss keep too.
    assert forward(layers(DEPTH)) == DEPTH * one + 4
    # Of a checkpointed block only its input is kept, and the state of the random generator; the loss keeps the last.
    generator = torch.get_rng_state().numel()
    blocks = [nn.Sequential(*layers(2)) for _ in range(DEPTH // 2)]
    kept = forward(blocks, switches=Switches(checkpoint=("*",)))
    assert kept == DEPTH // 2 * (one + generator) + 4


def test_a_model_built_before_is_left_alone():
    model = _stack()
    model[1][0].weight = model[0][0].weight  # tied
    values = model[0][0].weight.detach().clone()
    before = estimate(_target(build_model=lambda: model), device="cpu", switches=Switches(checkpoint=("0",)))
    assert before.by_category["weights"] == PARAMETER_BYTES - PARAMETER_BYTES // DEPTH
    assert type(model[0][0].weight) is nn.Parameter
    assert torch.equal(model[0][0].weight, values)
    assert model[0][0].weight.grad is None
    assert "forward" not in vars(model[0])


def test_recomputed_activations_are_activations():
    trace = trace_step(_target(256), device="cpu", switches=Switches(checkpoint=("2",)))
    recomputed = [s for s in trace.storages if s.recomputed]
    assert {s.op for s in recomputed} >= {"aten.mm.default", "aten.tanh.default"}
    assert {s.module for s in recomputed if s.op != "torch.get_rng_state"} == {"2.0", "2.1"}


def test_forward_storage_that_dies_early_is_a_temporary():
    def loss(model, batch):
        (batch * 3).sum()
        return _loss(model, batch)

    trace = trace_step(_target(compute_loss=loss), device="cpu")
    ledger = estimate(_target(compute_loss=loss), device="cpu")
    assert any(s.op == "aten.mul.Tensor" and s.phase == "forward" for s in trace.storages)
    assert not any(t.op == "aten.mul.Tensor" and t.category == "activations" for t in ledger.live_at_peak)


def test_sums_and_order_hold():
    ledger = estimate(_target(2048))
    assert sum(ledger.by_category.values()) == ledger.peak_bytes
    assert sum(sum(counts.values()) for counts in ledger.by_module.values()) == ledger.peak_bytes
    assert ledger.peak_bytes == max(phase.peak_bytes for phase in ledger.phases)
    assert ledger.phase(ledger.peak_phase).by_category == ledger.by_category
    sizes = [tensor.num_bytes for tensor in ledger.live_at_peak]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % 512 == 0 for size in sizes)
    assert max(level for _, level in ledger.timeline) == ledger.peak_bytes


def test_groups_are_everything_alive_at_the_peak():
    ledger = estimate(_target())
    assert sum(group.num_bytes for group in ledger.live_groups) == ledger.peak_bytes
    weights = [group for group in ledger.live_groups if group.category == "weights"]
    assert [(group.count, group.dtype) for group in weights] == [(1, "float32")] * DEPTH
    assert {t.dtype for t in ledger.live_at_peak if t.category != "workspace"} == {"float32"}
    assert ledger.batch == (f"float32[4, {WIDTH}]",)
    assert measure_cpu(_target()).batch == ledger.batch


def test_user_lines_name_the_code_that_allocates():
    trace = trace_step(_target())
    lines = {s.where for s in trace.storages if s.phase in ("forward", "backward")}
    assert all("test_estimate.py:" in line for line in lines if line is not None)
    squares = {s.where for s in trace.storages if s.op == "aten.pow.Tensor_Scalar" and s.phase == "forward"}
    first = _loss.__code__.co_firstlineno
    assert {line.rpartition(":")[2] for line in squares} == {str(first + 1)}
    assert all(s.where is None for s in trace.storages if s.kind == "optimizer_state")


def test_backward_storages_belong_to_the_module_of_their_forward():
    trace = trace_step(_target(256))
    owners = {s.module for s in trace.storages if s.op == "aten.tanh_backward.default"}
    assert owners == {f"{i}.1" for i in range(DEPTH)}


def test_clipping_after_the_backward_pass_belongs_to_the_step():
    def train_step(model, batch, optimizer):
        _loss(model, batch).backward()
        for parameter in model.parameters():
            parameter.grad = parameter.grad.clone()
        optimizer.step()
        optimizer.zero_grad()

    trace = trace_step(_target(train_step=train_step))
    assert {s.phase for s in trace.storages if s.op == "aten.clone.default"} == {"step"}


def test_step_inside_the_backward_pass_is_a_step():
    class InBackward(torch.optim.SGD):
        def __init__(self, model):
            super().__init__(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(self.release)

        def release(self, parameter):
            self.step()
            parameter.grad = None

        def zero_grad(self, set_to_none=True):
            pass

    def train_step(model, batch, optimizer):
        _loss(model, batch).backward()

    ledger = estimate(_target(train_step=train_step), device="cpu", optimizer=InBackward)
    for phase in ("backward", "step"):  # never all gradients at once
        assert 0 < ledger.phase(phase).by_category["gradients"] <= 2 * PARAMETER_BYTES // DEPTH


def test_micro_batches_need_a_loss_of_the_targets_own():
    target = _target(train_step=lambda model, batch, optimizer: None)
    with pytest.raises(UsageError, match="has its own train_step") as caught:
        estimate(target, switches=Switches(micro_batches=2))
    assert caught.value.hint is not None
    with pytest.raises(UsageError, match="cannot be split in 3 equal"):
        estimate(_target(), switches=Switches(micro_batches=3))
    with pytest.raises(UsageError, match="matches no module"):
        estimate(_target(), switches=Switches(checkpoint=("nowhere.*",)))


def test_mistakes_of_the_target_are_named():
    with pytest.raises(TargetRaised, match="model\\(batch\\)"):
        estimate(_target(build_batches=lambda: [torch.randn(4, WIDTH + 1)], compute_loss=None))
    with pytest.raises(TargetError, match="scalar loss"):
        estimate(_target(compute_loss=lambda model, batch: model(batch)))


def test_host_reads_are_listed_as_warnings():
    def loss(model, batch):
        value = _loss(model, batch)
        return value if value.item() < 1e9 else value * 2

    (warning,) = estimate(_target(compute_loss=loss)).warnings
    assert "test_estimate.py:" in warning
    assert "assumed 1" in warning


def test_assumptions_say_what_was_assumed():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(64, 192)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).sum()

    target = Target(build_model=Model, build_batches=lambda: [torch.randn(2, 16, 64)])
    said = " ".join(estimate(target).assumptions)
    assert "512 bytes" in said
    assert "memory-efficient kernel, 1 calls a step" in said
    assert "torch.optim.AdamW (foreach)" in said
    assert "512" not in " ".join(estimate(target, device="cpu").assumptions)


def test_a_compiled_model_is_traced_in_eager_mode():
    compiled = estimate(_target(build_model=lambda: torch.compile(_stack())))
    eager = estimate(_target())
    assert compiled.peak_bytes == eager.peak_bytes
    assert compiled.by_module.keys() == eager.by_module.keys()
    assert set(compiled.assumptions) - set(eager.assumptions) == {
        "torch.compile is left out: the memory is that of eager execution."
    }


def test_batches_that_are_views_do_not_count_what_they_view():
    data = torch.randn(100_000, 8)
    target = Target(
        build_model=lambda: nn.Linear(8, 1),
        build_batches=lambda: [data[:16], data[16:32]],
        compute_loss=_loss,
    )
    for ledger in (estimate(target, device="cpu"), measure_cpu(target)):
        assert ledger.by_category["inputs"] == 16 * 8 * 4


def test_plain_tensor_attributes_are_buffers():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.table = torch.ones(1000)

        def forward(self, x):
            return (self.layer(x).sum() * self.table).sum()

    target = Target(build_model=Model, build_batches=lambda: [torch.randn(2, 8)])
    assert estimate(target, device="cpu").by_category["buffers"] == 4000
    assert measure_cpu(target).by_category["buffers"] == 4000


@pytest.mark.slow
def test_seven_billion_parameters():
    transformers = pytest.importorskip("transformers")

    def build():
        config = transformers.LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            vocab_size=32000,
            use_cache=False,
        )
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)

    ids = torch.randint(32000, (1, 2048))
    start = time.perf_counter()
    ledger = estimate(Target(build_model=build, build_batches=lambda: [{"input_ids": ids, "labels": ids}]))
    seconds = time.perf_counter() - start
    parameters = 6_738_415_616
    assert ledger.by_category["weights"] == 2 * parameters
    assert ledger.state_bytes == 4 * parameters + 4 * 291  # m and v in bf16, a step count for each tensor
    step = ledger.phase("step")
    assert step.by_category["workspace"] == 2 * 32 * 2**20  # cuBLAS, of the calling thread and of autograd
    assert 0 <= step.peak_bytes - 64 * 2**20 - 5 * 2 * parameters < 2**20
    assert ledger.peak_phase == "step"
    assert ledger.phase("forward").peak_bytes == pytest.approx(50_968 * 2**20, rel=0.001)  # fused attention, no mask
    assert seconds < 120
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 3 * 2**30


@pytest.mark.slow
def test_llama_in_closed_forms():
    """Two blocks of Llama-7B: copies of the parameters, one more of the gradients, and the state that the plan says."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, use_cache=False
    )
    ids = torch.randint(32000, (2, 16))
    device = device_model("cuda", cublas_workspace=0)

    def run(**options):
        target = Target(
            build_model=lambda: transformers.LlamaForCausalLM(config).to(torch.bfloat16),
            build_batches=lambda: [{"input_ids": ids, "labels": ids}],
        )
        return estimate(target, device=device, **options)

    foreach, fused = run(), run(optimizer=_adamw(fused=True))
    copy = foreach.by_category["weights"]
    assert 0 <= foreach.phase("step").peak_bytes - 5 * copy < 2**20
    assert 0 <= fused.phase("step").peak_bytes - 4 * copy < 2**20
    assert foreach.by_category["temporaries"] == pytest.approx(copy, rel=1e-3)  # foreach's, and not the state's
    accumulated = run(optimizer=_adamw(fused=True), switches=Switches(micro_batches=2))
    found = accumulated.phase("forward").by_category["gradients"]
    assert found == copy
    assert fused.phase("forward").by_category.get("gradients", 0) == 0
    planned = run(optimizer=lambda model: create_optimizer(model, Setting("slimadam", {"axes": [1]}), lr=1e-3))
    matrices = [(32000, 4096)] * 2 + [(4096, 4096)] * 8 + [(11008, 4096)] * 4 + [(4096, 11008)] * 2
    setting = Setting("slimadam", {"axes": [1]})
    said = sum(predicted_bytes(setting, shape) for shape in matrices)
    vectors = 5 * predicted_bytes(Setting("adamw"), (4096,))
    assert planned.state_bytes == said + vectors
