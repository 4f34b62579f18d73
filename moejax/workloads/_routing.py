"""What every synthetic router returns."""

from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float16, Int32, Shaped

LOOKAHEAD_DEPTH = 3
"""Layers ahead that a trace's `lookahead` reaches."""


class Routing(NamedTuple):
    """Routing of the tokens of one request.

    Attributes:
      experts: Selected experts in router order, the most wanted first.
      routing_weights: Share of the router's softmax over all experts.
      lookahead: `[t, l, d - 1]` are the experts expected in layer l + d from layer l, the likeliest
        first; the largest value of the type where there is no such layer. None if not asked for.
      token_ids: Token types; -1 where the router knows none.
    """

    experts: Shaped[np.ndarray, "tokens layers topk"]
    routing_weights: Float16[np.ndarray, "tokens layers topk"]
    lookahead: Shaped[np.ndarray, "tokens layers depth width"] | None
    token_ids: Int32[np.ndarray, " tokens"]


class Router(Protocol):
    """Routes one request; the same arguments give the same routing."""

    def __call__(
        self, seed: int, request: int, num_tokens: int, *, with_lookahead: bool
    ) -> Routing: ...
