"""Does the better strategy depend on the batch size? Two-way analysis of variance."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats


class Source(NamedTuple):
    """One line of the table.

    Attributes:
      name: `strategy`, `batch size` or `strategy x batch size`.
      num_degrees: Of the source.
      num_error_degrees: Of its error.
      f: Mean square over that of its error; not finite where draws do not differ at all.
      p: By the F distribution with the degrees divided by those of the source, the lower bound
        of Geisser and Greenhouse: it holds whatever the draws' correlations.
      share_ratio: Partial eta squared, the source's share of its own and its error's variation.
    """

    name: str
    num_degrees: int
    num_error_degrees: int
    f: float
    p: float
    share_ratio: float


class Interaction(NamedTuple):
    """The table, and what the interaction comes to in per cent of time.

    Attributes:
      sources: Strategy, batch size, and both together.
      departure_ratio: By cell, mean latency over what strategy and batch size give separately,
        minus 1.
    """

    sources: tuple[Source, Source, Source]
    departure_ratio: Float[np.ndarray, "strategies batches"]


def interaction(latency_s: Float[np.ndarray, "draws strategies batches"]) -> Interaction | None:
    """Repeated measures on the logarithm of latency, draws being the subjects.

    In logarithms a strategy that is always so many times as fast has no interaction with the
    batch size; in seconds it would, since larger batches take longer.

    Returns:
      None with fewer than two draws, strategies or batch sizes.

    Reference:
      Geisser and Greenhouse, "An extension of Box's results on the use of the F distribution in
      multivariate analysis", 1958.
    """
    draws, strategies, batches = latency_s.shape
    if min(draws, strategies, batches) < 2:
        return None
    y = np.log(latency_s)
    grand = y.mean()
    by_draw = y.mean((1, 2), keepdims=True) - grand
    by_strategy = y.mean((0, 2), keepdims=True) - grand
    by_batch = y.mean((0, 1), keepdims=True) - grand
    by_cell = y.mean(0, keepdims=True) - grand - by_strategy - by_batch
    strategy_error = y.mean(2, keepdims=True) - grand - by_strategy - by_draw
    batch_error = y.mean(1, keepdims=True) - grand - by_batch - by_draw
    rest = y - grand - by_draw - by_strategy - by_batch - by_cell - strategy_error - batch_error

    def source(name: str, effect, error, num_degrees: int) -> Source:
        own, noise = (float((part**2).sum() * y.size / part.size) for part in (effect, error))
        num_error_degrees = num_degrees * (draws - 1)
        with np.errstate(divide="ignore"):
            f = float(np.float64(own / num_degrees) / (noise / num_error_degrees))
        p = float(stats.f.sf(f, 1, draws - 1))
        return Source(name, num_degrees, num_error_degrees, f, p, own / (own + noise))

    sources = (
        source("strategy", by_strategy, strategy_error, strategies - 1),
        source("batch size", by_batch, batch_error, batches - 1),
        source("strategy x batch size", by_cell, rest, (strategies - 1) * (batches - 1)),
    )
    return Interaction(sources, np.expm1(by_cell[0]))
