"""Random numbers from a hash: uniform, independent, and the same whichever part is asked for."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from memadvise.optim import noise

COUNT = 200_000


def test_a_part_is_the_part_of_the_whole() -> None:
    for make in (noise.bits, noise.uniform, noise.gaussian, noise.signs):
        whole = make(7, 0, 1000, "cpu")
        assert torch.equal(whole[250:600], make(7, 250, 350, "cpu"))
        assert not torch.equal(whole, make(8, 0, 1000, "cpu"))
        assert not torch.equal(whole, make(7 + (1 << 40), 0, 1000, "cpu"))


def test_beyond_32_bits_the_numbers_do_not_repeat() -> None:
    assert not torch.equal(noise.bits(7, 0, 1000, "cpu"), noise.bits(7, 1 << 32, 1000, "cpu"))


@pytest.mark.parametrize("key", [0, 1, noise.key_of("embed", 3), (1 << 64) - 1])
def test_uniform_numbers_are_uniform_and_uncorrelated(key: int) -> None:
    x = noise.uniform(key, 0, COUNT, "cpu").double()
    assert x.min() >= 0
    assert x.max() < 1
    error = 5 / math.sqrt(COUNT)
    assert abs(x.mean() - 0.5) < error * math.sqrt(1 / 12)
    assert abs(x.var() - 1 / 12) < error * 0.1
    histogram = torch.histc(x, bins=64, min=0, max=1)
    expected = COUNT / 64
    assert ((histogram - expected) ** 2 / expected).sum() < 130  # chi-square of 63 degrees: 99.9999 %
    z = (x - 0.5) / math.sqrt(1 / 12)
    for lag in (1, 2, 3, 64, 4096):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(COUNT)
    other = (noise.uniform(key ^ 1, 0, COUNT, "cpu").double() - 0.5) / math.sqrt(1 / 12)
    assert abs((z * other).mean()) < error


def test_gaussian_numbers_have_the_moments_of_a_gaussian() -> None:
    x = noise.gaussian(noise.key_of("p", 0), 0, COUNT, "cpu").double()
    assert x.isfinite().all()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 5 * math.sqrt(spread / COUNT)
    assert abs((x.abs() < 1).double().mean() - 0.6827) < 0.006
    assert abs((x[1:] * x[:-1]).mean()) < 5 / math.sqrt(COUNT)


def test_signs_are_signs() -> None:
    x = noise.signs(5, 0, COUNT, "cpu")
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert abs(x.mean()) < 5 / math.sqrt(COUNT)


def test_keys_tell_names_numbers_and_their_order_apart() -> None:
    keys = {noise.key_of(*parts) for parts in [("a", 1), ("a", "1"), (1, "a"), ("a1",), ("a", 1, 0), (0, "a"), ("a",)]}
    assert len(keys) == 7
    assert all(0 <= key < 1 << 64 for key in keys)


def test_the_same_in_every_process() -> None:
    code = (
        "from memadvise.optim import noise;"
        "print(noise.key_of('layers.0.weight', 3), noise.bits(noise.key_of('x'), 5, 3, 'cpu').tolist())"
    )
    ours = f"{noise.key_of('layers.0.weight', 3)} {noise.bits(noise.key_of('x'), 5, 3, 'cpu').tolist()}"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert theirs.stdout.strip() == ours
