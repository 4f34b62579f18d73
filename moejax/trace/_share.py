"""What one of several devices sees of a routing when the experts are dealt out among them."""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Shaped, UInt

from moejax.errors import UsageError

from ._trace import Trace, not_computed


def share_of(trace: Trace, device: int, num_devices: int) -> Trace:
    """The routing of the experts that one device owns, as a trace of its own.

    Expert `e` of every layer belongs to device `e % num_devices`, where it has the number
    `e // num_devices`; the first devices may own one more than the others. Tokens, requests and
    phases stay as they are.

    Args:
      trace: Routing over all experts.
      device: Which device, from 0.
      num_devices: Devices that the experts are dealt out among; 1 gives the trace itself.

    Returns:
      A trace of the device's experts. The ones of a token stand at the left, in the order that
      they had, then `not_computed`, with a weight of 0. There is room for as many as one token
      may have there. In `lookahead` the ranks stay what they are among all experts:
      `not_computed` stands in the places of others.

    Raises:
      UsageError: There is no such device, or it would own no expert.
    """
    if not 1 <= num_devices <= trace.num_experts:
        raise UsageError(
            f"{trace.num_experts} experts cannot be dealt out among {num_devices} devices",
            f"Use 1 to {trace.num_experts} devices.",
        )
    if not 0 <= device < num_devices:
        raise UsageError(
            f"device {device} of {num_devices} does not exist", f"Use 0 to {num_devices - 1}."
        )
    if num_devices == 1:
        return trace
    is_mine = _is_mine(trace.experts, trace.num_experts, device, num_devices)
    num_experts = len(range(device, trace.num_experts, num_devices))
    width = min(trace.topk, num_experts)
    weights, lookahead = trace.routing_weights, trace.lookahead
    if weights is not None:
        weights = _at_the_left(weights, is_mine, width, 0)
    if lookahead is not None:
        is_named = _is_mine(lookahead, trace.num_experts, device, num_devices)
        lookahead = np.where(is_named, lookahead // num_devices, not_computed(lookahead))
    return replace(
        trace,
        experts=_at_the_left(
            trace.experts // num_devices, is_mine, width, not_computed(trace.experts)
        ),
        num_experts=num_experts,
        routing_weights=weights,
        lookahead=lookahead,
        sha256="",
    )


def _is_mine(
    experts: UInt[np.ndarray, "*axes"], num_experts: int, device: int, num_devices: int
) -> Bool[np.ndarray, "*axes"]:
    return (experts < num_experts) & (experts % num_devices == device)


def _at_the_left(
    values: Shaped[np.ndarray, "*axes topk"],
    is_kept: Bool[np.ndarray, "*axes topk"],
    width: int,
    fill: int,
) -> Shaped[np.ndarray, "*axes {width}"]:
    """The kept values of each row in their order, and `fill` to the right of them."""
    packed = np.full((*values.shape[:-1], width), fill, values.dtype)
    packed[np.arange(width) < is_kept.sum(axis=-1, keepdims=True)] = values[is_kept]
    return packed
