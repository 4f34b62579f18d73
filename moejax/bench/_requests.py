"""Where a run's requests come from: a calibrated workload or a recorded trace."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt

from moejax.cards import ModelSpec
from moejax.errors import BadFileError, UsageError
from moejax.strategies import Profile, learn_profile
from moejax.trace import Trace, batch_tokens, not_computed, select_requests, split_profile
from moejax.workloads import WORKLOADS, Workload, make_trace

_TOKENS_PER_REQUEST = 128
_PROFILE_REQUESTS = 32
_PROFILE_SHARE_RATIO = 0.3
# Runs draw seeds far from the profile's.
_PROFILE_SEED_OFFSET = 1_000_000


class Requests(NamedTuple):
    """Routing to test strategies on, and what may be learned beforehand.

    Attributes:
      profile: Trace to learn from; shares no request with any run.
      test: Recorded requests to draw runs from; None where each run draws its own.
      workload: Name of the synthetic workload; None for recorded routing.
      seed: Seed of the draws.
    """

    profile: Trace
    test: Trace | None
    workload: str | None
    seed: int


def open_requests(trace: Trace | None, workload: str, model: ModelSpec, seed: int) -> Requests:
    """Prepares a recorded trace, or a workload where there is none.

    Raises:
      BadFileError: The trace's shape is not the model's.
      UsageError: The workload is unknown, or its shape is not the model's.
    """
    if trace is not None:
        check_shape(trace, model)
        profile, test = split_profile(trace, _PROFILE_SHARE_RATIO)
        return Requests(profile, test, trace.workload, seed)
    if workload not in WORKLOADS:
        raise UsageError(f"workload {workload!r} is not known", f"Known: {', '.join(WORKLOADS)}.")
    profile = draw_profile(WORKLOADS[workload], seed)
    check_shape(profile, model)
    return Requests(profile, None, workload, seed)


def check_shape(trace: Trace, model: ModelSpec) -> None:
    """Refuses a trace that cannot be this model's.

    Raises:
      BadFileError: Layers or experts of a recorded trace differ.
      UsageError: Those of a synthetic one differ.
    """
    routed = (trace.num_layers, trace.num_experts)
    if routed == (model.num_moe_layers, model.num_experts):
        return
    cause = (
        f"routes {routed[0]} layers of {routed[1]} experts, but {model.name} has "
        f"{model.num_moe_layers} layers of {model.num_experts}"
    )
    if trace.workload is not None:
        raise UsageError(
            f"the workload {trace.workload!r} {cause}",
            "Name a workload of this model with --workload, or record a trace and give --trace.",
        )
    raise BadFileError(f"the trace {cause}", "Name the trace's own model with --model.")


def learn(requests: Requests) -> Profile:
    """What the profile part teaches."""
    return learn_profile(requests.profile)


def draw_profile(workload: Workload, seed: int) -> Trace:
    """Requests of a workload to learn from; no run draws them."""
    return make_trace(
        workload,
        num_requests=_PROFILE_REQUESTS,
        tokens_per_request=_TOKENS_PER_REQUEST,
        seed=(seed + _PROFILE_SEED_OFFSET) % 2**32,
        with_lookahead=False,
    )


def draw_synthetic(
    workload: Workload,
    seed: int,
    *,
    num_places: int,
    num_steps: int,
    tokens_per_request: int = _TOKENS_PER_REQUEST,
    with_lookahead: bool = True,
) -> Trace:
    """Requests of a workload, enough to keep every place of a batch busy."""
    return make_trace(
        workload,
        num_requests=num_places * -(-num_steps // tokens_per_request),
        tokens_per_request=tokens_per_request,
        seed=seed % 2**32,
        with_lookahead=with_lookahead,
    )


def draw_run(
    requests: Requests,
    run: int,
    *,
    num_places: int,
    num_steps: int,
    tokens_per_request: int = _TOKENS_PER_REQUEST,
    with_lookahead: bool = True,
) -> Trace:
    """The requests of one run, enough to keep every place of a batch busy.

    Args:
      requests: Where to draw from.
      run: Number of the run: another number gives another draw.
      num_places: Requests that decode at the same time.
      num_steps: Steps for which no place may be empty.
      tokens_per_request: Length of synthetic requests; recorded ones have their own. A recording
        that is too short is drawn from again.
      with_lookahead: Whether synthetic requests say what later gates would choose, which costs
        most of a draw; recorded ones say what was recorded.
    """
    if requests.test is None:
        assert requests.workload is not None
        return draw_synthetic(
            WORKLOADS[requests.workload],
            requests.seed + run,
            num_places=num_places,
            num_steps=num_steps,
            tokens_per_request=tokens_per_request,
            with_lookahead=with_lookahead,
        )
    length = np.diff(requests.test.request_start)
    # However requests fall to places, none runs dry before so many tokens have been handed out.
    enough_tokens = num_places * (num_steps + int(length.max()))
    rng = np.random.default_rng([requests.seed, run])
    order = rng.permutation(len(length))
    while length[order].sum() < enough_tokens:
        order = np.concatenate([order, rng.permutation(len(length))])
    num_drawn = int(np.searchsorted(np.cumsum(length[order]), enough_tokens)) + 1
    return select_requests(requests.test, order[:num_drawn])


def batch_lookahead(
    trace: Trace, batch_size: int, num_steps: int
) -> UInt[np.ndarray, "steps layers ahead places width"] | None:
    """What the next gates say of every place, best guesses first; None if not recorded."""
    if trace.lookahead is None:
        return None
    tokens = batch_tokens(trace, batch_size, num_steps=num_steps)
    said = np.asarray(trace.lookahead)[np.maximum(tokens, 0)]
    said[tokens < 0] = not_computed(trace.lookahead)
    return np.moveaxis(said, 1, 3)
