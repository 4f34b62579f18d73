"""Hit ratios of per-layer caches under the convention of the published curves.

One request at a time from an empty cache, one token's set at a time, demand only, and the best
`slots` of resident and demanded experts kept; `as_one_layer` turns them into those of one pool.
This is a second, independent way to the numbers of `moejax.simulate`, small enough to sit inside a
fit. All ratios are over demands; a first touch is a miss, and `first_touch_ratio` is what the
published convention adds for free slots.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped


def lru_hit_ratio(
    experts: Shaped[np.ndarray, "requests tokens layers topk"], num_experts: int
) -> Float[np.ndarray, " slots"]:
    """Hit ratio of least recently used for 0 to `num_experts` slots."""
    return _ranked_hit_ratio(experts, num_experts, is_frequency=False)


def lfu_hit_ratio(
    experts: Shaped[np.ndarray, "requests tokens layers topk"], num_experts: int
) -> Float[np.ndarray, " slots"]:
    """Hit ratio of perfect counts within the request, ties to the lower index."""
    return _ranked_hit_ratio(experts, num_experts, is_frequency=True)


def oracle_hit_ratio(
    experts: Shaped[np.ndarray, "requests tokens layers topk"],
    num_experts: int,
    slots: tuple[int, ...],
) -> Float[np.ndarray, " slots"]:
    """Hit ratio of keeping what is needed soonest (Belady), for the given slots only."""
    sets = _layer_sets(experts)
    num_tokens, num_lanes, _ = sets.shape
    lane = np.arange(num_lanes)[:, None]
    next_use = _next_use(sets, num_experts)
    hits = np.zeros(len(slots))
    for place, num_slots in enumerate(slots):
        # Per lane and expert the step of the next use, made unique by the index; absent is huge.
        absent = np.int32(np.iinfo(np.int32).max)
        keep_key = np.full((num_lanes, num_experts), absent, np.int32)
        for token in range(num_tokens):
            demanded = sets[token]
            hits[place] += np.count_nonzero(keep_key[lane, demanded] < absent)
            keep_key[lane, demanded] = next_use[token] * num_experts + demanded
            if 0 < num_slots < num_experts:
                worst_kept = np.partition(keep_key, num_slots - 1, axis=1)[:, num_slots - 1]
                keep_key[keep_key > worst_kept[:, None]] = absent
            elif num_slots == 0:
                keep_key[:] = absent
    return hits / sets.size


def pinned_hit_ratio(
    profile: Shaped[np.ndarray, "requests tokens layers topk"],
    experts: Shaped[np.ndarray, "requests tokens layers topk"],
    num_experts: int,
) -> Float[np.ndarray, " slots"]:
    """Hit ratio of pinning each layer's most frequent experts of another trace, loaded before."""
    profile_counts, counts = (_layer_counts(part, num_experts) for part in (profile, experts))
    order = np.argsort(-profile_counts, axis=1, kind="stable")
    hits = np.take_along_axis(counts, order, axis=1).sum(axis=0).cumsum()
    return np.concatenate([[0.0], hits / counts.sum()])


def first_touch_ratio(
    experts: Shaped[np.ndarray, "requests tokens layers topk"], num_experts: int
) -> Float[np.ndarray, " slots"]:
    """Share of demands that are first touches while a slot is free, for 0 to `num_experts` slots.

    A cache that drops nothing before it is full takes in min(slots, distinct experts) of them.
    """
    num_requests, _, num_layers, _ = experts.shape
    touched = np.zeros((num_requests * num_layers, num_experts), bool)
    for demanded in _layer_sets(experts):
        np.put_along_axis(touched, demanded, True, axis=1)
    slots = np.arange(num_experts + 1)
    filled = np.minimum(slots[:, None], touched.sum(axis=1)[None, :]).sum(axis=1)
    return filled / experts.size


def as_one_layer(
    experts: Shaped[np.ndarray, "requests tokens layers topk"], num_experts: int
) -> Int[np.ndarray, "requests tokens 1 layers_topk"]:
    """The routing of one pool for all layers: layer l's expert e is l * num_experts + e.

    A token's experts of all layers are then one set, so nothing is evicted within a token.
    """
    num_requests, num_tokens, num_layers, _ = experts.shape
    first = np.arange(num_layers)[:, None] * num_experts
    return (experts + first).reshape(num_requests, num_tokens, 1, -1)


def _ranked_hit_ratio(
    experts: Shaped[np.ndarray, "requests tokens layers topk"],
    num_experts: int,
    *,
    is_frequency: bool,
) -> Float[np.ndarray, " slots"]:
    """Closed form for scores that only a demand changes, and only upwards.

    Then the residents are the best `slots` of all experts seen, so an expert's rank before its
    demand is the number of slots above which it hits.
    """
    sets = _layer_sets(experts)
    num_tokens, num_lanes, _ = sets.shape
    lane = np.arange(num_lanes)[:, None]
    last_use = np.full((num_lanes, num_experts), -1, np.int64)
    num_uses = np.zeros((num_lanes, num_experts), np.int64)
    hits_at_rank = np.zeros(num_experts + 1, np.int64)
    for token in range(num_tokens):
        demanded = sets[token]
        score = num_uses if is_frequency else last_use
        score = score * num_experts - np.arange(num_experts)[None, :]
        rank = (score[:, None, :] > score[lane, demanded][:, :, None]).sum(axis=2)
        rank = np.where(last_use[lane, demanded] >= 0, rank, num_experts)
        hits_at_rank += np.bincount(rank.ravel(), minlength=num_experts + 1)
        last_use[lane, demanded] = token
        num_uses[lane, demanded] += 1
    return np.concatenate([[0.0], hits_at_rank[:-1].cumsum() / sets.size])


def _layer_sets(
    experts: Shaped[np.ndarray, "requests tokens layers topk"],
) -> Int[np.ndarray, "tokens lanes topk"]:
    """One lane per request and layer."""
    _, num_tokens, _, topk = experts.shape
    return experts.transpose(1, 0, 2, 3).reshape(num_tokens, -1, topk).astype(np.int64)


def _layer_counts(
    experts: Shaped[np.ndarray, "requests tokens layers topk"], num_experts: int
) -> Int[np.ndarray, "layers experts"]:
    num_layers = experts.shape[2]
    flat = experts.transpose(2, 0, 1, 3).reshape(num_layers, -1)
    return np.stack([np.bincount(layer, minlength=num_experts) for layer in flat])


def _next_use(
    sets: Int[np.ndarray, "tokens lanes topk"], num_experts: int
) -> Int[np.ndarray, "tokens lanes topk"]:
    num_tokens, num_lanes, _ = sets.shape
    lane = np.arange(num_lanes)[:, None]
    upcoming = np.full((num_lanes, num_experts), num_tokens, np.int32)
    next_use = np.empty(sets.shape, np.int32)
    for token in range(num_tokens - 1, -1, -1):
        next_use[token] = upcoming[lane, sets[token]]
        upcoming[lane, sets[token]] = token
    return next_use
