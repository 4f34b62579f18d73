"""Whether a workload ranks strategies as recorded routing of the same family does."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.stats import kendalltau

from moejax.errors import UsageError
from moejax.simulate import Marks, replay, sweep
from moejax.strategies import STRATEGIES, learn_profile
from moejax.trace import Trace, batch_trace, select_requests, split_profile
from moejax.workloads import Workload, make_trace

RANKED = ("lru", "lfu", "fifo", "oracle", "top_k", "intelligent")
"""Strategies that are ranked by default."""
LEAST_TAU = 0.6
"""Mean of Kendall's tau over the capacities from which on two rankings agree."""
LARGEST_LOSS_RATIO = 0.01
"""Hits that the workload's favourite may cost on the recording, beside the recording's own."""

_PROFILE_SHARE_RATIO = 0.3
_MAX_TOKENS = 8192


@dataclass(frozen=True)
class Agreement:
    """Two rankings of the same strategies by hits, capacity by capacity.

    Attributes:
      strategies: What was ranked.
      slots: Slots a layer.
      num_steps: Tokens replayed of each, one at a time, the cache carried across requests.
      workload_hit_ratio: Every load a miss.
      recorded_hit_ratio: The same of the recording.
      tau: Kendall's tau-b between the two at each capacity.
      loss_ratio: Hits on the recording that the strategy which is best on the workload lacks,
        beside the best one there; strategies that read the future do not count.
    """

    strategies: tuple[str, ...]
    slots: tuple[int, ...]
    num_steps: int
    workload_hit_ratio: Float[np.ndarray, "strategies slots"]
    recorded_hit_ratio: Float[np.ndarray, "strategies slots"]
    tau: tuple[float, ...]
    loss_ratio: tuple[float, ...]

    @property
    def mean_tau(self) -> float:
        """Mean over the capacities."""
        return float(np.mean(self.tau))

    @property
    def is_same_ranking(self) -> bool:
        """Whether the mean tau is high enough."""
        return self.mean_tau >= LEAST_TAU

    @property
    def is_same_winner(self) -> bool:
        """Whether, at every capacity, the workload's favourite is as good as the best."""
        return max(self.loss_ratio) <= LARGEST_LOSS_RATIO


def compare_rankings(
    workload: Workload,
    recorded: Trace,
    slots: tuple[int, ...],
    *,
    strategies: tuple[str, ...] = RANKED,
    seed: int,
) -> Agreement:
    """Ranks strategies on a workload and on a recording, each with a profile of its own kind.

    The workload's draw has as many requests, tokens a request and experts a token as the
    recording has; three tenths of both are profile. Longer recordings are thinned out to requests
    spread evenly.

    Args:
      workload: Drawn from for this comparison.
      recorded: Routing of a model with as many experts a layer.
      slots: Slots a layer to compare at.
      strategies: Names in the registry.
      seed: Of the draw and of the strategies.

    Raises:
      UsageError: The numbers of experts differ.
    """
    if workload.num_experts != recorded.num_experts:
        raise UsageError(
            f"workload {workload.name!r} has {workload.num_experts} experts a layer and the "
            f"recording {recorded.num_experts}",
            "Compare routing of one family.",
        )
    recorded = _thinned(recorded)
    drawn = make_trace(
        replace(workload, num_experts_per_tok=recorded.topk),
        num_requests=recorded.num_requests,
        tokens_per_request=-(-recorded.num_tokens // recorded.num_requests),
        seed=seed,
    )
    parts = [split_profile(trace, _PROFILE_SHARE_RATIO) for trace in (drawn, recorded)]
    # As many steps of both, for hits from a cold cache depend on how long it runs.
    num_steps = min(len(batch_trace(test, 1, phase="decode")) for _, test in parts)
    made, taken = (
        _hit_ratio(profile, test, num_steps, slots, strategies, seed) for profile, test in parts
    )
    is_real = np.array([not STRATEGIES[name].needs_future for name in strategies])
    favourite = made[is_real].argmax(axis=0)
    of_favourite = np.take_along_axis(taken[is_real], favourite[None], axis=0)[0]
    return Agreement(
        strategies=strategies,
        slots=slots,
        num_steps=num_steps,
        workload_hit_ratio=made,
        recorded_hit_ratio=taken,
        tau=tuple(_tau(*columns) for columns in zip(made.T, taken.T, strict=True)),
        loss_ratio=tuple((1 - of_favourite / taken[is_real].max(axis=0)).tolist()),
    )


def _tau(a: Float[np.ndarray, " strategies"], b: Float[np.ndarray, " strategies"]) -> float:
    return float(np.asarray(kendalltau(a, b))[0])


def _thinned(trace: Trace) -> Trace:
    """Requests spread evenly over a trace that is longer than needed."""
    every = -(-trace.num_tokens // _MAX_TOKENS)
    return select_requests(trace, range(0, trace.num_requests, every)) if every > 1 else trace


def _hit_ratio(
    profile: Trace,
    test: Trace,
    num_steps: int,
    slots: tuple[int, ...],
    strategies: tuple[str, ...],
    seed: int,
) -> Float[np.ndarray, "strategies slots"]:
    found = sweep(
        strategies,
        replay(batch_trace(test, 1, num_steps=num_steps, phase="decode"), test.num_experts),
        np.repeat(np.array(slots, np.int32)[:, None], test.num_layers, axis=1),
        topk=test.topk,
        marks=Marks(np.ones(num_steps, bool), np.zeros(num_steps, bool)),
        profile=learn_profile(profile),
        seed=seed,
    )
    ratios = np.array([record["hit_ratio"] for record in found])
    return ratios.reshape(len(strategies), len(slots))
