"""What devices take to add up their answers: the law, and its fit."""

import math

import pytest

from moejax.cards import load_hardware, load_model
from moejax.cost import all_reduce_bytes, all_reduce_s, fit_all_reduce, from_hardware
from moejax.cost import knows_all_reduce as knows
from moejax.errors import BadFileError

HARDWARE, MODEL = load_hardware("rtx-3090"), load_model("qwen1.5-moe-a2.7b")
LATENCY_S, BYTES_PER_S = 1.2e-5, 2e10


def _records(sizes, num_devices=2, factor=1.0):
    return [
        {
            "num_devices": num_devices,
            "all_reduce_bytes": size,
            "all_reduce_s": {"samples": [factor * (LATENCY_S + size / BYTES_PER_S)] * 3},
        }
        for size in sizes
    ]


def test_a_profile_that_does_not_say_takes_nothing():
    assert not knows(HARDWARE)
    parameters = from_hardware(HARDWARE)
    assert (parameters.all_reduce_latency_s, parameters.all_reduce_bytes_per_s) == (0.0, math.inf)
    assert float(all_reduce_s(parameters, MODEL, 4)) == 0.0


def test_the_law_is_found_again():
    found = fit_all_reduce(_records([8192, 2**17, 2**20, 2**22]), HARDWARE)
    assert knows(found)
    assert found.value("all_reduce_latency_s") == pytest.approx(LATENCY_S, rel=1e-3)
    assert found.value("all_reduce_bytes_per_s") == pytest.approx(BYTES_PER_S, rel=1e-3)
    assert found.kinds["all_reduce_latency_s"] == "fitted"
    assert "over 2 devices" in found.constants["all_reduce_latency_s"].source
    assert all_reduce_bytes(MODEL, 4) == 4 * 4 * 2048
    expected_s = LATENCY_S + 4 * 4 * 2048 / BYTES_PER_S
    assert all_reduce_s(from_hardware(found), MODEL, 4) == pytest.approx(expected_s, rel=1e-3)
    for name, constant in HARDWARE.constants.items():
        assert found.constants[name] == constant


@pytest.mark.parametrize("sizes", [[8192], [8192, 16384]])
def test_few_sizes_tell_a_latency_only(sizes):
    found = fit_all_reduce(_records(sizes), HARDWARE)
    assert found.kinds["all_reduce_latency_s"] == "measured"
    assert found.value("all_reduce_latency_s") == pytest.approx(LATENCY_S, rel=0.1)
    assert "all_reduce_bytes_per_s" not in found.constants


@pytest.mark.parametrize(
    ("records", "cause"),
    [
        ([], "no all-reduce"),
        (_records([8192], 2) + _records([8192], 4), "are not one law"),
        (_records([8192], factor=-1.0), "all_reduce_s"),
        ([{"num_devices": 2, "all_reduce_s": 1e-5}], "all_reduce_bytes"),
    ],
)
def test_records_that_say_nothing(records, cause):
    with pytest.raises(BadFileError, match=cause):
        fit_all_reduce(records, HARDWARE)
