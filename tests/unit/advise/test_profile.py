"""Profiles: learned from scans, read strictly, transferred by role and relative depth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memadvise.advise.profile import (
    Profile,
    ProfileValue,
    load_profile,
    profile_from_scans,
    relative_depths,
    shipped_profiles,
)
from memadvise.errors import FileFormatError, UsageError
from memadvise.ledger import Parameter, Scan, to_json


def matrix(name: str, shape: tuple[int, int] = (256, 64), role: str = "mlp_up") -> Parameter:
    return Parameter(name, shape, "float32", 4 * shape[0] * shape[1], True, role, name, "Linear", (1,), (0,))


def value(depth: float, score: float, **more: float) -> ProfileValue:
    return ProfileValue("mlp_up", depth, "mean(fan_in)", score, 0.1, **more)


def test_depth_is_counted_within_a_role() -> None:
    names = ["h.0.up", "h.1.up", "h.2.up"]
    depths = relative_depths([*(matrix(n) for n in names), matrix("head", role="head")])
    assert depths == {"h.0.up": 0.0, "h.1.up": 0.5, "h.2.up": 1.0, "head": 0.0}


def test_scores_are_per_element_and_linear_in_depth() -> None:
    profile = Profile("p", (value(0.0, 1.0, lr_multiplier=2.0), value(1.0, 3.0, lr_multiplier=4.0)))
    found = profile.lookup(matrix("w"), 0.25, "mean(fan_in)")
    assert found is not None
    assert found.abs_d1 == pytest.approx(1.5 * 256 * 64)
    assert found.one_minus_cos == pytest.approx(0.1)
    assert found.lr_multiplier == pytest.approx(2.5)
    assert found.abs_d24 is None
    outside = Profile("p", (value(0.5, 1.0),)).lookup(matrix("w"), 1.0, "mean(fan_in)")
    assert outside is not None
    assert outside.abs_d1 == 256 * 64
    assert profile.lookup(matrix("w", role="head"), 0.0, "mean(fan_in)") is None
    assert profile.lookup(matrix("w"), 0.0, "mean(all)") is None


def test_a_profile_of_a_scan_comes_back_from_its_file(sample_scan: Scan, tmp_path: Path) -> None:
    profile = profile_from_scans("gpt", [sample_scan, sample_scan], {"seeds": [0, 1]})
    ups = [v for v in profile.values if v.role == "mlp_up" and v.candidate == "mean(fan_in)"]
    assert [v.depth for v in ups] == [0.0, 0.333, 0.667, 1.0]
    assert ups[0].abs_d1 == pytest.approx(0.5 / (512 * 128), rel=1e-3)
    path = tmp_path / "gpt.json"
    path.write_text(to_json(profile))
    assert load_profile(str(path)) == profile


def test_a_scan_without_a_probe_teaches_nothing() -> None:
    from tests.conftest import make_scan

    with pytest.raises(UsageError, match="no probe"):
        profile_from_scans("gpt", [make_scan(probe=False)], {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a whole JSON document"),
        ("[]", "is not a memadvise profile"),
        ('{"profile_version": 9}', "has profile version 9"),
        ('{"profile_version": 1, "values": []}', "missing 'name'"),
        ('{"profile_version": 1, "name": "x", "values": [], "more": 1}', "unknown key 'more'"),
        (json.dumps({"profile_version": 1, "name": "x", "values": [{"role": 1}]}), "values"),
    ],
)
def test_files_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=message):
        load_profile(str(path))


def test_names_are_those_shipped(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no profile 'nobody'"):
        load_profile("nobody")
    with pytest.raises(FileFormatError, match="cannot read"):
        load_profile(str(tmp_path / "missing.json"))
    for name in shipped_profiles():
        assert load_profile(name).evidence
