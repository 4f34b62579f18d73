"""The choice of the next token: what may be chosen, how often, and that chance is repeatable."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.engine import Sampling
from moejax.engine._sampling import Draw, next_tokens
from moejax.errors import UsageError

LOGITS = np.log(np.array([0.05, 0.4, 0.15, 0.3, 0.1], np.float32))
NUM_DRAWS = 20_000


def draw(temperature=1.0, top_p=1.0, *, seed=0, requests=range(1)) -> Draw:
    numbers = jnp.array(list(requests), jnp.int32)
    return Draw(jnp.uint32(seed), numbers, jnp.float32(temperature), jnp.float32(top_p))


def choose(logits, how: Draw, step=0) -> np.ndarray:
    rows = jnp.broadcast_to(jnp.asarray(logits), (how.requests.size, np.shape(logits)[-1]))
    return np.asarray(jax.jit(next_tokens)(rows, jnp.int32(step), how))


def frequencies(how: Draw, logits=LOGITS) -> np.ndarray:
    return np.bincount(choose(logits, how), minlength=len(logits)) / how.requests.size


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [(-1, 1), (math.nan, 1), (math.inf, 1), (1e-4, 1), (1, 0), (1, 1.01), (1, -0.5), (1, math.nan)],
)
def test_impossible_settings_are_refused(temperature, top_p):
    with pytest.raises(UsageError) as caught:
        Sampling(temperature, top_p)
    assert caught.value.hint


def test_greedy_takes_the_best_and_the_lower_of_equals():
    logits = jnp.array([[0.0, 2.0, 1.0], [5.0, 5.0, 4.0], [-1.0, 3.0, 3.0]])
    assert next_tokens(logits, jnp.int32(0), None).tolist() == [1, 0, 1]
    assert Sampling().is_greedy
    assert not Sampling(0.5).is_greedy


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
    expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    error = np.sqrt(expected * (1 - expected) / NUM_DRAWS)
    found = frequencies(draw(temperature, requests=range(NUM_DRAWS)))
    assert np.all(np.abs(found - expected) < 4 * error)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (0.96, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    found = frequencies(draw(1.0, top_p, requests=range(NUM_DRAWS)))
    share = np.zeros(5)
    share[kept] = np.exp(LOGITS[kept]) / np.exp(LOGITS[kept]).sum()
    assert np.flatnonzero(found).tolist() == kept
    np.testing.assert_allclose(found, share, atol=0.02)


def test_a_tiny_top_p_is_greedy():
    how = draw(50.0, 1e-30, requests=range(100))
    assert set(choose(LOGITS, how).tolist()) == {1}


def test_full_top_p_leaves_out_nothing():
    """Nor does rounding, in the sum over a long tail."""
    logits = np.concatenate([np.zeros(3), np.full(997, -7.0)]).astype(np.float32)
    found = frequencies(draw(1.0, 1.0, requests=range(5000)), logits)
    expected = 997 * math.exp(-7) / (3 + 997 * math.exp(-7))
    assert found[3:].sum() == pytest.approx(expected, rel=0.1)
    assert found[-20:].sum() > 0


def test_equal_scores_are_cut_at_the_lower_numbers():
    found = frequencies(draw(1.0, 0.5, requests=range(200)), np.zeros(8, np.float32))
    assert np.flatnonzero(found).tolist() == [0, 1, 2, 3]


def test_a_request_draws_the_same_in_any_company():
    alone = [choose(LOGITS, draw(requests=[request]))[0] for request in range(40, 60)]
    together = choose(LOGITS, draw(requests=range(30, 70)))
    assert alone == together[10:30].tolist()


def test_requests_steps_and_seeds_draw_differently():
    how = draw(requests=range(100))
    first = choose(LOGITS, how)
    assert (first == choose(LOGITS, how)).all()
    assert len(set(first.tolist())) > 1
    assert (first != choose(LOGITS, how, step=1)).any()
    assert (first != choose(LOGITS, how._replace(seed=jnp.uint32(1)))).any()
