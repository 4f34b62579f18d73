"""What joins several devices: the law of an all-reduce, and fits of it and of the links."""

import math

import pytest

from moejax.cards import load_hardware, load_model
from moejax.cost import BetweenDevices, all_reduce_s, between_devices, fit_devices
from moejax.errors import BadFileError

HARDWARE, MODEL = load_hardware("rtx-3090"), load_model("qwen1.5-moe-a2.7b")
LATENCY_S, BYTES_PER_S = 1.2e-5, 2e10


def _fitted(*sizes: int, alone: float = 5e10, beside: float = 4e10):
    times_s = {size: LATENCY_S + size / BYTES_PER_S for size in sizes}
    return fit_devices(HARDWARE, 2, times_s, alone_bytes_per_s=alone, beside_bytes_per_s=beside)


def test_a_profile_that_does_not_say_takes_nothing():
    between = between_devices(HARDWARE)
    assert between == BetweenDevices(0.0, math.inf, 1.0)
    assert all_reduce_s(between, MODEL, 4) == 0.0


@pytest.mark.parametrize(
    ("sizes", "kind"), [((8192, 131072), "measured"), ((8192, 2**17, 2**20, 2**22), "fitted")]
)
def test_the_law_is_found_again(sizes, kind):
    found = _fitted(*sizes)
    assert found.value("all_reduce_latency_s") == pytest.approx(LATENCY_S, rel=1e-3)
    assert found.value("all_reduce_bytes_per_s") == pytest.approx(BYTES_PER_S, rel=1e-3)
    assert found.kinds["all_reduce_latency_s"] == kind
    assert "of 2 devices" in found.constants["all_reduce_latency_s"].source
    expected_s = LATENCY_S + 4 * 4 * 2048 / BYTES_PER_S
    assert all_reduce_s(between_devices(found), MODEL, 4) == pytest.approx(expected_s, rel=1e-3)
    for name, constant in HARDWARE.constants.items():
        assert found.constants[name] == constant


@pytest.mark.parametrize("times_s", [{8192: 1e-5}, {8192: 1.1e-5, 131072: 0.9e-5}])
def test_sizes_that_tell_no_bandwidth_give_a_latency(times_s):
    rates = {"alone_bytes_per_s": 1.0, "beside_bytes_per_s": 1.0}
    found = fit_devices(HARDWARE, 2, times_s, **rates)
    assert found.value("all_reduce_latency_s") == pytest.approx(1e-5)
    assert "all_reduce_bytes_per_s" not in found.constants


def test_links_side_by_side_are_no_faster_than_one():
    assert _fitted(8192).value("links_beside_ratio") == 0.8
    assert _fitted(8192, beside=5.1e10).value("links_beside_ratio") == 1.0


@pytest.mark.parametrize(
    ("sizes", "rates", "cause"),
    [
        ((), {}, "no all-reduce of 2"),
        ((0,), {}, "is 0"),
        ((8192,), {"alone": 0.0}, "is 0.0"),
        ((8192,), {"beside": math.nan}, "is nan"),
    ],
)
def test_numbers_that_say_nothing(sizes, rates, cause):
    with pytest.raises(BadFileError, match=cause):
        _fitted(*sizes, **rates)
