"""Percentile bootstrap with one fixed draw of resamples.

Reference:
  Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

NUM_RESAMPLES = 2_000
CONFIDENCE_RATIO = 0.95

_SEED = 0

Statistic = Callable[..., Float[np.ndarray, " resamples"]]


def resamples(num_samples: int) -> Int[np.ndarray, "resamples samples"]:
    """Places of the samples in every resample."""
    # One fixed draw for all: the report of a run is the same bytes whoever makes it.
    generator = np.random.default_rng(_SEED)
    return generator.integers(num_samples, size=(NUM_RESAMPLES, num_samples))


def percentile_interval(resampled: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    """The middle `CONFIDENCE_RATIO` of what the resamples gave."""
    tail = (1 - CONFIDENCE_RATIO) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_interval(
    statistic: Statistic, *columns: Float[np.ndarray, " samples"]
) -> tuple[float, float]:
    """Interval of a statistic of samples; columns are resampled together, as pairs are.

    Args:
      statistic: Takes columns [..., samples] to [...].
      columns: Of one length, at least 2.
    """
    drawn = resamples(len(columns[0]))
    return percentile_interval(statistic(*(np.asarray(column)[drawn] for column in columns)))
