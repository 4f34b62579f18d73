import numpy as np
import pytest
from scipy import stats

from moejax.report.statistics import interaction


@pytest.fixture(scope="module")
def latency_s() -> np.ndarray:
    """Five draws of two strategies at two batch sizes, the second worse in a crowd."""
    generator = np.random.default_rng(2)
    log = 0.1 * generator.standard_normal((5, 2, 2)) + generator.standard_normal((5, 1, 1))
    log += np.array([[0.0, 1.0], [0.2, 1.9]])
    return np.exp(log)


def test_two_by_two_is_three_paired_t_tests(latency_s):
    """With one degree of freedom each F is the square of a t."""
    log = np.log(latency_s)
    found = interaction(latency_s)
    assert found is not None
    contrasts = (
        log[:, 1].mean(1) - log[:, 0].mean(1),
        log[:, :, 1].mean(1) - log[:, :, 0].mean(1),
        (log[:, 1, 1] - log[:, 1, 0]) - (log[:, 0, 1] - log[:, 0, 0]),
    )
    for source, contrast in zip(found.sources, contrasts, strict=True):
        t = stats.ttest_1samp(contrast, 0.0)
        assert (source.num_degrees, source.num_error_degrees) == (1, 4)
        assert source.f == pytest.approx(t.statistic**2)
        assert source.p == pytest.approx(t.pvalue)
        assert source.share_ratio == pytest.approx(source.f / (source.f + 4))


def test_a_constant_factor_is_no_interaction():
    draws = np.exp(0.1 * np.random.default_rng(3).standard_normal((6, 1, 3)))
    latency_s = draws * np.array([1.0, 2.0, 4.0])[:, None] * np.array([1.0, 1.8, 3.0])
    found = interaction(latency_s)
    assert found is not None
    np.testing.assert_allclose(found.departure_ratio, 0, atol=1e-12)
    strategy, batch, _ = found.sources
    assert strategy.share_ratio == pytest.approx(1.0)
    assert batch.share_ratio < 1.0


def test_departures_are_what_both_give_beyond_each(latency_s):
    found = interaction(latency_s)
    assert found is not None
    mean = np.log(latency_s).mean(0)
    expected = mean[1, 1] - mean[1].mean() - mean[:, 1].mean() + mean.mean()
    assert found.departure_ratio[1, 1] == pytest.approx(np.expm1(expected))
    # In logarithms rows and columns add up to nothing.
    np.testing.assert_allclose(np.log1p(found.departure_ratio).sum(0), 0, atol=1e-12)


def test_degrees_of_a_larger_table_and_a_careful_p():
    latency_s = np.exp(np.random.default_rng(4).standard_normal((10, 6, 5)))
    found = interaction(latency_s)
    assert found is not None
    assert [one.num_degrees for one in found.sources] == [5, 4, 20]
    assert [one.num_error_degrees for one in found.sources] == [45, 36, 180]
    last = found.sources[-1]
    assert last.p == pytest.approx(stats.f.sf(last.f, 1, 9))


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 1, 2), (3, 2, 1)])
def test_too_few_of_anything_have_none(shape):
    assert interaction(np.ones(shape)) is None
