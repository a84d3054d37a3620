import dataclasses
import json
import random

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    ADAMW,
    CANDIDATES,
    COLUMNS,
    ROWS,
    by_name,
    describe,
    language_batches,
    language_loss,
    language_target,
    probe,
    without_times,
)
from torch import nn

from memadvise import ledger
from memadvise.errors import OptimizerError, TargetError, TargetRaised
from memadvise.plan.schema import Plan, Rule, Setting
from memadvise.target import Target


@pytest.fixture(scope="module")
def full():
    """One complete probe of a real model, shared by the tests that only read it."""
    calls = []
    result = probe(
        language_target(dropout=0.1),
        num_steps=40,
        lr=3e-3,
        hessian=True,
        methods=(ADAMW, ROWS, Setting("lion"), Setting("sgd")),
        progress=lambda *call: calls.append(call),
    )
    return result, calls


def test_probe_of_a_transformer_is_complete(full):
    result, _ = full
    assert result.num_steps == 40
    assert result.recorded_steps == tuple(range(20, 40, 4))
    assert result.warnings == ()
    assert len(result.losses) == 40
    assert result.losses[-1] < result.losses[0]
    for p in result.parameters:
        assert p.unknown is None
        shape = next(d.shape for d in describe(language_target().model()) if d.name == p.name)
        assert len(p.snr) == (3 if len(shape) == 2 else 1)
        assert all(v.snr > 0 and 0 < v.error < 1 for v in p.snr)
        assert {v.candidate for v in p.fidelity} == ({s.key for s in CANDIDATES} if len(shape) == 2 else set())
        assert {v.estimator for v in p.hessian} <= {"gradient-covariance", "hessian-vector-products"}
        assert bool(p.hessian) == (len(shape) == 2)


def test_adamw_differs_from_itself_by_nothing(full):
    for p in full[0].parameters:
        values = {v.candidate: v for v in p.fidelity}
        if values:
            assert values["adamw"].abs_d1 == 0
            assert all(v.abs_d1 > 0 for name, v in values.items() if name != "adamw")


def test_the_screen_covers_both_checkpoints_and_confirmation_one_of_each_role(full):
    probes = by_name(full[0])
    query = probes["query.weight"].hessian
    assert [v.partition for v in query if v.estimator == "gradient-covariance"] == ["head", "row", "column"]
    assert {v.num_samples for v in query if v.estimator == "gradient-covariance"} == {64}
    confirmed = [n for n, p in probes.items() if any(v.estimator == "hessian-vector-products" for v in p.hessian)]
    assert len(confirmed) == 6


def test_each_optimizer_runs_from_the_same_start(full):
    runs = {run.method: run for run in full[0].runs}
    assert list(runs) == ["adamw", "slimadam", "lion", "sgd"]
    assert len({run.first_loss for run in runs.values()}) == 1
    assert full[0].losses[0] == runs["adamw"].first_loss
    assert len({run.last_loss for run in runs.values()}) == 4
    assert runs["slimadam"].options == {"axes": [1]}
    assert all(run.problem is None and run.step_seconds > 0 and run.num_steps == 4 for run in runs.values())
    assert runs["lion"].lr < runs["adamw"].lr == 3e-3


def test_state_bytes_are_those_of_the_real_state(full):
    parameters = describe(language_target().model())
    runs = {run.method: run for run in full[0].runs}
    dense = sum(8 * p.numel + 4 for p in parameters)
    assert runs["adamw"].state_bytes == dense
    saved = sum(4 * (p.numel - p.shape[0]) for p in parameters if len(p.shape) == 2)
    assert runs["slimadam"].state_bytes == dense - saved


def test_progress_counts_up_to_the_end(full):
    calls = full[1]
    ends = {what: (done, total) for what, done, total in calls}
    assert ends["probing: AdamW"] == (40, 40)
    assert ends["probing: training with each optimizer"] == (4, 4)
    assert ends["probing: Hessian blocks"] == (9, 9)
    assert ends["probing: Hessian-vector products"] == (6, 6)


def test_result_is_a_valid_scan_section(full):
    text = ledger.to_json(full[0])
    assert ledger.from_dict(ledger.ProbeLedger, json.loads(text)) == full[0]


def test_two_probes_agree_and_leave_random_state_alone():
    results = []
    target = language_target(dropout=0.2)
    parameters = describe(target.model())
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        random.seed(disturbance)
        before = torch.get_rng_state(), random.getstate()
        result = probe(target, parameters, hessian=True, hessian_probes=4, methods=(ADAMW,))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        results.append(without_times(result))
    assert results[0] == results[1]
    assert probe(language_target(dropout=0.2), seed=7).losses != results[0].losses


def test_measuring_changes_no_step():
    """Training with the Hessian measured in between is the training without it, dropout and all."""
    plain = probe(language_target(dropout=0.2))
    measured = probe(language_target(dropout=0.2), hessian=True, hessian_probes=4)
    assert measured.losses == plain.losses
    assert [p.snr for p in measured.parameters] == [p.snr for p in plain.parameters]


# ---------------------------------------------------------------- known structure


class Scaled(nn.Module):
    """A linear layer whose outputs matter very differently: rows of its gradient have very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 10, bias=False)
        self.register_buffer("scales", torch.logspace(-2, 2, 10))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((self.linear(x) * self.scales - y) ** 2).mean()


def noise_batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 12, generator=generator), torch.randn(16, 10, generator=generator)) for _ in range(60)]


def test_known_structure_is_recovered():
    result = probe(Target(Scaled, noise_batches), num_steps=60, lr=1e-5)
    (p,) = result.parameters
    snr = {v.axes: v.snr for v in p.snr}
    assert snr[1,] > 5  # within a row all entries are alike
    assert snr[0,] < 0.5
    assert snr[0, 1] < 0.5
    harm = {v.candidate: v.abs_d1 for v in p.fidelity}
    assert harm[ROWS.key] < 0.1 * harm[COLUMNS.key]


# ---------------------------------------------------------------- what can go wrong


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.used(x)).square().mean()


def test_parameter_without_gradient_is_unknown():
    target = Target(Partly, lambda: list(torch.randn(3, 8, 4)))
    result = probe(target, hessian=True, methods=(ADAMW,))
    assert by_name(result).keys() == {"used.weight", "unused.weight"}
    assert by_name(result)["unused.weight"].unknown == "never received a gradient"
    assert by_name(result)["unused.weight"].snr == by_name(result)["unused.weight"].hessian == ()
    assert by_name(result)["used.weight"].unknown is None
    assert result.runs[0].problem is None


def test_parameter_that_is_not_in_the_model_is_unknown():
    parameters = describe(Partly())
    renamed = dataclasses.replace(parameters[0], name="elsewhere", aliases=())
    result = probe(Target(Partly, lambda: list(torch.randn(3, 8, 4))), (renamed, *parameters))
    assert "not found" in by_name(result)["elsewhere"].unknown
    assert by_name(result)["used.weight"].unknown is None


def poisoned(at):
    """A language target whose loss is NaN from call ``at`` on."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        return language_loss(model, batch) * (float("nan") if len(calls) > at else 1.0)

    return language_target(compute_loss=loss)


def test_nan_loss_ends_the_probe_with_what_is_known():
    result = probe(poisoned(14), methods=(ADAMW,), hessian=False)
    assert (result.num_steps, result.recorded_steps) == (14, (10, 12))
    assert len(result.losses) == 14
    assert "the loss became nan at step 14; the statistics recorded before are kept" in result.warnings[0]
    assert all(p.unknown is None and p.snr for p in result.parameters)
    assert result.runs[0].problem == "the loss became nan at step 0"
    assert result.runs[0].first_loss is None
    ledger.to_json(result)


def test_nan_loss_at_once_leaves_everything_unknown():
    result = probe(poisoned(0), hessian=True)
    assert result.num_steps == 0
    assert {p.unknown for p in result.parameters} == {"the loss became nan at step 0, before anything was recorded"}
    assert "nothing was recorded" in result.warnings[0]


def test_divergence_is_noticed():
    result = probe(language_target(), num_steps=30, lr=10.0)
    assert any("diverging" in w for w in result.warnings)


def exhausted(error, at, **changes):
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) > at:
            raise error
        return language_loss(model, batch)

    return language_target(compute_loss=loss, **changes)


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_out_of_memory_in_a_step(error):
    result = probe(exhausted(error, 0), hessian=True, methods=(ADAMW, Setting("sgd")))
    assert {p.unknown for p in result.parameters} == {"out of memory at step 0, before anything was recorded"}
    assert [run.problem for run in result.runs] == ["out of memory at step 0"] * 2
    assert any("out of memory" in w for w in result.warnings)
    ledger.to_json(result)


def test_out_of_memory_late_keeps_what_was_recorded():
    result = probe(exhausted(MemoryError(), 13))
    assert result.recorded_steps == (10, 12)
    assert all(p.unknown is None and p.snr for p in result.parameters)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("function", ["build_model", "build_batches"])
def test_out_of_memory_while_building(error, function):
    def fail():
        raise error

    parameters = describe(language_target().model())
    result = probe(language_target(**{function: fail}), parameters, methods=(ADAMW,))
    assert all("out of memory" in p.unknown for p in result.parameters)
    assert "out of memory" in result.runs[0].problem


def test_out_of_memory_in_the_hessian_only():
    """The 20 training steps fit; evaluation mode, which only measuring uses, does not."""

    def loss(model, batch):
        if not model.training:
            raise MemoryError
        return language_loss(model, batch)

    result = probe(language_target(compute_loss=loss), hessian=True)
    assert len(result.losses) == 20
    assert all(p.snr and p.unknown is None and not p.hessian for p in result.parameters)
    assert any("screen of the Hessian" in w and "out of memory" in w for w in result.warnings)


def test_interruption_passes_through_and_restores_random_state():
    target = exhausted(KeyboardInterrupt(), 3)
    parameters = describe(target.model())
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        probe(target, parameters)
    assert torch.equal(torch.get_rng_state(), before)


def test_user_errors_pass_through():
    with pytest.raises(TargetRaised, match="wrong shape"):
        probe(exhausted(ValueError("wrong shape"), 2))


def test_optimizer_that_refuses_is_a_problem_of_its_run():
    def refuse(model, plan, **hyper):
        raise OptimizerError("heads does not divide the rows")

    (run,) = probe(language_target(), methods=(ROWS,), make_optimizer=refuse).runs
    assert (run.problem, run.num_steps, run.state_bytes) == ("heads does not divide the rows", 0, 0)


def test_sparse_gradients_get_a_sentence():
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4, sparse=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x).square().mean()

    with pytest.raises(TargetError, match=r"the gradient of table\.weight .* is sparse"):
        probe(Target(Sparse, lambda: [torch.arange(5)]))


def test_few_batches_are_cycled_and_too_few_samples_reported():
    batches = language_batches(1, batch_size=1)  # one sample: nothing to compare, yet it has a Hessian
    result = probe(language_target(build_batches=lambda: batches), hessian=True)
    assert result.num_steps == 20
    assert any("only 1 separable samples" in w for w in result.warnings)
    values = by_name(result)["query.weight"].hessian
    assert {v.estimator for v in values} == {"hessian-vector-products"}


# ---------------------------------------------------------------- ways to train


def test_own_training_step_with_clipping_that_returns_nothing():
    def step(model, batch, optimizer):
        language_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()

    result = probe(language_target(train_step=step), methods=(ADAMW,))
    assert len(result.losses) == 7  # before step 0, the five recorded ones and the last
    assert all(p.unknown is None for p in result.parameters)
    assert result.runs[0].first_loss == result.losses[0]
    # AdamW's v saw clipped gradients: fidelity is proportional to their size.
    clipped, plain = (by_name(r)["up.weight"].fidelity[1].abs_d1 for r in (result, probe(language_target())))
    assert clipped < 0.1 * plain


def test_own_training_step_that_returns_its_loss():
    def step(model, batch, optimizer):
        loss = language_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    assert len(probe(language_target(train_step=step)).losses) == 20


def test_batches_as_dicts_may_be_emptied_by_user_code():
    def batches():
        return [{"tokens": b} for b in language_batches(3)]

    def loss(model, batch):
        return language_loss(model, batch.pop("tokens"))

    result = probe(language_target(build_batches=batches, compute_loss=loss), hessian=True, methods=(ADAMW,))
    assert result.warnings == ()
    assert result.runs[0].problem is None


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 10, bias=False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.linear(x.bfloat16()).float(), x[:, :10].cumsum(1))


def test_bfloat16_moments_are_kept_in_float32():
    """In bfloat16 a second moment with beta2 = 0.999 stops moving; the statistics must not see that."""
    target = Target(Half, lambda: list(torch.randn(20, 64, 12)))
    (p,) = probe(target, num_steps=20, hessian=True).parameters
    assert p.unknown is None

    class Single(Half):
        def __init__(self) -> None:
            super().__init__()
            self.float()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.mse_loss(self.linear(x), x[:, :10].cumsum(1))

    (reference,) = probe(Target(Single, lambda: list(torch.randn(20, 64, 12))), num_steps=20).parameters
    for a, b in zip(p.snr, reference.snr, strict=True):
        assert a.snr == pytest.approx(b.snr, rel=0.1)
    assert {v.estimator for v in p.hessian} == {"gradient-covariance"}


def test_plans_are_methods_too():
    plan = Plan(rules=(Rule("**.weight", "adamw"), Rule("**", "adamw")))
    (run,) = probe(language_target(), methods={"mixed": plan}).runs
    assert (run.method, run.options, run.problem) == ("mixed", {}, None)


def test_buffers_start_anew_in_each_run():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.register_buffer("count", torch.zeros(1), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return self.norm(self.linear(x)).pow(4).mean() * (1 + self.count[0])

    target = Target(Normed, lambda: list(torch.randn(3, 8, 4)))
    result = probe(target, methods={"first": ADAMW, "second": ADAMW}, hessian=True)
    assert result.runs[0].first_loss == result.runs[1].first_loss == result.losses[0]
    assert result.runs[0].last_loss == result.runs[1].last_loss
