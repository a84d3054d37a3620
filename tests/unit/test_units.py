from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memadvise.errors import UsageError
from memadvise.units import echo_bytes, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * 10**9),
        ("12GiB", 12 * 2**30),
        ("12 gib", 12 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("800MB", 800 * 10**6),
        ("4096", 4096),
        ("7B", 7),
        (".5kB", 500),
        ("2TiB", 2 * 2**40),
    ],
)
def test_sizes_people_write(text: str, size: int) -> None:
    assert parse_bytes(text) == size


NO_SIZES = ["12 gigs", "", "GB", "-3GB", "0", "0.0001B", "1e9", "12,5GB", "nan", "12GB/s", "1 2GB"]


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size_is_refused_with_a_way_out(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert repr(text)[1:-1] in str(caught.value)
    assert "12GB" in str(caught.value.hint)


def test_gigabytes_and_gibibytes_are_told_apart() -> None:
    assert echo_bytes("12GB ", parse_bytes("12GB")) == "12GB = 11.18 GiB"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 * 2**29, "1.50 GiB"),
        (150 * 2**20, "150.0 MiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_format(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(min_value=1, max_value=2**63))
def test_plain_integers_are_exact(size: int) -> None:
    assert parse_bytes(str(size)) == size
    assert parse_bytes(f"{size}GiB") == size * 2**30
