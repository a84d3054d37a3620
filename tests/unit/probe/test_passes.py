"""Shadows when memory is short and when somebody is in a hurry: passes, halving, stopping, resuming."""

import json

import pytest
import torch
from tiny_models import ADAMW, CANDIDATES, ROWS, by_name, language_loss, language_target, probe, without_times

from memadvise import ledger
from memadvise.errors import UsageError
from memadvise.optim import engine
from memadvise.plan.schema import Setting
from memadvise.probe import shadow
from memadvise.probe.adamw import EXTENSIONS
from memadvise.probe.checks import AGREEMENT

A_STEP = 27  # calls of the engine: nine matrices, three candidates beside AdamW


def failing(monkeypatch, when):
    """The engine runs out of memory where ``when(resolved, calls)`` says so; the names of what it was stepping."""
    run, calls, failed = engine.run, [], []

    def limited(items, h, forced):
        calls.append(items[0][0].name)
        if when(items[0][0], len(calls)):
            failed.append(items[0][0].name)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        run(items, h, forced)

    monkeypatch.setattr(shadow.engine, "run", limited)
    return failed


def test_out_of_memory_halfway_halves_the_shadows_and_loses_nothing(monkeypatch):
    whole = probe(language_target())
    failed = failing(monkeypatch, lambda resolved, calls: calls == 11 * A_STEP + 3)
    result = probe(language_target())
    assert len(failed) == 1
    assert result.passes == 2
    assert any("put off to 1 more pass" in w for w in result.warnings)
    assert result.losses == whole.losses
    assert result.parameters == whole.parameters  # those put off were watched in a run that was the same


def test_what_was_recorded_is_kept_when_memory_never_suffices_again(monkeypatch):
    failing(monkeypatch, lambda resolved, calls: calls > 14 * A_STEP)
    result = probe(language_target())
    assert len(result.losses) == 20
    assert all(p.unknown is None for p in result.parameters)
    kept = [p for p in result.parameters if p.fidelity]
    assert len(kept) == 9
    assert all(p.num_recorded == 2 and len(p.fidelity) == 4 for p in kept)  # of steps 10 and 12
    assert sum("the 2 steps recorded before are kept" in w for w in result.warnings) == 9


def test_out_of_memory_for_one_tensor(monkeypatch):
    failing(monkeypatch, lambda resolved, calls: resolved.name == "up.weight")
    probes = by_name(probe(language_target()))
    assert probes["up.weight"].unknown == "out of memory while measuring its candidates"
    assert probes["up.weight"].fidelity == ()
    assert probes["up.weight"].snr  # that did not need the memory
    others = [p for name, p in probes.items() if name != "up.weight"]
    assert all(p.unknown is None and p.num_recorded == 5 for p in others)


def test_a_training_step_that_needs_the_shadows_memory_gets_it():
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 13:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return language_loss(model, batch)

    result = probe(language_target(compute_loss=loss))
    assert len(result.losses) == 20
    assert result.passes == 2
    assert all(p.unknown is None and p.num_recorded == 5 for p in result.parameters)


def test_shadows_stay_below_the_limit_in_as_many_passes_as_that_takes():
    whole = probe(language_target())
    assert whole.passes == 1
    assert 0 < whole.shadow_bytes <= whole.shadow_limit_bytes
    limit = whole.shadow_bytes - 1024
    result = probe(language_target(), shadow_limit_bytes=limit)
    assert result.passes > 1
    assert 0 < result.shadow_bytes <= limit
    assert result.parameters == whole.parameters
    assert any(f"in {result.passes} passes over the run" in note for note in result.notes)
    with pytest.raises(UsageError, match=r"the shadows of .* need .*, more than the limit of 1\.00 KiB"):
        probe(language_target(), shadow_limit_bytes=1024)


def test_a_run_that_cannot_be_repeated_is_noticed():
    """Its gradients are scaled by a count that a second pass finds higher."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        return language_loss(model, batch) * (1 + 0.01 * len(calls))

    limit = probe(language_target(), num_steps=2).shadow_bytes - 1024
    result = probe(language_target(compute_loss=loss), shadow_limit_bytes=limit)
    assert any("pass 2 of 2 of the probe was not the run of the first" in w for w in result.warnings)


STAGES = ("probing: AdamW", "probing: AdamW, pass 2 of 2", "probing: training with slimadam(axes=[1])")


@pytest.fixture(scope="module")
def whole():
    limit = probe(language_target(), num_steps=2).shadow_bytes - 1024
    options = {"methods": (ADAMW, ROWS), "hessian": True, "hessian_probes": 4, "shadow_limit_bytes": limit}
    return probe(language_target(), **options), options


@pytest.mark.parametrize("stage", STAGES)
def test_stopping_keeps_what_was_measured_and_the_rest_is_measured_later(stage, whole):
    """Stopped and resumed, the result is that of a probe nobody stopped."""
    whole, options = whole
    reached = []

    def progress(what, done, total):
        if what == stage and done >= (14 if "AdamW" in stage else 0):
            reached.append(what)

    part = probe(language_target(), progress=progress, stop=lambda: bool(reached), **options)
    assert reached
    assert whole.complete
    assert not part.complete
    recorded = [p.num_recorded for p in part.parameters if len(p.fidelity) > 1]
    assert len(recorded) >= 2
    assert min(recorded) >= 2  # of the pass that was cut short, too
    part = ledger.from_dict(ledger.ProbeLedger, json.loads(ledger.to_json(part)))
    rest = probe(language_target(), prior=part, **options)
    assert rest.complete
    assert rest.parameters == whole.parameters
    assert (rest.losses, rest.recorded_steps) == (whole.losses, whole.recorded_steps)
    assert without_times(rest).runs == without_times(whole).runs


def test_a_window_whose_halves_disagree_makes_the_probe_longer(monkeypatch):
    agreements = iter([0.5, 0.99])
    monkeypatch.setattr("memadvise.probe.collected.rank_agreement", lambda values: next(agreements, 0.99))
    result = probe(language_target(), extensions=EXTENSIONS)
    assert result.num_steps == len(result.losses) == 30
    assert result.recorded_steps == (*range(10, 30, 2),)
    assert {p.num_recorded for p in result.parameters if len(p.fidelity) > 1} == {10}
    assert any("went on after step 20 for half its length" in note for note in result.notes)
    assert not any("not settled" in w for w in result.warnings)
    longer = by_name(probe(language_target(), num_steps=30, extensions=0))["up.weight"].fidelity
    values = by_name(result)["up.weight"].fidelity  # of the second half of the longer run alone
    assert values[1].abs_d1 == pytest.approx(longer[1].abs_d1, rel=0.5)


def test_halves_that_never_agree_are_flagged(monkeypatch):
    monkeypatch.setattr("memadvise.probe.collected.rank_agreement", lambda values: 0.5)
    result = probe(language_target(), extensions=EXTENSIONS)
    assert result.num_steps == 40
    assert any(f"Spearman 0.50, wanted {AGREEMENT}): the ranking is not settled" in w for w in result.warnings)


def test_the_halves_of_a_real_window_are_compared():
    result = probe(language_target(), num_steps=60, lr=1e-3)
    assert result.rank_agreement is not None
    assert 0.5 < result.rank_agreement <= 1


def test_a_shadow_in_eight_bits_that_strays_is_named(monkeypatch):
    """Its state is spoilt on the way: the self-check must see it."""
    settings = (*CANDIDATES, Setting("adamw", {"first_moment": "int8", "second_moment": "int8"}))
    good = probe(language_target(), settings=settings)
    assert not any("self-check failed" in w for w in good.warnings)
    run = engine.run

    def spoilt(items, h, forced):
        run(items, h, forced)
        for resolved, _, _, state in items:
            if resolved.name == "up.weight":
                for tensor in state.values():
                    if not tensor.is_floating_point():  # codes
                        tensor.zero_()

    monkeypatch.setattr(shadow.engine, "run", spoilt)
    bad = probe(language_target(), settings=settings)
    failed = [w for w in bad.warnings if "self-check failed" in w]
    assert len(failed) == 1
    assert "on up.weight, AdamW in 8 bits" in failed[0]
