"""Routing made to measure an engine with: a wanted hit ratio, or misses that can be foreseen."""

import numpy as np
from jaxtyping import Bool, Int, UInt

from moejax.errors import UsageError
from moejax.trace import expert_dtype, not_computed

_NEVER = -1


def trace_of_hit_ratio(
    num_steps: int,
    num_layers: int,
    num_experts: int,
    topk: int,
    batch_size: int,
    slots: int,
    hit_ratio: float,
    *,
    num_distinct: int | None = None,
    seed: int = 0,
) -> UInt[np.ndarray, "steps layers places_topk"]:
    """Routing of which each demanded expert is a hit with a given probability under LRU.

    The first step misses everything, and the slots fill over the next few. Every event demands
    equally many different experts; more hits than slots, or more misses than experts outside of
    them, are impossible, and then the ratio is missed.

    Args:
      num_steps: Decode steps.
      num_layers: Layers that have experts.
      num_experts: Experts of a layer.
      topk: Experts of a token.
      batch_size: Requests that decode in lockstep.
      slots: Slots of a layer, for which the ratio holds.
      hit_ratio: Probability of a hit.
      num_distinct: Different experts that an event demands; as many as possible by default.
      seed: Seed of all draws.

    Returns:
      Experts of place 0, then of place 1, and so on, as `batch_trace` gives them.

    Raises:
      UsageError: An event cannot demand so many different experts, or the ratio is none.
    """
    most = min(topk * batch_size, num_experts)
    num_distinct = most if num_distinct is None else num_distinct
    if not topk <= num_distinct <= most:
        raise UsageError(
            f"{batch_size} request(s) of {topk} experts cannot demand {num_distinct} of "
            f"{num_experts}",
            f"Take from {topk} to {most}.",
        )
    if not 0 <= hit_ratio <= 1:
        raise UsageError(f"a hit ratio of {hit_ratio} is none", "Take one from 0 to 1.")
    generator = np.random.default_rng(seed)
    caches = [_Lru(num_experts, slots) for _ in range(num_layers)]
    width = topk * batch_size
    experts = np.zeros((num_steps, num_layers, width), expert_dtype(num_experts))
    for step in range(num_steps):
        for layer, cache in enumerate(caches):
            inside, outside = np.flatnonzero(cache.resident), np.flatnonzero(~cache.resident)
            num_hits = int((generator.random(num_distinct) < hit_ratio).sum())
            num_hits = int(np.clip(num_hits, num_distinct - outside.size, inside.size))
            num_misses = max(num_distinct - num_hits, 0)
            chosen = np.concatenate(
                [
                    generator.choice(inside, num_distinct - num_misses, replace=False),
                    generator.choice(outside, num_misses, replace=False),
                ]
            )
            # Repeated in a circle, neighbours differ: no request gets an expert twice.
            experts[step, layer] = np.resize(generator.permutation(chosen), width)
            cache.use(chosen, step)
    return experts


def foreseeable_trace(
    num_steps: int,
    num_layers: int,
    num_experts: int,
    topk: int,
    slots: int,
    hit_ratio: float,
    *,
    seed: int = 0,
) -> UInt[np.ndarray, "steps layers topk"]:
    """Routing of one request whose misses no retention can avoid and any foresight can name.

    Each layer has `slots - 1` experts in constant use; all others come one by one, in a circle,
    into the slot that is left. So LRU and a perfect retention miss the same experts, and a
    prefetch is worth what it hides. Misses are spread evenly over all events.

    Args:
      num_steps: Decode steps.
      num_layers: Layers that have experts.
      num_experts: Experts of a layer.
      topk: Experts of a token.
      slots: Slots of a layer.
      hit_ratio: Share of the demands that are hits, once the slots are full.
      seed: Seed of which experts are in constant use.

    Raises:
      UsageError: The slots are too few for constant use, or hold every expert, or misses come so
        often that one event would have two of them.
    """
    num_steady = slots - 1
    if not topk <= num_steady < num_experts - 1:
        raise UsageError(
            f"{slots} slots cannot hold {topk} experts in constant use and one more of "
            f"{num_experts}",
            f"Take from {topk + 1} to {num_experts - 1} slots.",
        )
    misses_per_event = (1 - hit_ratio) * topk
    if not 0 <= misses_per_event <= 1:
        raise UsageError(
            f"a hit ratio of {hit_ratio} is more than one miss of {topk} experts, or none",
            f"Take one from {1 - 1 / topk:.3g} to 1.",
        )
    generator = np.random.default_rng(seed)
    order = [generator.permutation(num_experts) for _ in range(num_layers)]
    experts = np.zeros((num_steps, num_layers, topk), expert_dtype(num_experts))
    next_steady, next_rare = np.zeros(num_layers, int), np.zeros(num_layers, int)
    for step in range(num_steps):
        for layer in range(num_layers):
            event = step * num_layers + layer
            is_miss = int((event + 1) * misses_per_event) > int(event * misses_per_event)
            steady, rare = order[layer][:num_steady], order[layer][num_steady:]
            turns = next_steady[layer] + np.arange(topk - is_miss)
            chosen = steady[turns % num_steady]
            if is_miss:
                chosen = np.append(chosen, rare[next_rare[layer] % rare.size])
                next_rare[layer] += 1
            next_steady[layer] += topk - is_miss
            experts[step, layer] = chosen
    return experts


def true_lookahead(
    experts: UInt[np.ndarray, "steps layers places_topk"], batch_size: int, *, depth: int = 8
) -> UInt[np.ndarray, "steps layers ahead places width"]:
    """What gates of the next layers would say if they were always right, as `replay` takes it.

    They name twice as many experts as there are, the second half of which are none, so that every
    true one ranks in the upper half. No layer below the last one belongs to the same token, so
    nothing is said of those.
    """
    steps, layers, width = experts.shape
    topk = width // batch_size
    places = experts.reshape(steps, layers, batch_size, topk)
    shape = (steps, layers, depth, batch_size, 2 * topk)
    said = np.full(shape, not_computed(experts), experts.dtype)
    for ahead in range(1, min(depth, layers - 1) + 1):
        said[:, : layers - ahead, ahead - 1, :, :topk] = places[:, ahead:]
    return said


class _Lru:
    """One layer's slots; of experts used at the same time the lower number stays."""

    def __init__(self, num_experts: int, slots: int):
        self.resident: Bool[np.ndarray, " experts"] = np.zeros(num_experts, bool)
        self._last_use: Int[np.ndarray, " experts"] = np.full(num_experts, _NEVER)
        self._slots = slots

    def use(self, chosen: Int[np.ndarray, " chosen"], step: int) -> None:
        self._last_use[chosen] = step
        self.resident[chosen] = True
        age = np.where(self.resident, -self._last_use, 1)
        kept = np.argsort(age, kind="stable")[: min(self._slots, int(self.resident.sum()))]
        self.resident[:] = False
        self.resident[kept] = True
