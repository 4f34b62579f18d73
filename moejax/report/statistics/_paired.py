"""Two strategies on the same draws of requests: how far apart, and whether by chance.

The simulator is deterministic and no noise is added: pairs differ only because draws of requests
do. Effects in units of that spread are therefore large wherever a strategy always wins.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

from ._bootstrap import CONFIDENCE_RATIO, bootstrap_interval

LEVEL_RATIO = 0.05
"""Chance of any false alarm among the tests of one table."""

# Differences that agree to so many digits have no spread but rounding.
_ROUNDING_RATIO = 1e-9
_NUM_QUANTILES = 4_000


class Paired(NamedTuple):
    """Differences `own - other` over pairs.

    Attributes:
      num_pairs: Draws that both have.
      mean: Mean difference.
      low: Lower end of its bootstrap interval.
      high: Upper end.
      effect: Mean over standard deviation of the differences, corrected for few pairs (Hedges'
        g_z); not finite where the differences do not spread.
      effect_low: Lower end of its interval.
      effect_high: Upper end.
      p_t: Of a two-sided paired t test.
      p_signed_rank: Of an exact two-sided Wilcoxon signed-rank test.
    """

    num_pairs: int
    mean: float
    low: float
    high: float
    effect: float
    effect_low: float
    effect_high: float
    p_t: float
    p_signed_rank: float


def compare_paired(
    own: Float[np.ndarray, " pairs"], other: Float[np.ndarray, " pairs"]
) -> Paired | None:
    """Compares two columns pair by pair.

    Returns:
      None where there are fewer than two pairs.

    Reference:
      Hedges, "Distribution theory for Glass's estimator of effect size", 1981, for the correction;
      Cumming and Finch, "A primer on the understanding, use, and calculation of confidence
      intervals", 2001, for the interval by the noncentral t distribution.
    """
    num_pairs = len(own)
    if num_pairs < 2:
        return None
    differences = np.asarray(own, np.float64) - np.asarray(other, np.float64)
    mean = float(differences.mean())
    spread = float(differences.std(ddof=1))
    low, high = bootstrap_interval(lambda column: column.mean(-1), differences)
    if spread <= _ROUNDING_RATIO * float(np.abs(own).max()):
        return _without_spread(num_pairs, differences, mean, low, high)
    t = mean / spread * math.sqrt(num_pairs)
    scale = _hedges_correction(num_pairs - 1) / math.sqrt(num_pairs)
    effect_low, effect_high = (scale * end for end in _noncentrality_interval(t, num_pairs - 1))
    return Paired(
        num_pairs, mean, low, high, scale * t, effect_low, effect_high,
        float(2 * stats.t.sf(abs(t), num_pairs - 1)), _signed_rank(differences),
    )  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected so that the chance of any false alarm among them stays as stated.

    Reference:
      Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = np.argsort(p_values)
    raised = np.asarray(p_values, np.float64)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return corrected.tolist()


def _without_spread(num_pairs, differences, mean: float, low: float, high: float) -> Paired:
    """Every pair says the same: the limit of the t test, and no effect in units of nothing."""
    nan = math.nan
    scale = np.abs(differences).max()
    is_same = scale == 0 or abs(mean) <= _ROUNDING_RATIO * scale
    p_rank = 1.0 if is_same else _signed_rank(differences)
    return Paired(num_pairs, mean, low, high, nan, nan, nan, 1.0 if is_same else 0.0, p_rank)


def _signed_rank(differences: Float[np.ndarray, " pairs"]) -> float:
    """Exact with ties too: the chance of every sum of ranks under random signs."""
    differences = differences[differences != 0]
    # Ties share mean ranks, which are halves: doubled they are whole.
    ranks = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)
    chances = np.ones(1)
    for rank in ranks:
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    found = ranks[differences > 0].sum()
    tail = min(chances[: found + 1].sum(), chances[found:].sum())
    return min(1.0, 2 * float(tail))


def _hedges_correction(num_degrees: int) -> float:
    """Undefined for two pairs, whose standard deviation has no expected inverse."""
    if num_degrees < 2:
        return math.nan
    logs = special.gammaln(num_degrees / 2) - special.gammaln((num_degrees - 1) / 2)
    return math.exp(logs) / math.sqrt(num_degrees / 2)


def _noncentrality_interval(t: float, num_degrees: int) -> tuple[float, float]:
    """Noncentralities under which `t` lies at either tail.

    T <= t is Z + d <= t sqrt(V / n), so that the d with a given chance of it is a quantile of
    t sqrt(V / n) - Z; the mean over quantiles of V holds where a noncentral t overflows.
    """
    centres = t * _spread_quantiles(num_degrees)
    tail = (1 - CONFIDENCE_RATIO) / 2
    low, high = centres.min() - 8, centres.max() + 8

    def quantile(chance: float) -> float:
        found = optimize.root_scalar(
            lambda d: special.ndtr(d - centres).mean() - chance, bracket=(low, high)
        )
        return float(found.root)

    return quantile(tail), quantile(1 - tail)


@functools.cache
def _spread_quantiles(num_degrees: int) -> Float[np.ndarray, " quantiles"]:
    """Of an estimated standard deviation over the true one."""
    chances = (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
    return np.sqrt(stats.chi2.ppf(chances, num_degrees) / num_degrees)
