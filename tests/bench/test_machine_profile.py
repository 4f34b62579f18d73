"""Profiles of measured machines, fitted to cases made by the law itself."""

import dataclasses
import json

import numpy as np
import pytest

from moejax.bench import engine_fit, machine_profile
from moejax.bench._engine_fit import model_spec, typical_step
from moejax.cards import load_hardware, models_dir, read_card
from moejax.cost import (
    CostParameters,
    StepCounts,
    counted_case,
    format_profile,
    from_hardware,
)

SIZES = {"expert_bytes": 17_301_504, "row_bytes": 4096, "position_bytes": 196_608}
SIZES |= {"dense_bytes": 3_095_072_768}
CEILINGS = {"link_bytes_per_s": 53e9, "hbm_bytes_per_s": 3e12, "flops_per_s": 8e14}
TRUE = {
    "layer_fixed_s": 19e-6,
    "copy_latency_s": 10e-6,
    "batched_layer_s": 25e-6,
    "kernel_efficiency_ratio": 0.9,
    "overlap_ratio": 0.5,
    "prefetch_overlap_ratio": 0.6,
}
ORACLE_LAYER_S = 24e-6
NUM_LAYERS = 24


def parameters() -> CostParameters:
    known = from_hardware(load_hardware("h100"))
    rates = {"vram_bytes_per_s": 3e12, "pinned_h2d_bytes_per_s": 53e9, "matmul_flops": 8e14}
    return known._replace(**rates, **TRUE)


def case(
    results: dict, batch_size: int, demands: int, misses: float, shadowed: float = 0.0, **given
) -> dict:
    """Steps of the law, some of which wait for the host, with a spread of half a per cent."""
    rng = np.random.default_rng([batch_size, demands, round(misses), round(shadowed)])
    absent = np.clip(rng.poisson(misses, 32), 0, demands)
    layer_s = ORACLE_LAYER_S if given.get("strategy") == "oracle" else 0.0

    def step_s(num_misses: float) -> float:
        counts = StepCounts(float(demands), float(num_misses), 0.0, shadowed)
        return float(
            counted_case(
                parameters(),
                model_spec(results),
                counts,
                batch_size=batch_size,
                context_tokens=144.0,
                strategy_layer_s=layer_s,
            ).step_s
        )

    known_s = {number: step_s(number) for number in set(absent.tolist())}
    samples = np.array([known_s[number] for number in absent.tolist()])
    samples *= 1 + 0.005 * rng.standard_normal()
    samples[::8] += 3e-3
    fetched = (absent + shadowed) * SIZES["expert_bytes"]
    return {
        "strategy": "lru",
        "slots": 8,
        "scope": "layer",
        "batch_size": batch_size,
        "replayed": True,
        "mean_context": 144.0,
        "steps": {
            "hits": (demands - absent).tolist(),
            "late": [0] * 32,
            "misses": absent.tolist(),
            "fetched_bytes": fetched.tolist(),
        },
        "step_s": {"median": float(np.median(samples)), "samples": samples.tolist()},
        "fit": True,
    } | given


@pytest.fixture(scope="module")
def made() -> dict:
    fields = read_card(models_dir() / "qwen1.5-moe-a2.7b.toml")["config"]
    copies = [
        {"kind": "transfer", "memory": "pinned", "num_bytes": n, "samples_s": [1e-4 + n / 40e9]}
        for n in (1e5, 1e6, 1e7, 1e8)
    ]
    results = {
        "environment": {"device": "NVIDIA H100 80GB HBM3", "backend": "gpu"},
        "ceilings": CEILINGS,
        "sizes": SIZES,
        "model": {"name": "qwen1.5-moe-a2.7b", "dtype": "bfloat16", "config": fields},
        "measured": {"transfer": copies, "compute": []},
    }
    ones = [case(results, 1, 96, n) for n in (0, 5, 10, 25, 50, 96)]
    many = [case(results, 4, d, n) for d, n in ((288, 0), (288, 30), (288, 288), (96, 0))]
    most = [case(results, 16, d, n) for d, n in ((672, 0), (672, 66), (672, 330), (96, 0))]
    others = [
        case(results, 1, 96, 0, strategy="oracle"),
        case(results, 1, 96, 0, strategy="fifo"),
        case(results, 1, 96, 1, 4.0, strategy="gate_look"),
    ]
    unseen = case(results, 1, 96, 0, strategy="lfu", fit=False)
    unseen["step_s"]["median"] = 1.0
    return results | {"engine": [*ones, *many, *most, *others, unseen]}


@pytest.fixture
def results(made) -> dict:
    return json.loads(json.dumps(made))


def test_constants_are_found_again_among_steps_that_wait(results):
    found = engine_fit(results, load_hardware("h100"))
    assert found is not None
    measured, fit = found
    assert measured["vram_bytes_per_s"].value == CEILINGS["hbm_bytes_per_s"]
    assert set(fit.constants) == set(TRUE)
    for name, true in TRUE.items():
        constant = fit.constants[name]
        assert constant.standard_error is not None
        assert abs(constant.value - true) < 4 * constant.standard_error, name
    assert fit.constants["layer_fixed_s"].value == pytest.approx(19e-6, rel=0.1)
    # The case that the fit may not see says 1 s of lfu, and fifo costs nothing that shows.
    assert set(fit.strategy_layer_s) <= {"oracle", "fifo"}
    assert fit.strategy_layer_s["oracle"].value == pytest.approx(ORACLE_LAYER_S, rel=0.1)
    assert 0.003 < fit.uncertainty.spread_ratio < 0.02


def test_a_constant_that_no_case_shows_has_no_error(results):
    """On a CPU operations may bound the steps; here they do not."""
    results["environment"]["backend"] = "cpu"
    found = engine_fit(results, load_hardware("h100"))
    assert found is not None
    assert found[1].constants["matmul_flops"].standard_error is None
    assert "matmul_flops" not in found[1].uncertainty.names
    assert np.isfinite(found[1].uncertainty.correlations).all()


def test_a_fit_needs_three_numbers_of_misses(results):
    results["engine"] = [row for row in results["engine"] if not any(row["steps"]["misses"])]
    assert engine_fit(results, None) is None


def test_without_marks_the_fit_sees_lru_at_one_request(results):
    for row in results["engine"]:
        del row["fit"]
    found = engine_fit(results, load_hardware("h100"))
    assert found is not None
    assert set(found[1].constants) == {"layer_fixed_s", "copy_latency_s"}
    assert found[1].strategy_layer_s == {}


def test_the_typical_step_is_that_of_the_middle_half(results):
    row = results["engine"][0]
    row["steps"]["misses"] = [0, 4, 1, 90]
    row["steps"]["hits"] = [96, 92, 95, 6]
    row["steps"]["late"] = [0, 0, 2, 0]
    row["steps"]["fetched_bytes"] = [0, 4 * 17_301_504, 3 * 17_301_504, 90 * 17_301_504]
    step = typical_step(row, 17_301_504)
    assert (step.num_misses, step.num_late, step.num_demands) == (2.5, 1.0, 97.0)
    assert step.num_shadowed == pytest.approx(0.5)


def test_steps_of_a_device_count_more_than_sweeps(results, tmp_path):
    profile = machine_profile(results, command="a test")
    assert profile.value("pinned_h2d_bytes_per_s") == CEILINGS["link_bytes_per_s"]
    assert profile.constants["layer_fixed_s"].kind == "fitted"
    assert profile.constants["contention_ratio"].kind == "assumed"
    source = profile.constants["contention_ratio"].source
    assert source.startswith("not measured; taken from profile")
    path = tmp_path / "profile.toml"
    path.write_text(format_profile(profile), encoding="utf-8")
    again = load_hardware(path)
    assert dict(again.constants) == dict(profile.constants)
    assert dict(again.strategy_layer_s) == dict(profile.strategy_layer_s)
    assert profile.uncertainty is not None
    assert again.uncertainty is not None
    assert dataclasses.replace(again.uncertainty, correlations=()) == dataclasses.replace(
        profile.uncertainty, correlations=()
    )
    np.testing.assert_allclose(
        again.uncertainty.correlations, profile.uncertainty.correlations, atol=1e-6
    )


def test_on_a_cpu_without_marks_the_sweeps_count(results):
    results["environment"]["backend"] = "cpu"
    for row in results["engine"]:
        row["fit"] = False
    profile = machine_profile(results, command="a test")
    assert profile.value("pinned_h2d_bytes_per_s") == pytest.approx(40e9, rel=0.01)
    assert profile.uncertainty is None
