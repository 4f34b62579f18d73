"""Requests that decode in lockstep."""

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt

from moejax.errors import UsageError

from ._trace import Trace, not_computed


def batch_trace(
    trace: Trace,
    batch_size: int,
    *,
    num_steps: int | None = None,
    requests: Sequence[int] | None = None,
    phase: str = "all",
) -> UInt[np.ndarray, "steps layers places_topk"]:
    """The experts that `batch_size` requests in lockstep demand at every step and layer.

    Args:
      trace: Requests to serve.
      batch_size: Requests that decode at the same time.
      num_steps: Most steps to return; all of them if None.
      requests: Requests to serve, in this order; all of them if None.
      phase: `all` tokens, or only those of the `decode` phase (all of them where the trace does
        not tell phases apart).

    Returns:
      Experts of place 0, then of place 1, and so on; `not_computed` where a place is empty.

    Raises:
      UsageError: An argument is out of range, or no token is left.
    """
    tokens = batch_tokens(trace, batch_size, num_steps=num_steps, requests=requests, phase=phase)
    steps = tokens.shape[0]
    batched = np.full(
        (steps, trace.num_layers, batch_size, trace.topk),
        not_computed(trace.experts),
        trace.experts.dtype,
    )
    for place in range(batch_size):
        busy = np.flatnonzero(tokens[:, place] >= 0)
        batched[busy, :, place] = trace.experts[tokens[busy, place]]
    return batched.reshape(steps, trace.num_layers, batch_size * trace.topk)


def batch_tokens(
    trace: Trace,
    batch_size: int,
    *,
    num_steps: int | None = None,
    requests: Sequence[int] | None = None,
    phase: str = "all",
) -> Int64[np.ndarray, "steps places"]:
    """Which token every place works on at every step; the arguments are those of `batch_trace`.

    Place b begins with request b. A place whose request has ended takes the next one that waits;
    of several places that end together the lowest comes first. A step is one token of every
    place.

    Returns:
      Numbers of tokens in the trace; -1 where no request is left for a place.

    Raises:
      UsageError: An argument is out of range, or no token is left.
    """
    if batch_size < 1:
        raise UsageError(f"a batch of {batch_size} requests is empty", "Use 1 or more.")
    if num_steps is not None and num_steps < 1:
        raise UsageError(f"{num_steps} steps are none", "Use 1 or more.")
    if phase not in ("all", "decode"):
        raise UsageError(f"phase {phase!r} is unknown", "Use all or decode.")
    queue = _queue(trace, requests, phase)
    if not queue:
        raise UsageError(f"no token of phase {phase!r} is left to replay", "Use other requests.")
    free_places = [(0, place) for place in range(batch_size)]
    placed = []
    for tokens in queue:
        start, place = heapq.heappop(free_places)
        if num_steps is not None and start >= num_steps:
            break
        placed.append((start, place, tokens))
        heapq.heappush(free_places, (start + tokens.size, place))
    end = max(start + tokens.size for start, _, tokens in placed)
    steps = end if num_steps is None else min(end, num_steps)
    schedule = np.full((steps, batch_size), -1, np.int64)
    for start, place, tokens in placed:
        schedule[start : start + tokens.size, place] = tokens[: steps - start]
    return schedule


def _queue(trace: Trace, requests: Sequence[int] | None, phase: str) -> list[np.ndarray]:
    """Tokens of every request that has any, in serving order."""
    order = range(trace.num_requests) if requests is None else requests
    queue = []
    for request in order:
        if not 0 <= request < trace.num_requests:
            raise UsageError(
                f"request {request} does not exist", f"Use 0 to {trace.num_requests - 1}."
            )
        begin, end = trace.request_start[request : request + 2]
        tokens = np.arange(begin, end)
        if phase == "decode" and trace.phase is not None:
            tokens = tokens[trace.phase[begin:end] == 1]
        if tokens.size:
            queue.append(tokens)
    return queue
