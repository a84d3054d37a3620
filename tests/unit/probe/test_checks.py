import math

import pytest
import torch
from tiny_models import by_name, describe, language_loss, language_target, probe
from torch import nn

from memadvise.ledger import FidelityValue
from memadvise.probe.checks import idle_problem, rank_agreement, training_problems
from memadvise.probe.schedule import Schedule
from memadvise.target import Target


def falling(count=60, noise=0.02, seed=0):
    generator = torch.Generator().manual_seed(seed)
    jitter = torch.randn(count, generator=generator).tolist()
    return [2 * math.exp(-step / 25) + 1 + noise * jitter[step] for step in range(count)]


def test_by_default_every_sixth_step_from_the_thirtieth_is_recorded():
    schedule = Schedule(60)
    assert list(schedule.recorded) == [30, 36, 42, 48, 54]
    begins = [step for step in range(60) if schedule.window(step)[0]]
    ends = [step for step in range(60) if schedule.window(step)[1]]
    assert (begins, ends) == ([12, 36], [35, 59])
    assert not any(any(Schedule(23).window(step)) for step in range(23))
    longer = Schedule(60, extra=30)
    assert longer.recorded[-1] == 84
    assert longer.first_counted == 45


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_goes_well_is_left_in_peace(seed):
    assert training_problems(falling(noise=0.05, seed=seed), 6, 1e-3) == []


def test_a_loss_that_does_not_fall():
    flat = [2 + 0.05 * (-1) ** step for step in range(60)]
    (problem,) = training_problems(flat, 6, 1e-9)
    assert problem.startswith("the loss did not fall (2")
    assert training_problems(flat[:10], 1, 1e-9) == []  # too few to say
    assert training_problems(flat, 0, 1e-9, from_start=False) == []  # late in training that is how it looks


def test_a_loss_that_rises():
    (problem,) = training_problems([1 + 0.05 * step for step in range(60)], 6, 1.0)
    assert "diverging run; probe with a smaller learning rate" in problem


def test_a_spike_after_the_warm_up():
    losses = falling()
    losses[20:24] = [4.0, 3.5, 3.0, 2.5]
    (problem,) = training_problems(losses, 6, 1e-2)
    assert "jumped from" in problem
    assert "to 4 at step 20, after the warm-up" in problem
    losses = falling()
    losses[2] = 4.0  # that is what a warm-up is for
    assert training_problems(losses, 6, 1e-2) == []


def test_agreement_looks_at_what_keeps_the_momentum():
    def value(candidate, first, second):
        return FidelityValue(candidate, 1.0, 0.1, half_scores=(first, second))

    kept = [value("slimadam(axes=[1])", i, i + 0.1) for i in (1.0, 2.0, 3.0, 4.0)]
    dropped = [value("lion", i, -i) for i in (10.0, 20.0, 30.0)]
    assert rank_agreement([*kept, *dropped]) == pytest.approx(1.0)
    assert rank_agreement([]) is None


def test_idle_steps_in_words():
    assert idle_problem(60, 0) is None
    assert "in every step" in idle_problem(60, 60)
    assert "in 6 of 60 steps" in idle_problem(60, 6)


# ---------------------------------------------------------------- on real probes


def scheduled(rate):
    """A train_step with the user's own learning rate."""

    def step(model, batch, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = language_loss(model, batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    return language_target(train_step=step)


def test_a_schedule_at_zero_is_measured_and_said():
    result = probe(scheduled(0.0))
    assert any("the learning rate was 0 in every step" in w for w in result.warnings)
    assert any("the loss did not fall" in w for w in result.warnings)
    assert all(p.num_recorded == 5 for p in result.parameters)
    assert not any("learning rate was 0" in w for w in probe(scheduled(1e-3)).warnings)


def test_batches_that_run_out_are_repeated_and_that_is_said():
    result = probe(language_target(num_batches=7))
    assert len(result.losses) == 20
    assert "build_batches() ended after 7: they were repeated" in result.notes
    assert not any("repeated" in note for note in probe(language_target(num_batches=20)).notes)


class LoRA(nn.Module):
    """A frozen layer with a low-rank adapter, a layer used twice, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(32, 32, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
        self.shared = nn.Linear(32, 32, bias=False)
        self.again = self.shared
        self.unused = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.base(x) + self.up(self.down(x))
        return (self.again(torch.tanh(self.shared(x))) - x.cumsum(1)).square().mean()


def test_frozen_adapted_shared_and_unused_parameters():
    target = Target(LoRA, lambda: list(torch.randn(20, 16, 32)))
    result = probe(target, describe(LoRA()), hessian=True, hessian_probes=4)
    probes = by_name(result)
    assert probes.keys() == {"down.weight", "up.weight", "shared.weight", "unused.weight", "unused.bias"}
    for name in ("down.weight", "up.weight", "shared.weight"):
        assert probes[name].unknown is None
        assert probes[name].num_recorded == 5
        assert all(v.abs_d1 > 0 for v in probes[name].fidelity[1:])
    for name in ("unused.weight", "unused.bias"):
        assert probes[name].unknown == "never received a gradient"
        assert probes[name].fidelity == ()


class Rare(nn.Module):
    """An expert that gets a gradient in every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.always(x)
        return ((self.sometimes(y) if x[0, 0] > 0 else y) - 1).square().mean()


def test_a_parameter_without_a_gradient_in_some_steps_stands_still_with_its_shadows():
    batches = [torch.full((4, 8), 1.0 if step % 2 else -1.0) + 0.1 * torch.randn(4, 8) for step in range(20)]
    result = probe(Target(Rare, lambda: batches), describe(Rare()), num_steps=20)
    rare = by_name(result)["sometimes.weight"]
    assert rare.unknown is None
    assert rare.num_recorded == 0  # recorded steps are even ones, in which it never had a gradient
    assert by_name(result)["always.weight"].num_recorded == 5


def test_axes_and_partitions_are_chosen_and_explained():
    result = probe(language_target(), num_steps=40, lr=3e-3, hessian=True, snr_rule="official")
    assert result.snr_rule == "official"
    probes = by_name(result)
    for p in result.parameters:
        best = max((v for v in p.snr if v.snr is not None), key=lambda v: v.snr, default=None)
        if best is not None and len(p.snr) > 1:
            assert p.snr_axes == (best.axes if best.snr > 1 else None)
    query = probes["query.weight"]
    assert query.partition == "head"
    assert "head" in query.partition_evidence
    assert probes["norms.0.bias"].partition is None
    for p in result.parameters:
        if p.partition is not None:
            assert p.partition_measured == (
                "clear" in p.partition_evidence and "static prior" not in p.partition_evidence
            )
