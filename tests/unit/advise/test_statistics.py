"""SNR decides the axes of a mean, the Hessian the blocks."""

from __future__ import annotations

from memadvise.advise.candidates import candidate_settings, make_groups
from memadvise.advise.statistics import narrowed
from memadvise.ledger import Parameter, ParameterProbe, SnrValue


def query(name: str, role: str = "attention_query") -> Parameter:
    return Parameter(name, (128, 64), "float32", 32768, True, role, name, "Linear", (1,), (0,), heads=4)


def snr(name: str, fan_in: float | None, fan_out: float | None, **more: object) -> ParameterProbe:
    values = tuple(SnrValue(axes, value, value, None) for axes, value in (((1,), fan_in), ((0,), fan_out)))
    return ParameterProbe(name, snr=values, **more)  # type: ignore[arg-type]


def axes_left(*probes: ParameterProbe) -> set[tuple[int, ...]]:
    (group,) = make_groups([query("h.0.q"), query("h.1.q")])
    kept = narrowed(group, {p.name: p for p in probes})
    return {tuple(s.options["axes"]) for s in kept.settings if s.method == "slimadam"}


def test_the_mean_of_lower_snr_goes() -> None:
    assert axes_left(snr("h.0.q", 5.0, 1.0), snr("h.1.q", 4.0, 2.0)) == {(1,), (0, 1)}
    assert axes_left(snr("h.0.q", 0.1, 1.0), snr("h.1.q", 0.4, 2.0)) == {(0,), (0, 1)}


def test_nothing_goes_where_nothing_is_known() -> None:
    every = {(0,), (1,), (0, 1)}
    assert axes_left() == every
    assert axes_left(snr("h.0.q", 5.0, None)) == every
    assert axes_left(snr("h.0.q", 2.0, 2.0)) == every


def test_heads_go_where_the_hessian_showed_other_blocks() -> None:
    (group,) = make_groups([query("h.0.q")])
    assert any(s.method == "adam_mini" for s in candidate_settings(group.members[0]))
    for partition, measured, left in (("row", True, False), ("head", True, True), ("row", False, True)):
        probe = snr("h.0.q", None, None, partition=partition, partition_measured=measured)
        kept = narrowed(group, {"h.0.q": probe})
        assert any(s.method == "adam_mini" for s in kept.settings) is left
