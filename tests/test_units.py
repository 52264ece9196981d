from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.units import format_bytes, format_count, format_duration, format_flops, format_rate, gib

BINARY = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
DECIMAL = {"": 1.0, "K": 1e3, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15}


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10**9, "953.67 MiB"),  # a GB is no GiB
        (2**30, "1.00 GiB"),
        (14_946_498_806, "13.92 GiB"),
        (3 * 2**40, "3.00 TiB"),
        (-(2**20), "-1.00 MiB"),
    ],
)
def test_bytes(n_bytes: int, expected: str) -> None:
    assert format_bytes(n_bytes) == expected


@given(st.integers(min_value=0, max_value=2**60))
def test_bytes_read_back_to_within_their_last_digit(n_bytes: int) -> None:
    number, unit = format_bytes(n_bytes).split(" ")
    assert abs(float(number) * BINARY[unit] - n_bytes) <= 0.0051 * BINARY[unit]


def test_gib_is_two_to_the_thirty() -> None:
    assert gib(2**31) == 2.0


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, "0"),
        (999, "999"),
        (1_250, "1.25K"),
        (124_439_808, "124.44M"),
        (8_030_261_248, "8.03B"),
        (2e12, "2.00T"),
    ],
)
def test_count(n: float, expected: str) -> None:
    assert format_count(n) == expected


@given(st.integers(min_value=1000, max_value=10**15))
def test_counts_read_back_to_within_their_last_digit(n: int) -> None:
    match = re.fullmatch(r"([\d.]+)([KMBT])", format_count(n))
    assert match is not None
    assert abs(float(match[1]) * DECIMAL[match[2]] - n) <= 0.0051 * DECIMAL[match[2]]


@pytest.mark.parametrize(
    ("rate", "unit", "expected"),
    [
        (173.2e9, "FLOP", "173.2 GFLOP/s"),
        (989.4e12, "FLOP", "989.4 TFLOP/s"),
        (2.25e15, "FLOP", "2.2 PFLOP/s"),
        (12_345, "tokens", "12.3 ktokens/s"),
        (7.25, "tokens", "7.2 tokens/s"),
    ],
)
def test_rate(rate: float, unit: str, expected: str) -> None:
    assert format_rate(rate, unit) == expected


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, "0 FLOP"),
        (999, "999 FLOP"),
        (1_250, "1.25 kFLOP"),
        (382_140_000_000, "382.14 GFLOP"),
        (2.5e15, "2.50 PFLOP"),
        (3e22, "30.00 ZFLOP"),
        (-(10**6), "-1.00 MFLOP"),
    ],
)
def test_flops(n: float, expected: str) -> None:
    assert format_flops(n) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0.00 ms"),
        (0.0000125, "12.50 µs"),
        (0.00125, "1.25 ms"),
        (3.2, "3.20 s"),
        (60.0, "1m 00s"),
        (125.0, "2m 05s"),
        (3599.7, "1h 00m"),
        (3 * 3600 + 7 * 60, "3h 07m"),
        (2 * 86400 + 4 * 3600, "2d 04h"),
        (999 * 86400, "999d 00h"),
        (1461 * 86400, "4.0 years"),
        (1_461_000 * 86400, "4,000.0 years"),
    ],
)
def test_duration(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


@given(st.floats(min_value=60, max_value=1e7))
def test_durations_read_back_to_within_their_last_unit(seconds: float) -> None:
    size = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    parts = re.findall(r"(\d+)([smhd])", format_duration(seconds))
    total = sum(int(number) * size[unit] for number, unit in parts)
    assert len(parts) == 2
    assert -1 <= math.floor(seconds) - total < size[parts[-1][1]]
