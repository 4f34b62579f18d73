"""Hit ratio against capacity, by the convention of the published curves."""

from typing import Any

import jax
import numpy as np

from moejax.bench._requests import Requests, draw_run
from moejax.simulate import Marks, ranks, replay
from moejax.strategies import STRATEGIES, Profile

_SAMPLE_TOKENS = 512
_NUM_SAMPLES = 4
# Of 60 experts: where the published curves have points.
_SLOT_RATIOS = tuple(slots / 60 for slots in (2, 4, 6, 8, 10, 12, 16, 20, 24, 30, 36, 45, 52, 56))


def hit_curves(
    requests: Requests, profile: Profile, strategies: tuple[str, ...], seed: int
) -> dict[str, Any]:
    """Hit ratios of the demand-only retention of strategies that score for all capacities at once.

    The published curves come from samples of 512 tokens, each beginning with an empty cache; so
    do these, for as many tokens as the recorded requests have.

    Returns:
      By strategy: `slots`, `hit_ratio` (every load is a miss) and `hit_ratio_warm` (a first touch
      is forgiven while a slot is free).
    """
    num_tokens = _NUM_SAMPLES * _SAMPLE_TOKENS
    trace = draw_run(
        requests,
        0,
        num_places=1,
        num_steps=num_tokens,
        tokens_per_request=_SAMPLE_TOKENS,
        with_lookahead=False,
    )
    experts = np.asarray(trace.experts[:num_tokens])
    is_reset = np.zeros(len(experts), bool)
    is_reset[trace.request_start[trace.request_start < len(experts)]] = True
    marks = Marks(np.ones(len(experts), bool), is_reset)
    slots = np.unique(np.round(np.array(_SLOT_RATIOS) * trace.num_experts).astype(np.int32))
    slots = slots[slots > 0]
    lane = replay(experts, trace.num_experts)
    curves = {}
    for name in dict.fromkeys(("lru", "lfu", "oracle", *strategies)):
        strategy = STRATEGIES[name].make(profile)
        if strategy.reads_cache:
            continue
        counts = ranks(strategy, lane, slots, jax.random.key(seed), topk=trace.topk, marks=marks)
        curves[name] = {
            "slots": slots.tolist(),
            "hit_ratio": counts.hit_ratio.tolist(),
            "hit_ratio_warm": counts.hit_ratio_warm.tolist(),
        }
    return curves
