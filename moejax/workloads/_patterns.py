"""Routers without a hidden state: no structure, structure to learn, structure that betrays."""

import numpy as np
from jaxtyping import Int, Shaped

from moejax.trace import expert_dtype

from ._routing import LOOKAHEAD_DEPTH, Router, Routing
from ._workload import Workload


def uniform_router(workload: Workload) -> Router:
    """Every set of experts is equally likely at every token and layer: the null hypothesis.

    Its lookahead is drawn alike and knows nothing.
    """
    num_layers, num_experts = workload.num_layers, workload.num_experts
    topk = workload.num_experts_per_tok

    def route(seed: int, request: int, num_tokens: int, *, with_lookahead: bool) -> Routing:
        random = np.random.default_rng((workload.model_seed, seed, request))
        shape = (num_tokens, num_layers, 1 + LOOKAHEAD_DEPTH, num_experts)
        order = np.argsort(random.random(shape, dtype=np.float32), axis=-1)[..., : 2 * topk]
        lookahead = order[:, :, 1:] if with_lookahead else None
        return _routing(order[:, :, 0, :topk], lookahead, num_experts)

    return route


def pattern_router(workload: Workload) -> Router:
    """Experts move in groups; a token's group in a layer decides its group in the next layer.

    With `cycle_experts` 0 the groups of layer 0 are random and the maps between layers never
    change: all that a layer-to-layer predictor could wish for. Otherwise the groups of that many
    experts come in a fixed cycle and, after `settle_tokens` and then every `phase_tokens`, order
    and maps are drawn anew; lookahead stays one phase behind, so that both what was learned
    and what the gate announces are wrong once trusted.
    """
    num_layers, topk = workload.num_layers, workload.num_experts_per_tok
    num_groups = workload.num_experts // topk
    cycle_length = int(workload.parameters["cycle_experts"]) // topk
    settle_tokens = int(workload.parameters["settle_tokens"])
    phase_tokens = int(workload.parameters["phase_tokens"])
    fixed = np.random.default_rng(workload.model_seed)
    members = fixed.permuted(np.tile(np.arange(workload.num_experts), (num_layers, 1)), axis=1)[
        :, : num_groups * topk
    ].reshape(num_layers, num_groups, topk)
    fixed_maps = _draw_maps(fixed, num_layers, num_groups)

    def route(seed: int, request: int, num_tokens: int, *, with_lookahead: bool) -> Routing:
        random = np.random.default_rng((workload.model_seed, seed, request))
        if cycle_length == 0:
            first = random.integers(num_groups, size=num_tokens)
            actual = expected = fixed_maps[:, first].T
        else:
            token = np.arange(num_tokens)
            phase = 1 + np.maximum(token - settle_tokens, -phase_tokens) // phase_tokens
            maps = np.stack(
                [_draw_maps(random, num_layers, num_groups) for _ in range(phase[-1] + 2)]
            )
            actual = maps[phase + 1, :, token % cycle_length]
            expected = maps[phase, :, token % cycle_length]
        return _routing(
            _members_of(members, actual),
            _expect(members, expected, num_groups) if with_lookahead else None,
            len(members[0]) * topk,
        )

    return route


def _draw_maps(
    random: np.random.Generator, num_layers: int, num_groups: int
) -> Int[np.ndarray, "layers groups"]:
    """Group of every layer for each place in layer 0's order."""
    return random.permuted(np.tile(np.arange(num_groups), (num_layers, 1)), axis=1)


def _members_of(
    members: Int[np.ndarray, "layers groups topk"], groups: Int[np.ndarray, "tokens layers"]
) -> Int[np.ndarray, "tokens layers topk"]:
    return members[np.arange(members.shape[0])[None, :], groups]


def _expect(
    members: Int[np.ndarray, "layers groups topk"],
    groups: Int[np.ndarray, "tokens layers"],
    num_groups: int,
) -> Int[np.ndarray, "tokens layers depth width"]:
    """The expected group's experts and, to fill the width, those of the group beside it."""
    likely = np.concatenate(
        [_members_of(members, groups), _members_of(members, (groups + 1) % num_groups)], axis=-1
    )
    lookahead = np.zeros((*likely.shape[:2], LOOKAHEAD_DEPTH, likely.shape[2]), np.int64)
    for depth in range(1, LOOKAHEAD_DEPTH + 1):
        lookahead[:, :-depth, depth - 1] = likely[:, depth:]
    return lookahead


def _routing(
    experts: Int[np.ndarray, "tokens layers topk"],
    lookahead: Int[np.ndarray, "tokens layers depth width"] | None,
    num_experts: int,
) -> Routing:
    dtype = expert_dtype(num_experts)
    if lookahead is not None:
        lookahead = lookahead.astype(dtype)
        for depth in range(1, LOOKAHEAD_DEPTH + 1):
            lookahead[:, -depth:, depth - 1] = np.iinfo(dtype).max
    weights: Shaped[np.ndarray, "tokens layers topk"] = np.full(
        experts.shape, 1 / experts.shape[-1], np.float16
    )
    return Routing(
        experts.astype(dtype),
        weights,
        lookahead,
        np.full(experts.shape[0], -1, np.int32),
    )
