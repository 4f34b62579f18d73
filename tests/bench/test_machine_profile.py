"""Profiles of measured machines."""

import numpy as np
import pytest

from moejax.bench import engine_constants, machine_profile

LAYER_FIXED_S, COPY_LATENCY_S, STEP_FIXED_S = 21e-6, 8e-6, 20e-6
LINK, MEMORY, EXPERT_BYTES, NUM_LAYERS = 50e9, 3e12, 17_301_504, 24
READ_BYTES = 4.8e9


def record(num_misses: int, rng: np.random.Generator, **given) -> dict:
    """Steps of the law that is fitted, one in eight of which waits for the host."""
    miss_s = COPY_LATENCY_S + EXPERT_BYTES / LINK
    misses = rng.poisson(num_misses, 64)
    step_s = READ_BYTES / MEMORY + STEP_FIXED_S + NUM_LAYERS * LAYER_FIXED_S + misses * miss_s
    step_s = step_s * (1 + 0.005 * rng.standard_normal(64))
    step_s[::8] += 3e-3
    mean = float(misses.mean())
    return {
        "strategy": "lru",
        "scope": "layer",
        "batch_size": 1,
        "replayed": True,
        "misses_per_step": mean,
        "device_bytes_per_step": READ_BYTES - mean * EXPERT_BYTES,
        "steps": {"misses": misses.tolist()},
        "step_s": {"samples": step_s.tolist()},
    } | given


@pytest.fixture
def results() -> dict:
    rng = np.random.default_rng(0)
    rows = [record(n, rng) for n in (0, 5, 10, 50, 96)]
    other = record(0, rng, strategy="oracle")
    other["step_s"]["samples"] = [1.0] * 64
    copies = [
        {
            "kind": "transfer",
            "memory": "pinned",
            "num_bytes": n,
            "samples_s": [1e-4 + n / 40e9],
        }
        for n in (1e5, 1e6, 1e7, 1e8)
    ]
    return {
        "environment": {"device": "NVIDIA H100 80GB HBM3", "backend": "gpu"},
        "engine": [*rows, other],
        "ceilings": {"link_bytes_per_s": LINK, "hbm_bytes_per_s": MEMORY, "flops_per_s": 9e14},
        "sizes": {"expert_bytes": EXPERT_BYTES},
        "model": {
            "routed_bytes": NUM_LAYERS * 60 * EXPERT_BYTES,
            "config": {"num_experts": 60},
        },
        "measured": {"transfer": copies, "compute": []},
    }


def test_constants_are_found_again_among_steps_that_wait(results):
    found = engine_constants(results, step_fixed_s=STEP_FIXED_S)
    assert found["layer_fixed_s"].value == pytest.approx(LAYER_FIXED_S, rel=0.03)
    assert found["copy_latency_s"].value == pytest.approx(COPY_LATENCY_S, rel=0.2)
    for name, true in (("layer_fixed_s", LAYER_FIXED_S), ("copy_latency_s", COPY_LATENCY_S)):
        error = found[name].standard_error
        assert error is not None
        assert abs(found[name].value - true) < 4 * error
    assert found["vram_bytes_per_s"].value == MEMORY


def test_a_line_needs_three_numbers_of_misses(results):
    results["engine"] = [row for row in results["engine"] if row["misses_per_step"] == 0]
    assert engine_constants(results, step_fixed_s=STEP_FIXED_S) == {}


def test_steps_of_a_device_count_more_than_sweeps(results):
    profile = machine_profile(results, command="a test")
    assert profile.value("pinned_h2d_bytes_per_s") == LINK
    assert profile.constants["layer_fixed_s"].kind == "fitted"
    assert profile.constants["overlap_ratio"].kind == "assumed"
    assert profile.constants["overlap_ratio"].source.startswith("not measured; taken from profile")


def test_without_a_device_the_sweeps_count(results):
    results["environment"]["backend"] = "cpu"
    profile = machine_profile(results, command="a test")
    assert profile.value("pinned_h2d_bytes_per_s") == pytest.approx(40e9, rel=0.01)
