"""The one rule of retention, the best `capacity` candidates by score, and what else picks."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Real, Shaped


def rank_by_score(score: Real[Array, "*lanes experts"]) -> Int[Array, "*lanes experts"]:
    """Ranks experts from best (0) to worst; ties go to the lower index, so ranks are unique.

    Counts pairwise: with at most a few hundred experts that beats a sort on CPU and GPU.
    """
    return _beaten_by(score).sum(-1, dtype=jnp.int32)


def keep_best(
    score: Real[Array, "*lanes experts"],
    candidates: Bool[Array, "*lanes experts"],
    capacity: Int[Array, "*lanes"],
) -> Bool[Array, "*lanes experts"]:
    """The best `capacity` of the candidates by score, ties to the lower index."""
    num_better = (_beaten_by(score) & candidates[..., None, :]).sum(-1, dtype=jnp.int32)
    return candidates & (num_better < capacity[..., None])


def best_share(
    score: Real[Array, "*lanes experts"], share_ratio: float
) -> Bool[Array, "*lanes experts"]:
    """The best share of all experts by score, rounded to whole experts."""
    num_best = jnp.full(score.shape[:-1], round(share_ratio * score.shape[-1]))
    return keep_best(score, jnp.ones_like(score, bool), num_best)


def worst(
    score: Real[Array, "*lanes experts"], candidates: Bool[Array, "*lanes experts"]
) -> Int[Array, "*lanes"]:
    """Index of the candidate that `keep_best` would drop first; any index if there is none."""
    lowest = jnp.where(candidates, score, jnp.inf).min(-1, keepdims=True)
    index = jnp.arange(score.shape[-1])
    return jnp.where(candidates & (score == lowest), index, -1).max(-1)


def first_rows(table: Shaped[Array, "rows ..."], num_rows: int) -> Shaped[Array, "some ..."]:
    """At most the first `num_rows` rows; a table that has no more is not sliced."""
    return table if len(table) <= num_rows else table[:num_rows]


def _beaten_by(score: Real[Array, "*lanes experts"]) -> Bool[Array, "*lanes experts experts"]:
    """[..., e, j]: whether expert j comes before expert e."""
    index = jnp.arange(score.shape[-1])
    lower = (index[None, :] < index[:, None]).reshape((1,) * (score.ndim - 1) + (len(index),) * 2)
    mine, other = score[..., :, None], score[..., None, :]
    return (other > mine) | ((other == mine) & lower)
