"""From a workload to a trace."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from moejax.errors import UsageError
from moejax.trace import Trace

from ._latent import latent_router
from ._patterns import pattern_router, uniform_router
from ._routing import Router
from ._workload import Workload

_ROUTERS: Mapping[str, Callable[[Workload], Router]] = MappingProxyType(
    {"latent": latent_router, "pattern": pattern_router, "uniform": uniform_router}
)


def make_trace(
    workload: Workload,
    *,
    num_requests: int,
    tokens_per_request: int,
    seed: int,
    with_lookahead: bool = True,
) -> Trace:
    """Draws requests of a workload; all their tokens are decoded ones.

    The same seed gives the same trace. Request i does not depend on how many requests are
    drawn, and other seeds draw other requests of the same model.

    Args:
      workload: One of `WORKLOADS`, or a card read with `read_workload`.
      num_requests: Requests to draw, at least 1.
      tokens_per_request: Tokens of each, at least 1.
      seed: From 0 to 2**32 - 1.
      with_lookahead: Whether the trace says what later layers' gates would choose. Most of the
        work of a draw; nothing else in the trace depends on it.

    Returns:
      A trace whose `workload` names the recipe, with routing weights.

    Raises:
      UsageError: A count is below 1, the seed is out of range, or the router is unknown.
    """
    _check("number of requests", num_requests, 1)
    _check("number of tokens per request", tokens_per_request, 1)
    _check("seed", seed, 0)
    if workload.router not in _ROUTERS:
        raise UsageError(
            f"workload {workload.name!r} asks for the router {workload.router!r}",
            f"Choose one of {', '.join(_ROUTERS)}.",
        )
    route = _ROUTERS[workload.router](workload)
    requests = [
        route(seed, request, tokens_per_request, with_lookahead=with_lookahead)
        for request in range(num_requests)
    ]
    experts, weights, token_ids = (
        np.concatenate(part)
        for part in zip(
            *((r.experts, r.routing_weights, r.token_ids) for r in requests), strict=True
        )
    )
    said = [request.lookahead for request in requests if request.lookahead is not None]
    return Trace(
        experts=experts,
        num_experts=workload.num_experts,
        request_start=np.arange(num_requests + 1, dtype=np.int64) * tokens_per_request,
        phase=np.ones(len(experts), np.uint8),
        routing_weights=weights,
        token_ids=token_ids if token_ids[0] >= 0 else None,
        lookahead=np.concatenate(said) if said else None,
        model=workload.model,
        source=_describe(workload, seed),
        licence="Apache-2.0",
        is_router_order=True,
        workload=workload.name,
    )


def _check(what: str, value: int, least: int) -> None:
    if not least <= value < 2**32:
        raise UsageError(
            f"the {what} is {value}", f"Give a whole number from {least} to 2**32 - 1."
        )


def _describe(workload: Workload, seed: int) -> str:
    origin = f"calibrated to {workload.source}" if workload.targets else "not calibrated"
    return f"synthetic routing of the workload {workload.name!r}, seed {seed}; {origin}"
