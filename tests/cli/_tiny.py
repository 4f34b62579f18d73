"""A small random trace of the model `tiny-moe`, so that commands take a second."""

from dataclasses import replace

import numpy as np

from moejax.trace import Trace

NUM_LAYERS, TOPK, NUM_EXPERTS = 8, 2, 16
"""The shape of `tiny-moe`."""


def make_trace(
    seed: int = 0, *, num_requests: int = 3, tokens_per_request: int = 20, **changes
) -> Trace:
    """Every token goes to experts drawn at random; `changes` replace fields of the trace."""
    num_tokens = num_requests * tokens_per_request
    scores = np.random.default_rng(seed).random((num_tokens, NUM_LAYERS, NUM_EXPERTS))
    trace = Trace(
        experts=scores.argsort(axis=-1)[..., :TOPK].astype(np.uint8),
        num_experts=NUM_EXPERTS,
        request_start=np.arange(num_requests + 1, dtype=np.int64) * tokens_per_request,
        model="tiny-moe",
        source="made up",
        licence="CC0-1.0",
    )
    return replace(trace, sha256="", **changes)
