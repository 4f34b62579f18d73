"""A step by its hit ratio: between the bounds of `estimate`, and on the host."""

import dataclasses

import pytest

from moejax.cards import load_hardware, load_model
from moejax.cost import estimate, layer_clock, served_step
from moejax.errors import UsageError

HARDWARE = load_hardware("rtx-3090")
MODEL = load_model("qwen1.5-moe-a2.7b")
CLOCK = layer_clock(HARDWARE, MODEL, batch_size=1)
NUM_DEMANDS = MODEL.num_moe_layers * MODEL.num_experts_per_tok


@pytest.mark.parametrize("batch_size", [1, 4])
def test_all_hit_and_all_missed_are_the_bounds_of_the_estimate(batch_size):
    bounds = estimate(HARDWARE, MODEL, batch_size=batch_size)
    for hit_ratio, bound_s in ((1.0, bounds.all_hit_step_s), (0.0, bounds.all_miss_step_s)):
        step = served_step(HARDWARE, MODEL, hit_ratio, batch_size=batch_size)
        assert step.step_s == pytest.approx(bound_s, rel=1e-5)


def test_parts_without_misses_are_layers_and_experts():
    step = served_step(HARDWARE, MODEL, 1.0, on_host=True)
    assert step.misses_s == pytest.approx(0, abs=1e-8)
    assert step.experts_s == pytest.approx(NUM_DEMANDS * float(CLOCK.expert_read_s[0]), rel=1e-5)


def test_the_host_computes_misses_beside_the_device():
    """All missed: the device has the shared experts only, and most of them hide."""
    step = served_step(HARDWARE, MODEL, 0.0, on_host=True)
    host_s = NUM_DEMANDS * float(CLOCK.host_expert_s[0])
    hidden_s = MODEL.num_moe_layers * float(CLOCK.overlap_ratio * CLOCK.shared_s)
    assert step.experts_s == 0
    assert step.misses_s == pytest.approx(host_s - hidden_s, rel=1e-4)
    assert step.layers_s == served_step(HARDWARE, MODEL, 1.0).layers_s


def test_time_is_linear_in_misses_once_they_outlast_the_device():
    steps_s = [served_step(HARDWARE, MODEL, h, on_host=True).step_s for h in (0.7, 0.5, 0.3)]
    assert steps_s[1] - steps_s[0] == pytest.approx(steps_s[2] - steps_s[1], rel=1e-4)


def test_weights_in_fewer_bits_take_less_time_and_caches_take_the_same():
    half = dataclasses.replace(MODEL, dense_bits=8.0)
    assert half.dense_bytes == MODEL.dense_bytes // 2
    assert half.kv_bytes_per_token == MODEL.kv_bytes_per_token
    fixed_s = MODEL.num_layers * HARDWARE.value("layer_fixed_s") + HARDWARE.value("step_fixed_s")
    whole_s, half_s = (
        served_step(HARDWARE, model, 1.0, context_tokens=0).layers_s for model in (MODEL, half)
    )
    assert half_s - fixed_s == pytest.approx((whole_s - fixed_s) / 2, rel=1e-4)


@pytest.mark.parametrize("hit_ratio", [-0.1, 1.1, float("nan")])
def test_no_share_is_refused(hit_ratio):
    with pytest.raises(UsageError, match="hit ratio"):
        served_step(HARDWARE, MODEL, hit_ratio)
