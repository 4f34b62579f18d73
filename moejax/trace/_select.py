"""Parts of a trace, cut where requests begin and end."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from moejax.errors import UsageError

from ._trace import Trace


def select_requests(trace: Trace, requests: Sequence[int] | Int[np.ndarray, " chosen"]) -> Trace:
    """The trace of some requests, in the order given.

    Args:
      trace: Where to take them from.
      requests: Numbers of requests, 0 to `num_requests - 1`; one may be taken more than once.

    Raises:
      UsageError: A number is out of range, or the requests hold no token.
    """
    chosen = np.asarray(requests, np.int64)
    wrong = chosen[(chosen < 0) | (chosen >= trace.num_requests)]
    if wrong.size:
        raise UsageError(
            f"request {wrong[0]} does not exist", f"Use 0 to {trace.num_requests - 1}."
        )
    length = np.diff(trace.request_start)[chosen]
    tokens = _concatenated_ranges(trace.request_start[chosen], length)
    if tokens.size == 0:
        raise UsageError(f"the {chosen.size} chosen requests hold no token", "Choose others.")
    return _take_tokens(trace, tokens, np.concatenate([[0], np.cumsum(length)]))


def split_profile(trace: Trace, share: float) -> tuple[Trace, Trace]:
    """Splits a trace into a profile to learn from and a test that shares no token with it.

    Every so many-th request goes to the profile, so that both parts see the same domains even
    where a recording went through them one after another. A trace of one request is cut inside
    it, the first part being the profile.

    Args:
      trace: The trace to split.
      share: Share of the requests (of the tokens, if there is one request) in the profile.

    Returns:
      The profile and the test, each of at least one token.

    Raises:
      UsageError: `share` is not between 0 and 1, or there is but one token.
    """
    if not 0 < share < 1:
        raise UsageError(f"a profile share of {share} is not between 0 and 1", "Use 0.5, say.")
    if trace.num_tokens < 2:
        raise UsageError("a trace of one token cannot be split", "Record a longer one.")
    filled = np.flatnonzero(np.diff(trace.request_start))
    if filled.size == 1:
        cut = min(max(round(share * trace.num_tokens), 1), trace.num_tokens - 1)
        tokens = np.arange(trace.num_tokens)
        profile, test = (
            _take_tokens(trace, part, np.array([0, part.size])) for part in np.split(tokens, [cut])
        )
        return profile, test
    # Request i is in the profile where floor((i + 1) * share) steps up; 1e-9 mends 0.1 * 10 < 1.
    steps = np.floor(np.arange(filled.size + 1) * share + 1e-9)
    is_profile = np.diff(steps) > 0
    is_profile[0] |= not is_profile.any()
    is_profile[-1] &= not is_profile.all()
    return (
        select_requests(trace, filled[is_profile]),
        select_requests(trace, filled[~is_profile]),
    )


def _take_tokens(trace: Trace, tokens: np.ndarray, request_start: np.ndarray) -> Trace:
    per_token = ("experts", "phase", "routing_weights", "token_ids", "lookahead")
    # A run of tokens stays a view of the mapped file.
    is_run = tokens[-1] - tokens[0] == tokens.size - 1 and np.all(np.diff(tokens) == 1)
    index = slice(tokens[0], tokens[-1] + 1) if is_run else tokens
    taken = {
        name: None if getattr(trace, name) is None else getattr(trace, name)[index]
        for name in per_token
    }
    return replace(trace, **taken, request_start=request_start.astype(np.int64), sha256="")


def _concatenated_ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """`start[i] .. start[i] + length[i] - 1` for every i, one after another."""
    offset = np.concatenate([[0], np.cumsum(length)])
    return np.arange(offset[-1]) + np.repeat(start - offset[:-1], length)
