"""Prediction intervals: drawn from a profile that says how sure it is, and true to their name."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.cards import Constant, Hardware, Uncertainty, load_hardware, load_model
from moejax.cost import (
    CountedCase,
    StepCounts,
    counted_case,
    estimate,
    estimate_intervals,
    fit_copy,
    fit_steps,
    format_profile,
    from_hardware,
    interval,
    prediction_interval,
    sample_parameters,
)
from moejax.errors import BadFileError

BASE = load_hardware("h100")
MODEL = load_model("qwen1.5-moe-a2.7b")
KEY = jax.random.key(0)
CORRELATIONS = ((1.0, 0.8), (0.8, 1.0))


def sure(**errors: float) -> Hardware:
    """A profile whose named constants have relative errors, the first two of them correlated."""
    constants = dict(BASE.constants)
    for name, ratio in errors.items():
        error = ratio * constants[name].value
        constants[name] = dataclasses.replace(constants[name], standard_error=error)
    for name in set(constants) - set(errors):
        constants[name] = dataclasses.replace(constants[name], standard_error=None)
    return dataclasses.replace(
        BASE,
        constants=constants,
        strategy_layer_s={"oracle": Constant(2e-5, "s", "fitted", 2e-6, "a test")},
        uncertainty=Uncertainty(0.02, 30, tuple(errors)[:2], CORRELATIONS),
    )


PROFILE = sure(layer_fixed_s=0.1, copy_latency_s=0.2)


def test_draws_have_the_errors_and_correlations_of_the_profile():
    samples = sample_parameters(PROFILE, KEY, 20_000)
    assert samples is not None
    logs = np.log(
        [
            np.asarray(samples.parameters.layer_fixed_s) / BASE.value("layer_fixed_s"),
            np.asarray(samples.parameters.copy_latency_s) / BASE.value("copy_latency_s"),
        ]
    )
    np.testing.assert_allclose(logs.std(axis=1), [0.1, 0.2], rtol=0.05)
    assert np.corrcoef(logs)[0, 1] == pytest.approx(0.8, abs=0.02)
    # What has no error stays, and a strategy's cost has its own.
    assert np.ptp(np.asarray(samples.parameters.vram_bytes_per_s)) == 0
    oracle = np.asarray(samples.strategy_layer_s["oracle"])
    assert np.log(oracle).std() == pytest.approx(0.1, rel=0.05)
    # Student's distribution of 30 degrees is a little wider than the normal one.
    assert np.log(np.asarray(samples.case_ratio)).std() == pytest.approx(0.02, rel=0.1)


def test_a_profile_that_does_not_say_has_no_interval():
    assert sample_parameters(BASE, KEY) is None
    assert prediction_interval(BASE, lambda parameters: parameters.layer_fixed_s) is None
    found = estimate_intervals(BASE, MODEL)
    assert found == {"all_hit_interval_s": None, "all_miss_interval_s": None}


def test_an_estimate_lies_in_its_interval_and_more_errors_widen_it():
    bounds = estimate(PROFILE, MODEL, batch_size=4)
    narrow = estimate_intervals(PROFILE, MODEL, batch_size=4)
    wide = estimate_intervals(sure(layer_fixed_s=0.5, copy_latency_s=0.2), MODEL, batch_size=4)
    for name in ("all_hit", "all_miss"):
        low_s, high_s = narrow[f"{name}_interval_s"]
        assert low_s < getattr(bounds, f"{name}_step_s") < high_s
    low_s, high_s = wide["all_hit_interval_s"]
    assert high_s - low_s > 2 * np.ptp(narrow["all_hit_interval_s"])


def test_an_interval_holds_nine_tenths():
    low, high = interval(np.linspace(0.0, 1.0, 1001))
    assert (low, high) == pytest.approx((0.05, 0.95))


def test_intervals_of_a_fit_hold_what_it_did_not_see():
    """Cases of a known law with a spread of 2 %: nine tenths of new ones lie in the intervals."""
    true = from_hardware(BASE)._replace(
        layer_fixed_s=2e-5, copy_latency_s=2e-5, kernel_efficiency_ratio=1.0
    )
    rng = np.random.default_rng(0)

    def case(misses: float) -> CountedCase:
        made = CountedCase("lru", 1, 100.0, 96.0, float(misses), 0.0, 0.0, 1.0)
        step_s = float(drawn_s(true, np.float32(misses))) * float(np.exp(0.02 * rng.normal()))
        return made._replace(step_s=step_s)

    @jax.jit
    def drawn_s(parameters, misses):
        counts = StepCounts(96.0, misses)
        return counted_case(parameters, MODEL, counts, batch_size=1, context_tokens=100.0).step_s

    all_drawn_s = jax.vmap(jax.vmap(drawn_s, in_axes=(0, None)), in_axes=(None, 0))
    known = true._replace(layer_fixed_s=1e-5, copy_latency_s=1e-6)
    new = [case(misses) for misses in np.linspace(0, 96, 60)]
    num_inside = 0
    for _ in range(5):
        fit = fit_steps([case(misses) for misses in np.linspace(0, 96, 13)], MODEL, known)
        constants = {
            name: Constant(float(value), "s", "measured", None, "a test")
            for name, value in known._asdict().items()
        }
        profile = Hardware("made", "", constants | fit.constants, uncertainty=fit.uncertainty)
        samples = sample_parameters(profile, KEY)
        assert samples is not None
        misses = np.array([one.num_misses for one in new], np.float32)
        for one, step_s in zip(new, all_drawn_s(samples.parameters, misses), strict=True):
            low_s, high_s = interval(step_s * samples.case_ratio)
            num_inside += low_s <= one.step_s <= high_s
    assert 0.8 <= num_inside / (5 * len(new)) <= 0.97


def test_the_copy_law_has_intervals_that_hold_held_out_sizes():
    rng = np.random.default_rng(1)
    sizes = np.geomspace(4096, 2**28, 30)
    time_s = (1e-5 + sizes / 25e9) * np.exp(0.03 * rng.normal(size=30))
    fit = fit_copy(sizes, time_s)
    held_out = [row for row in fit.rows if row.is_held_out]
    assert 0.7 * len(held_out) <= fit.num_inside <= len(held_out)
    for row in fit.rows:
        assert row.interval_s[0] < row.predicted_s < row.interval_s[1] < 1.2 * row.predicted_s


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("uncertainty = 3", "is not a table"),
        ("[uncertainty]\nspread_ratio = -1.0\nnum_degrees = 3", "is none"),
        ('[uncertainty]\nspread_ratio = 0.1\nnum_degrees = 3\nnames = ["a"]', "not one row"),
        (
            '[uncertainty]\nspread_ratio = 0.1\nnum_degrees = 3\nnames = ["a"]\n'
            "correlations = [[2.0]]",
            "exceed 1",
        ),
        ("[strategy_layer_s.lfu]\nvalue = 1.0", "lacks 'unit'"),
    ],
)
def test_bad_uncertainties_are_refused(tmp_path, text, problem):
    path = tmp_path / "profile.toml"
    whole = format_profile(BASE)
    path.write_text(f"{text}\n{whole}" if text.startswith("unc") else f"{whole}\n{text}\n")
    with pytest.raises(BadFileError, match=problem):
        load_hardware(path)
