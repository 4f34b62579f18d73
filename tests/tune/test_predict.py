"""The predicted cost of a split against hand-written arithmetic and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cost import step_latency_s
from moejax.tune import Split, predict
from moejax.tune._relaxed import SplitLogits, spend
from moejax.tune._step import saved_s, split_objective

from ._tiers import concave_curve, problem


def whole(retained, landing, pinned, pageable) -> Split:
    return Split(*(jnp.full(6, float(slots)) for slots in (retained, landing, pinned, pageable)))


def test_equals_the_cost_models_step_where_every_step_misses():
    numbers = problem(num_slots=36).numbers
    numbers = numbers._replace(any_miss_ratio=jnp.ones_like(numbers.any_miss_ratio))
    misses = np.asarray(numbers.num_misses)
    split = whole(4, 0, 3, 2)
    clock = numbers.clock
    transfer_s = (
        (misses[:, 4] - misses[:, 7]) * clock.copy_s
        + (misses[:, 7] - misses[:, 9]) * numbers.pageable_s
        + misses[:, 9] * numbers.store_s
    )
    expected_s = step_latency_s(
        clock, misses[:, 0], numbers.num_tokens, transfer_s, num_arriving=misses[:, 4]
    )
    prediction = predict(numbers, split)
    assert prediction.step_latency_s == pytest.approx(float(expected_s), rel=1e-6)
    assert prediction.hit_ratio == pytest.approx(concave_curve()[:, 4].mean(), rel=1e-6)
    assert prediction.fetched_bytes == pytest.approx(misses[:, 4].sum() * 1e7, rel=1e-6)
    assert np.isnan(prediction.p99_latency_s)


def test_exclusive_tiers_are_one_stack_cut_in_three():
    """Counts of a literal three-level simulation are differences of one hit curve."""
    rng = np.random.default_rng(3)
    accesses = rng.zipf(1.3, 600) % 12
    counts = {slots: _literal_hits(accesses, (slots, 0, 0))[0] for slots in range(13)}
    for sizes in ((2, 3, 4), (4, 4, 4), (1, 1, 6)):
        cuts = np.cumsum(sizes)
        expected = np.diff([0, *(counts[int(cut)] for cut in cuts)])
        assert _literal_hits(accesses, sizes) == expected.tolist()


def test_a_prefetch_saves_what_it_hides_and_pays_for_the_rest():
    numbers = problem(num_slots=36, recall_ratio=[0.0] * 3 + [0.9] * 3).numbers
    copy_s, window_s = float(numbers.clock.copy_s[0]), float(numbers.window_s[0])
    assert window_s < copy_s
    one = np.asarray(saved_s(numbers, jnp.ones(6)))
    assert one[0] == pytest.approx(window_s - copy_s, rel=1e-5)
    assert one[5] == pytest.approx(0.9 * copy_s - (copy_s - window_s), rel=1e-5)
    half = np.asarray(saved_s(numbers, jnp.full(6, 0.5)))
    np.testing.assert_allclose(half, one / 2, rtol=1e-5)


def test_wasted_prefetches_are_fetched_too():
    numbers = problem(num_slots=36, recall_ratio=[0.75] * 6).numbers
    plain = predict(numbers, whole(4, 0, 8, 0))
    ahead = predict(numbers, whole(4, 1, 8, 0))
    num_prefetches = np.minimum(1.0, np.asarray(numbers.num_misses)[:, 4]).sum()
    wasted_bytes = float(ahead.fetched_bytes - plain.fetched_bytes)
    assert wasted_bytes == pytest.approx(0.25 * num_prefetches * 1e7, rel=1e-4)


@pytest.mark.parametrize("objective", ["latency", "bytes", "p99"])
def test_gradient_matches_finite_differences(objective):
    rng = np.random.default_rng(0)
    samples = 2 * (1 - concave_curve()) * rng.uniform(0.5, 1.5, (9, 6, 1))
    numbers = problem(
        num_slots=20,
        num_pinned=15,
        num_host=10,
        recall_ratio=0.97,
        sample_misses=samples,
    ).numbers
    logits = SplitLogits(*jnp.asarray(rng.normal(scale=0.3, size=(4, 6)), jnp.float32))

    def loss(logits):
        value = split_objective(numbers, spend(numbers, logits), objective=objective)
        return value * (1e-9 if objective == "bytes" else 1.0)

    gradient = jax.tree.leaves(jax.grad(loss)(logits))
    flat = jnp.stack(logits)
    for row, column in [(0, 0), (0, 4), (1, 3), (2, 2), (3, 5)]:
        step = jnp.zeros((4, 6)).at[row, column].set(2e-3)
        high, low = loss(SplitLogits(*(flat + step))), loss(SplitLogits(*(flat - step)))
        slope = float(high - low) / 4e-3
        assert float(gradient[row][column]) == pytest.approx(slope, rel=0.03, abs=1e-5)


def test_percentile_is_that_of_the_sample_steps():
    samples = 2 * (1 - concave_curve()) * np.linspace(0.5, 1.5, 201)[:, None, None]
    asked = problem(num_slots=36, sample_misses=samples)
    split = whole(4, 0, 8, 0)
    # Every second step is tuned on: 101 of them, and the 99th percentile is the last but one.
    misses = jnp.asarray(samples[198], jnp.float32)
    step = asked.numbers._replace(num_misses=misses, any_miss_ratio=jnp.minimum(misses, 1.0))
    step_s = float(predict(step, split).step_latency_s)
    assert predict(asked.numbers, split).p99_latency_s == pytest.approx(step_s, rel=1e-5)


def _literal_hits(accesses: np.ndarray, sizes: tuple[int, ...]) -> list[int]:
    tiers: list[list[int]] = [[] for _ in sizes]
    hits = [0] * len(sizes)
    for access in accesses.tolist():
        for tier, held in enumerate(tiers):
            if access in held:
                hits[tier] += 1
                held.remove(access)
                break
        evicted = access
        for held, size in zip(tiers, sizes, strict=True):
            held.insert(0, evicted)
            if len(held) <= size:
                break
            evicted = held.pop()
    return hits
