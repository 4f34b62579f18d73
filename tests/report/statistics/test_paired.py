import math

import numpy as np
import pytest
from scipy import stats

from moejax.report.statistics import bootstrap_interval, compare_paired, holm

OWN = np.array([5.1, 4.9, 6.2, 5.8, 5.0, 5.5, 6.1, 4.7])
OTHER = np.array([5.6, 5.0, 6.0, 6.9, 5.9, 5.7, 6.8, 5.5])


def test_tests_are_those_of_scipy():
    found = compare_paired(OWN, OTHER)
    assert found is not None
    assert found.num_pairs == 8
    assert found.mean == pytest.approx((OWN - OTHER).mean())
    assert found.p_t == pytest.approx(stats.ttest_rel(OWN, OTHER).pvalue)
    rounded = compare_paired(np.round(100 * OWN), np.round(100 * OTHER))
    assert rounded is not None
    exact = stats.PermutationMethod(n_resamples=10**6)
    differences = np.round(100 * OWN) - np.round(100 * OTHER)
    assert rounded.p_signed_rank == pytest.approx(stats.wilcoxon(differences, method=exact).pvalue)


def test_the_signed_rank_test_shares_ranks_among_ties():
    # |d| = 1, 1, 2: ranks 1.5, 1.5, 3; of 8 sign patterns only two reach 0 or 6.
    found = compare_paired(np.array([1.0, 2.0, 5.0]), np.array([0.0, 1.0, 3.0]))
    assert found is not None
    assert found.p_signed_rank == pytest.approx(0.25)
    # A sum of 1.5 or less: no sign, or one of the two ones: 3 of 8, doubled.
    found = compare_paired(np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 2.0]))
    assert found is not None
    assert found.p_signed_rank == pytest.approx(0.75)


def test_the_effect_is_corrected_for_few_pairs():
    found = compare_paired(OWN, OTHER)
    differences = OWN - OTHER
    assert found is not None
    plain = differences.mean() / differences.std(ddof=1)
    # Hedges' approximation of the correction, 1 - 3 / (4 n - 1), n degrees of freedom.
    assert found.effect == pytest.approx(plain * (1 - 3 / (4 * 7 - 1)), rel=2e-3)


@pytest.mark.parametrize("shift", [0.0, 0.4, -3.0])
def test_the_interval_of_the_effect_is_that_of_the_noncentral_t(shift: float):
    differences = OWN - OTHER + shift
    found = compare_paired(differences, np.zeros(8))
    assert found is not None
    t = differences.mean() / differences.std(ddof=1) * math.sqrt(8)
    scale = found.effect / t
    for end, chance in ((found.effect_low, 0.975), (found.effect_high, 0.025)):
        assert stats.nct.cdf(t, 7, end / scale) == pytest.approx(chance, abs=2e-3)


def test_an_effect_too_large_for_a_noncentral_t_has_an_interval():
    found = compare_paired(1000 + OWN, OTHER)
    assert found is not None
    assert 0 < found.effect_low < found.effect < found.effect_high < math.inf


def test_without_spread_the_limit_of_the_test_holds():
    same = compare_paired(OWN, OWN)
    always = compare_paired(OWN + 1, OWN)
    assert same is not None
    assert always is not None
    assert (same.mean, same.p_t, same.p_signed_rank) == (0.0, 1.0, 1.0)
    assert always.p_t == 0.0
    assert always.p_signed_rank == pytest.approx(2 / 2**8)
    assert (always.low, always.high) == (pytest.approx(1), pytest.approx(1))
    assert math.isnan(always.effect)


def test_one_pair_says_nothing_and_two_have_no_effect():
    assert compare_paired(OWN[:1], OTHER[:1]) is None
    two = compare_paired(OWN[:2], OTHER[:2])
    assert two is not None
    assert math.isnan(two.effect)
    assert two.p_t == pytest.approx(stats.ttest_rel(OWN[:2], OTHER[:2]).pvalue)


def test_holm_raises_and_never_reorders():
    # 0.01 x 4, 0.02 x 3, then 0.03 x 2 = 0.06 and 0.04 x 1 held up to it.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_columns_are_resampled_together():
    column = np.arange(1.0, 9.0)
    low, high = bootstrap_interval(lambda a, b: a.mean(-1) / b.mean(-1), 3 * column, column)
    assert (low, high) == (pytest.approx(3), pytest.approx(3))
    low, high = bootstrap_interval(lambda a: a.mean(-1), column)
    assert low < column.mean() < high
