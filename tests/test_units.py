import math

import pytest

from moejax.errors import UsageError
from moejax.units import (
    format_bytes,
    format_change,
    format_ratio,
    format_seconds,
    parse_bytes,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2GB", 2 * 10**9),
        ("2GiB", 2**31),
        ("4000 MiB", 4000 * 2**20),
        ("0.5kb", 500),
        (" 17 ", 17),
        (".5 TB", 5 * 10**11),
    ],
)
def test_sizes_are_read(text: str, num_bytes: int):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-2GB", "2 GG", "1e9", "2GB 3", "nan", "inf"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(UsageError) as error:
        parse_bytes(text)
    assert "2GiB" in error.value.hint


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999.6e6, "1.00 GB"),
        (17301504, "17.3 MB"),
        (9.5325e9, "9.53 GB"),
        (9.996e9, "10.0 GB"),
        (2e9, "2.00 GB"),
        (1e15, "1000 TB"),
        (-17301504, "-17.3 MB"),
    ],
)
def test_sizes_are_written_with_three_digits(num_bytes: float, text: str):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (0, "0 s"),
        (9.816, "9.82 s"),
        (0.0234, "23.4 ms"),
        (684e-6, "684 us"),
        (4.1e-6, "4.10 us"),
        (12e-9, "12.0 ns"),
        (99.96e-3, "100 ms"),
        (1e-12, "0.00100 ns"),
        (math.inf, "inf ns"),
    ],
)
def test_times_are_written_with_three_digits(time_s: float, text: str):
    assert format_seconds(time_s) == text


def test_ratios_are_written_as_per_cent():
    assert format_ratio(0.6534) == "65.3 %"
    assert format_ratio(math.nan) == "nan"


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.0134, "+1.3 %"), (-0.004, "-0.4 %"), (-1e-6, "+0.0 %"), (0, "+0.0 %"), (math.inf, "inf")],
)
def test_changes_carry_their_sign_and_zero_is_positive(ratio: float, text: str):
    assert format_change(ratio) == text


@pytest.mark.parametrize(
    ("text", "time_s"), [("40ms", 0.04), ("1.5 s", 1.5), (" 684us ", 684e-6), (".5ns", 5e-10)]
)
def test_times_are_read_with_their_unit(text, time_s):
    assert parse_seconds(text) == pytest.approx(time_s)


@pytest.mark.parametrize("text", ["", "40", "40 MS", "-1s", "1e3s", "ms", "2GB"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError) as caught:
        parse_seconds(text)
    assert repr(text) in caught.value.cause
    assert "ms" in caught.value.hint
