"""Decode steps of an engine as a user gets them: dispatched ahead, timed as tokens arrive."""

import gc
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, Shaped, UInt

from moejax.engine import OffloadEngine, OffloadState, ReplayTable, default_lookahead
from moejax.simulate import replay


class Routing(NamedTuple):
    """Routing that overrides a router.

    Attributes:
      name: What it is called in results.
      experts: Experts of each place in turn, as `batch_trace` gives them.
      lookahead: What the next gates said of each place; None if nobody asked them.
    """

    name: str
    experts: UInt[np.ndarray, "steps layers places_topk"]
    lookahead: Shaped[np.ndarray, "steps layers ahead places width"] | None = None


class Steps(NamedTuple):
    """What was measured, a row a step.

    Attributes:
      step_s: From the arrival of the token before to the arrival of this step's.
      counts: `moejax.engine.COUNTS` of every event.
    """

    step_s: list[float]
    counts: Int32[np.ndarray, "steps layers counts"]


def replay_table(engine: OffloadEngine, routing: Routing, batch_size: int) -> ReplayTable:
    """The routing as the engine's programs take it."""
    said = None
    if routing.lookahead is not None:
        num_experts = engine.config.num_experts
        lane = replay(routing.experts, num_experts, with_future=False, lookahead=routing.lookahead)
        said = np.asarray(lane.lookahead)
    return engine.replay_table(routing.experts, batch_size, lookahead=said)


def replay_steps(
    engine: OffloadEngine, routing: Routing, batch_size: int, *, context: int
) -> Steps:
    """Replays routing from empty slots, every step once.

    The first step has no token before it: its time runs from its dispatch.
    """
    num_steps = len(routing.experts)
    num_positions = context + num_steps
    table = replay_table(engine, routing, batch_size)
    program = engine.program(batch_size, num_positions, is_replayed=True)
    state = engine.new_state(batch_size, num_positions, position=context)
    return take_steps(program, state, num_steps, table=table)[1]


def take_steps(
    program: Any, state: OffloadState, num_steps: int, *, table: Any = None
) -> tuple[OffloadState, Steps]:
    """Takes steps one after another; the state that goes in is used up.

    A token is read two steps late (one on a CPU), as `Generation` does, so that the device never
    waits for the host. Garbage collection is off meanwhile.
    """
    num_ahead = 1 if jax.default_backend() == "cpu" else 2
    step_s: list[float] = []
    counts: list[np.ndarray] = []
    unread: deque[Any] = deque()
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        jax.block_until_ready(state)
        last_s, num_begun = time.perf_counter(), 0
        while len(step_s) < num_steps:
            while num_begun < num_steps and len(unread) <= num_ahead:
                state, output = program(state, None, table)
                output.token_ids.copy_to_host_async()
                output.counts.copy_to_host_async()
                unread.append((output.token_ids, output.counts))
                num_begun += 1
            token_ids, counted = unread.popleft()
            np.asarray(token_ids)
            now_s = time.perf_counter()
            step_s.append(now_s - last_s)
            last_s = now_s
            counts.append(np.asarray(counted)[0])
    finally:
        if was_enabled:
            gc.enable()
    return state, Steps(step_s, np.stack(counts))


def generate_steps(
    engine: OffloadEngine, prompts: Sequence[Sequence[int]], num_steps: int
) -> Steps:
    """Real generation: prompts are read, then so many steps are taken with the model's router."""
    generation = engine.generate(prompts, max_new_tokens=num_steps + 1).finish()
    return Steps(generation.timing.step_s, np.asarray(generation.counts))


def record_routing(
    engine: OffloadEngine, prompts: Sequence[Sequence[int]], num_steps: int
) -> Routing:
    """The routing of the steps that `generate_steps` takes, and what the next gates say."""
    lookahead = default_lookahead(engine.config)
    generation = engine.generate(
        prompts, max_new_tokens=num_steps + 1, record=True, lookahead=lookahead
    ).finish()
    requests = generation.routing
    new = [request.phase == 1 for request in requests]
    experts = np.concatenate(
        [request.experts[is_new] for request, is_new in zip(requests, new, strict=True)], axis=-1
    )
    if lookahead is None:
        return Routing("recorded", experts)
    said = [
        request.lookahead[is_new]
        for request, is_new in zip(requests, new, strict=True)
        if request.lookahead is not None
    ]
    return Routing("recorded", experts, np.stack(said, axis=3))


def with_tokens(
    state: OffloadState, token_ids: Int32[np.ndarray, " batch"], positions: Any = None
) -> OffloadState:
    """The state with other newest tokens and, if given, at other positions."""
    place = state.place._replace(token_ids=jnp.asarray(token_ids, jnp.int32))
    if positions is not None:
        place = place._replace(positions=jnp.asarray(positions, jnp.int32))
    return state._replace(place=place)
