"""Where fake tensors cannot go on: the same tracer on real ones, held against the allocator; or a lower bound."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, vectors
from torch import nn

from memadvise.errors import TargetRaised
from memadvise.memory import real
from memadvise.memory.estimate import estimate
from memadvise.memory.measure import measure_cpu
from memadvise.memory.real import DoesNotFit, available_bytes
from memadvise.report.text import source_words
from memadvise.target import Target

TOLERANCE = 0.001


class Experts(nn.Module):
    """Each row goes to one of four experts, chosen by ``nonzero``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))

    def forward(self, x):
        weight, choice = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return (out - x).square().mean()


@torch.library.custom_op("memadvise_test::swish", mutates_args=())
def swish(x: torch.Tensor) -> torch.Tensor:
    wide = torch.cat((x, x.sigmoid()), -1)  # memory that is seen inside only
    return wide[:, : x.shape[1]] * wide[:, x.shape[1] :]


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swish_backward(ctx, gradient):
    (x,) = ctx.saved_tensors
    s = x.sigmoid()
    return gradient * (s + x * s * (1 - s))


swish.register_autograd(_swish_backward, setup_context=_keep)


class CustomOperator(nn.Module):
    """A kernel that torch knows nothing of but its result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 512), nn.Linear(512, 64)

    def forward(self, x):
        return self.second(swish(self.first(x))).square().mean()


class ThroughNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 256)

    def forward(self, x):
        h = self.body(x)
        widest = int(h.detach().numpy().argmax()) % 3 + 2
        return h[:, : widest * 32].square().mean()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 256)

    def forward(self, x):
        h = self.body(x)
        kinds = h.argmax(1).unique()
        return h[h > 0].square().mean() + h[:, kinds].mean()


class Packed(nn.Module):
    """Sequences of different lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 8)

    def forward(self, x):
        x, lengths = x.view(64, 8, 8), torch.arange(64) % 8 + 1
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.body(packed)[0], batch_first=True)
        return self.head(out).square().mean()


BEYOND_FAKES = {kind.__name__: kind for kind in (Experts, CustomOperator, ThroughNumpy, Masked, Packed)}


def target_of(kind: type[nn.Module]) -> Target:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return kind()

    return Target(build_model=build, build_batches=vectors, spec=kind.__name__)


@pytest.mark.parametrize("name", BEYOND_FAKES)
def test_real_tensors_take_what_the_allocator_gave(name: str) -> None:
    target = target_of(BEYOND_FAKES[name])
    traced, measured = estimate(target, device="cpu"), measure_cpu(target)
    for phase in measured.phases:
        assert traced.phase(phase.phase).peak_bytes == pytest.approx(phase.peak_bytes, rel=TOLERANCE), phase.phase
    assert traced.state_bytes == measured.state_bytes
    assert traced.source == "estimate"
    assert traced.on_real
    assert traced.assumptions[0].startswith("Real tensors")
    assert "test_real_tensors.py:" in traced.warnings[0]


@pytest.mark.parametrize("name", BEYOND_FAKES)
def test_real_tensors_with_the_semantics_of_cuda(name: str) -> None:
    ledger = estimate(target_of(BEYOND_FAKES[name]))
    assert ledger.device == "cuda"
    assert ledger.optimizer == "torch.optim.AdamW (foreach)"
    assert ledger.on_real
    assert source_words(ledger) == "traced on real tensors, run on the CPU"
    assert all(size % 512 == 0 for size in ledger.by_category.values())
    assert ledger.assumptions[0].startswith("Real tensors")


@pytest.mark.parametrize("name", ["llama", "mixtral", "unet", "lora", "message_passing"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_and_real_tensors_take_the_same(name: str, device: str) -> None:
    fake, true = (estimate(ARCHITECTURES[name], device=device, tensors=kind) for kind in ("fake", "real"))
    assert true.peak_bytes == fake.peak_bytes
    assert true.by_category == fake.by_category
    assert true.by_module == fake.by_module


def _half_precision(model, batch):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return model(**batch).loss


def test_kernels_of_cuda_alone_are_stood_in_for() -> None:
    """Flash attention and softmax of half precision: the CPU has neither."""
    given = ARCHITECTURES["gpt2"]
    target = Target(build_model=given.build_model, build_batches=given.build_batches, compute_loss=_half_precision)
    fake, true = (estimate(target, tensors=kind) for kind in ("fake", "real"))
    assert true.peak_bytes == fake.peak_bytes
    assert any("Attention" in assumption for assumption in true.assumptions)


# ---------------------------------------------------------------- what does not fit


def test_what_does_not_fit_is_bounded_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "fits", lambda size: False)
    target = target_of(Experts)
    bound, exact = estimate(target, device="cpu"), measure_cpu(target)
    assert bound.source == "lower bound"
    assert bound.state_bytes == exact.state_bytes
    assert bound.peak_bytes < exact.peak_bytes
    for category in ("weights", "gradients", "optimizer_state"):
        assert bound.phase("step").by_category[category] == exact.phase("step").by_category[category]
    assert bound.warnings[0].startswith("a lower bound")
    assert "test_real_tensors.py:" in bound.warnings[0]


def test_memory_that_runs_out_on_the_way_leaves_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    room = iter([1 << 40, 1 << 40, 1 << 40])
    monkeypatch.setattr(real, "available_bytes", lambda: next(room, 0))
    monkeypatch.setattr(real, "_CHECK_EVERY", 1 << 16)
    bound = estimate(target_of(Experts), device="cpu")
    assert bound.source == "lower bound"
    assert "needs more memory than this machine has" in bound.warnings[0]


def test_real_tensors_that_were_asked_for_and_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    room = iter([1 << 40])
    monkeypatch.setattr(real, "available_bytes", lambda: next(room, 0))
    monkeypatch.setattr(real, "_CHECK_EVERY", 1 << 16)
    with pytest.raises(DoesNotFit, match="more memory than this machine has"):
        estimate(target_of(Experts), device="cpu", tensors="real")


def test_memory_available_is_less_than_all_of_it() -> None:
    assert 0 < available_bytes() < 1 << 50


def test_a_large_model_beyond_fakes_is_bounded_at_once() -> None:
    """200 GB of weights: nothing of it may be allocated, and no traceback shown."""

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(64, 800_000_000, bias=False)

        def forward(self, x):
            return self.body(x[(self.body.weight[0] > 0).nonzero()[:, 0]]).mean()

    bound = estimate(Target(build_model=Large, build_batches=vectors), device="cpu")
    size = 64 * 800_000_000 * 4
    assert bound.phase("step").by_category["weights"] == bound.phase("step").by_category["gradients"] == size
    assert bound.state_bytes == pytest.approx(2 * size)
    assert "alone take" in bound.warnings[0]


def test_a_mistake_of_the_program_is_told_as_such() -> None:
    def wrong(model, batch):
        return model(batch) + batch.labels

    given = target_of(Experts)
    with pytest.raises(TargetRaised, match="compute_loss"):
        estimate(Target(build_model=lambda: nn.Linear(64, 1), build_batches=vectors, compute_loss=wrong), device="cpu")
    with pytest.raises(TargetRaised, match="cannot be multiplied"):
        estimate(Target(build_model=given.build_model, build_batches=lambda: [torch.zeros(4, 5)]), device="cpu")
