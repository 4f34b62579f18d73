"""Clock, closed-form step and estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cards import load_hardware, load_model
from moejax.cost import (
    cliff_slots,
    clock_from_parameters,
    estimate,
    event_s,
    expected_distinct_experts,
    expert_compute_s,
    from_hardware,
    layer_clock,
    smallest_budget_bytes,
    step_latency_s,
    workspace_bytes,
)
from moejax.errors import UsageError

HARDWARE = load_hardware("rtx-3090")
MODEL = load_model("qwen1.5-moe-a2.7b")
CLOCK = layer_clock(HARDWARE, MODEL, batch_size=1)


def full(value: float):
    return jnp.full((MODEL.num_moe_layers,), value, jnp.float32)


def test_every_field_is_float32_with_a_time_per_moe_layer():
    for name, leaf in CLOCK._asdict().items():
        assert leaf.dtype == jnp.float32, name
        assert leaf.shape in ((), (24,)), name
        # This profile does not say that prefetches slow anything.
        assert (np.asarray(leaf) > 0).all() == (name != "shadow_copy_s"), name


def test_the_clock_adds_up_from_bytes_and_bandwidths():
    rate = HARDWARE.value("vram_bytes_per_s") * HARDWARE.value("kernel_efficiency_ratio")
    np.testing.assert_allclose(CLOCK.expert_read_s, 17301504 / rate, rtol=1e-6)
    np.testing.assert_allclose(
        CLOCK.expert_token_s, 17301504 / HARDWARE.value("matmul_flops"), rtol=1e-6
    )
    link_s = 17301504 / HARDWARE.value("pinned_h2d_bytes_per_s")
    np.testing.assert_allclose(CLOCK.copy_s, HARDWARE.value("copy_latency_s") + link_s, rtol=1e-6)
    assert float(CLOCK.attention_s) > HARDWARE.value("layer_fixed_s")


def test_experts_of_unequal_size_have_unequal_times():
    sizes = np.array([1e6, 2e6, 4e6])
    clock = layer_clock(HARDWARE, MODEL, batch_size=1, expert_bytes=sizes)
    np.testing.assert_allclose(clock.expert_bytes, sizes)
    np.testing.assert_allclose(clock.expert_read_s / clock.expert_read_s[0], [1, 2, 4], rtol=1e-6)


def test_context_and_batch_only_ever_add_time():
    longer = layer_clock(HARDWARE, MODEL, batch_size=1, context_tokens=8192)
    larger = layer_clock(HARDWARE, MODEL, batch_size=64)
    assert longer.attention_s > CLOCK.attention_s
    assert larger.attention_s > CLOCK.attention_s
    assert larger.shared_s >= CLOCK.shared_s


def test_layers_without_experts_and_without_a_shared_expert_are_accounted_for():
    dense_first = load_model("deepseek-v2-lite")
    clock = layer_clock(HARDWARE, dense_first, batch_size=1)
    assert clock.expert_read_s.shape == (26,)
    assert clock.step_fixed_s > clock.attention_s
    assert float(layer_clock(HARDWARE, load_model("mixtral-8x7b"), batch_size=1).shared_s) == 0.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": 1, "context_tokens": -1},
        {"batch_size": 1, "expert_bytes": np.array([1.0, np.nan])},
        {"batch_size": 1, "expert_bytes": np.array([1.0, 0.0])},
        {"batch_size": 1, "expert_bytes": np.zeros((2, 2))},
    ],
)
def test_impossible_clocks_are_refused(arguments):
    with pytest.raises(UsageError):
        layer_clock(HARDWARE, MODEL, **arguments)


def test_an_event_hides_the_shorter_of_waiting_and_computing():
    assert event_s(1.0, 2.0, 3.0, 4.0, 0.0) == 10.0
    assert event_s(1.0, 2.0, 3.0, 4.0, 1.0) == 8.0
    assert event_s(1.0, 4.0, 3.0, 2.0, 0.5) == 9.0


def test_a_step_is_the_sum_of_its_events():
    num_misses = np.array([0, 1, 2, 3, 4, 0] * 4, np.float32)
    clock = jax.tree.map(np.float64, CLOCK)
    expected = float(clock.step_fixed_s)
    for layer, misses in enumerate(num_misses):
        each = clock.expert_read_s[layer]
        resident = clock.shared_s + float(
            expert_compute_s(each, clock.expert_token_s[layer], 4 - misses, 4 - misses)
        )
        arriving = float(expert_compute_s(each, clock.expert_token_s[layer], misses, misses))
        wait = misses * clock.copy_s[layer]
        expected += (
            clock.attention_s
            + resident
            + arriving
            + wait
            - clock.overlap_ratio * min(resident, wait)
        )
    transfer_s = jnp.asarray(num_misses) * CLOCK.copy_s
    found = step_latency_s(CLOCK, full(4), full(4), transfer_s)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    told = step_latency_s(CLOCK, full(4), full(4), transfer_s, num_arriving=jnp.asarray(num_misses))
    np.testing.assert_allclose(told, expected, rtol=1e-5)


def test_without_overlap_a_step_is_compute_and_misses_times_copies():
    clock = CLOCK._replace(overlap_ratio=jnp.float32(0.0), expert_token_s=full(0.0))
    hit_s = step_latency_s(clock, full(4), full(4), full(0.0))
    miss_s = step_latency_s(clock, full(4), full(4), 3 * clock.copy_s)
    np.testing.assert_allclose(miss_s - hit_s, 3 * jnp.sum(clock.copy_s), rtol=1e-5)


def test_step_gradients_match_finite_differences():
    with jax.enable_x64(True):
        clock = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), CLOCK)
        demand = jnp.full((24,), 4.0)

        def latency_s(transfer_s):
            return step_latency_s(clock, demand, demand, transfer_s)

        transfer_s = clock.copy_s * jnp.linspace(0.01, 3.7, 24)
        slopes = jax.grad(latency_s)(transfer_s)
        steps = 1e-8 * jnp.eye(24)
        above_s = jax.vmap(latency_s)(transfer_s[None] + steps)
        below_s = jax.vmap(latency_s)(transfer_s[None] - steps)
        np.testing.assert_allclose(slopes, (above_s - below_s) / 2e-8, rtol=1e-5)
        assert np.isfinite(jax.grad(latency_s)(jnp.zeros(24))).all()


def test_the_clock_differentiates_in_the_constants_of_the_machine():
    def latency_s(parameters):
        clock = clock_from_parameters(parameters, MODEL, batch_size=1)
        return step_latency_s(clock, full(4), full(4), 4 * clock.copy_s)

    parameters = from_hardware(HARDWARE)
    slopes = jax.grad(latency_s)(parameters)
    assert slopes.pinned_h2d_bytes_per_s < 0
    assert slopes.vram_bytes_per_s < 0
    np.testing.assert_allclose(slopes.layer_fixed_s, 24.0, rtol=1e-4)
    np.testing.assert_allclose(slopes.copy_latency_s, 96.0, rtol=1e-4)


def test_estimate_reproduces_the_arithmetic_of_qwen():
    result = estimate(HARDWARE, MODEL)
    assert result.all_miss_bytes == 24 * 4 * 17301504
    rate = HARDWARE.value("pinned_h2d_bytes_per_s")
    np.testing.assert_allclose(result.link_ceiling_tokens_per_s * 26e9 / rate, 15.65, atol=0.01)
    assert result.all_hit_step_s < result.all_miss_step_s
    assert result.all_miss_tokens_per_s < result.link_ceiling_tokens_per_s
    assert result.cliff_slots == 93
    assert result.smallest_budget_bytes == 17301504
    parts = result.dense_bytes + result.kv_bytes + result.workspace_bytes + 17301504
    assert result.smallest_dense_budget_bytes == parts


def test_smallest_budgets_grow_with_what_they_include():
    assert smallest_budget_bytes(MODEL, include_dense=True) > MODEL.dense_bytes
    assert smallest_budget_bytes(MODEL, include_dense=True, context_tokens=4096) > (
        smallest_budget_bytes(MODEL, include_dense=True, context_tokens=512)
    )
    assert workspace_bytes(MODEL, 2) == 2 * workspace_bytes(MODEL, 1)


def test_distinct_experts_of_a_batch():
    assert expected_distinct_experts(MODEL, 1) == 4.0
    counts = [expected_distinct_experts(MODEL, size) for size in (1, 2, 4, 8, 16, 1000)]
    assert (np.diff(counts) > 0).all()
    assert counts[-1] == pytest.approx(60.0)
    draws = np.random.default_rng(0).permuted(np.tile(np.arange(60), (4000, 8, 1)), axis=2)[
        :, :, :4
    ]
    simulated = np.mean([len(np.unique(draw)) for draw in draws])
    np.testing.assert_allclose(counts[3], simulated, rtol=0.01)
    assert cliff_slots(MODEL, 8) > cliff_slots(MODEL, 1)
