"""Laws of copies and compute: limits, monotonicity, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cards import load_hardware
from moejax.cost import (
    CostParameters,
    copy_s,
    expert_compute_s,
    from_hardware,
    host_copy_s,
    host_expert_s,
    nvme_read_s,
    smooth_maximum,
)
from moejax.errors import UsageError

PARAMETERS = from_hardware(load_hardware("rtx-3090"))
EXPERT_BYTES = 17301504


@pytest.mark.parametrize("memory", ["pinned", "pageable", "nvme"])
def test_copies_take_longer_the_more_bytes_and_the_busier_the_host(memory):
    sizes = np.geomspace(1.0, 1e10, 60)
    times_s = np.array([float(copy_s(PARAMETERS, size, memory)) for size in sizes])
    assert (np.diff(times_s) > 0).all()
    assert copy_s(PARAMETERS, 1e8, memory, is_host_loaded=True) > copy_s(PARAMETERS, 1e8, memory)


def test_farther_memory_is_slower():
    near, far, farthest = (
        float(copy_s(PARAMETERS, EXPERT_BYTES, memory)) for memory in ("pinned", "pageable", "nvme")
    )
    assert near < far < farthest
    assert 680e-6 < near < 690e-6


def test_unknown_memory_is_refused():
    with pytest.raises(UsageError, match="'tape'"):
        copy_s(PARAMETERS, 1.0, "tape")


def test_a_deep_queue_hides_the_latency_of_a_drive_but_not_its_bandwidth():
    alone_s = float(nvme_read_s(PARAMETERS, 262144.0))
    queued_s = float(nvme_read_s(PARAMETERS, 262144.0, 8.0))
    assert alone_s == pytest.approx(0.294e-3, rel=0.01)
    assert queued_s == pytest.approx(262144 / PARAMETERS.nvme_bytes_per_s)
    assert float(nvme_read_s(PARAMETERS, 262144.0, 64.0)) == pytest.approx(queued_s)


def test_host_laws_are_linear_in_bytes():
    assert host_copy_s(PARAMETERS, 24.58e9) == pytest.approx(1.0, rel=1e-3)
    extra_s = host_expert_s(PARAMETERS, 2e7) - host_expert_s(PARAMETERS, 1e7)
    assert extra_s == pytest.approx(1e7 / PARAMETERS.host_read_bytes_per_s)


def test_smooth_maximum_stays_near_the_sharp_one():
    a, b = np.random.default_rng(0).uniform(0, 1e-3, (2, 500)).astype(np.float32)
    soft = np.asarray(smooth_maximum(jnp.asarray(a), jnp.asarray(b)))
    sharp = np.maximum(a, b)
    assert (soft >= sharp * (1 - 1e-6)).all()
    assert (soft <= sharp * 2**0.125 * (1 + 1e-6)).all()
    is_apart = (a > 2 * b) | (b > 2 * a)
    np.testing.assert_allclose(soft[is_apart], sharp[is_apart], rtol=1e-3)


def test_no_experts_take_exactly_no_time_and_have_a_finite_slope():
    assert float(expert_compute_s(2e-5, 1e-7, 0.0, 0.0)) == 0.0
    assert float(expert_compute_s(2e-5, 1e-7, 0.0, 4.0)) == 0.0
    slopes = jax.grad(expert_compute_s, argnums=(0, 1, 2, 3))(2e-5, 1e-7, 0.0, 0.0)
    assert np.isfinite(slopes).all()
    assert slopes[2] == pytest.approx(2e-5)


@pytest.mark.parametrize(("num_experts", "num_tokens"), [(4.0, 4.0), (4.0, 800.0), (2.5, 900.0)])
def test_compute_gradients_match_finite_differences(num_experts, num_tokens):
    point = np.array([2.0, 0.01, num_experts, num_tokens])
    with jax.enable_x64(True):
        slopes = np.array(jax.grad(expert_compute_s, argnums=(0, 1, 2, 3))(*map(float, point)))
        found = _central_differences(lambda values: expert_compute_s(*values), point)
    # Compared as elasticities: what 1 % of each argument changes.
    np.testing.assert_allclose(slopes * point, found * point, rtol=1e-5, atol=1e-7)


def test_copy_gradients_match_finite_differences_in_every_constant():
    def loaded_copy_s(values):
        return copy_s(CostParameters(*values), 1e7, "nvme", is_host_loaded=True)

    point = np.array(PARAMETERS._replace(batched_layer_s=1e-6))
    with jax.enable_x64(True):
        slopes = np.array(jax.grad(loaded_copy_s)(list(map(float, point))))
        found = _central_differences(loaded_copy_s, point)
    np.testing.assert_allclose(slopes * point, found * point, rtol=1e-5, atol=1e-10)
    assert np.count_nonzero(slopes) == 6


def _central_differences(function, point: np.ndarray) -> np.ndarray:
    steps = np.diag(1e-5 * point)
    return np.array(
        [float(function(point + step)) - float(function(point - step)) for step in steps]
    ) / (2e-5 * point)
