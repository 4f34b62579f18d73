"""Counts of a profile trace: what can be known before the trace under test begins."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from moejax.errors import UsageError
from moejax.trace import Trace, known_ids

_BLOCK_TOKENS = 2048


class Profile(NamedTuple):
    """What a profile trace, disjoint from the trace under test, has taught.

    Attributes:
      num_tokens: Tokens the counts come from.
      topk: Experts a token demands.
      num_uses: How often each expert was demanded.
      transition: How often the demand of expert i in layer l was followed by that of expert j,
        1 to `depth` events later, inside one request.
      successor: The same for the next token in the same layer.
      reuse_weights: `ReuseWeights` of learned retention; None keeps the defaults.
    """

    num_tokens: int
    topk: int
    num_uses: Float[np.ndarray, "layers experts"]
    transition: Float[np.ndarray, "layers depth experts experts"]
    successor: Float[np.ndarray, "layers experts experts"]
    reuse_weights: Any = None


def count_profile(trace: Trace, *, depth: int = 4, max_tokens: int = 20_000) -> Profile:
    """Counts popularity, layer-to-layer and token-to-token transitions.

    Args:
      trace: Profile trace; use `split_profile` to keep it apart from the one under test.
      depth: How many layers ahead to count; cut to the number of layers less one.
      max_tokens: Only the first so many tokens are read.

    Raises:
      UsageError: The trace holds fewer than two tokens.
    """
    num_tokens = min(trace.num_tokens, max_tokens)
    if num_tokens < 2:
        raise UsageError(
            f"a profile of {trace.num_tokens} token(s) teaches nothing",
            "Give a longer profile trace or a larger profile share.",
        )
    num_layers, num_experts = trace.num_layers, trace.num_experts
    depth = min(depth, num_layers - 1)
    num_uses = np.zeros((num_layers, num_experts), np.float32)
    transition = np.zeros((num_layers, depth, num_experts, num_experts), np.float32)
    successor = np.zeros((num_layers, num_experts, num_experts), np.float32)
    follows = np.ones(num_tokens, bool)
    follows[trace.request_start[trace.request_start < num_tokens]] = False
    for start in range(0, num_tokens, _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, num_tokens)
        # One token more than the block, so that pairs across its end are counted once.
        demand = _one_hot(trace.experts[start : min(stop + 1, num_tokens)], num_experts)
        here = demand[:, : stop - start]
        after = demand[:, 1:] * follows[start + 1 : start + demand.shape[1]][None, :, None]
        paired = here[:, : after.shape[1]]
        num_uses += here.sum(1)
        successor += paired.transpose(0, 2, 1) @ after
        for ahead in range(1, depth + 1):
            inside = num_layers - ahead
            transition[:inside, ahead - 1] += here[:inside].transpose(0, 2, 1) @ here[ahead:]
            transition[inside:, ahead - 1] += paired[inside:].transpose(0, 2, 1) @ after[:ahead]
    return Profile(num_tokens, trace.topk, num_uses, transition, successor)


def _one_hot(experts: np.ndarray, num_experts: int) -> Float[np.ndarray, "layers tokens experts"]:
    tokens, layers, _ = experts.shape
    ids = known_ids(experts, num_experts).astype(np.int64)
    demand = np.zeros((layers, tokens, num_experts + 1), np.float32)
    np.put_along_axis(demand, ids.transpose(1, 0, 2), 1.0, axis=-1)
    return demand[..., :num_experts]
