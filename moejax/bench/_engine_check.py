"""Whether an engine computes what it must: the same bits from any slots, the simulator's counts."""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from moejax.engine import COUNTS, OffloadEngine
from moejax.strategies import STRATEGIES, Strategy
from moejax.trace import expert_dtype

from ._engine_counts import first_difference, simulated_counts
from ._engine_rig import Rig, prefetch_schedule
from ._engine_steps import Routing, replay_steps, replay_table, with_tokens

_STEPS_PER_DRAW = 8
"""Texts of a random model repeat themselves; so often a token is drawn instead."""


class Transcript(NamedTuple):
    """What an engine said, to the last bit.

    Attributes:
      token_ids: Tokens.
      digests: A digest of the logits of every step.
      num_misses: Misses of all steps.
    """

    token_ids: Int32[np.ndarray, "steps batch"]
    digests: tuple[str, ...]
    num_misses: int


def resident_transcript(
    rig: Rig, batch_size: int, num_steps: int, *, seed: int, routing: Routing | None = None
) -> Transcript:
    """The transcript of an engine that has every expert in a slot before it begins."""
    num_experts = rig.config.num_experts
    strategy = STRATEGIES["lru"].make(None)
    engine = rig.engine(rig.even_plan(num_experts, "layer"), strategy)
    return transcript(
        engine, batch_size, num_steps, seed=seed, routing=routing, fill=_every_expert(rig)
    )


def transcript(
    engine: OffloadEngine,
    batch_size: int,
    num_steps: int,
    *,
    seed: int,
    routing: Routing | None = None,
    fill: Routing | None = None,
) -> Transcript:
    """What an engine says to tokens of which every eighth is drawn and the others are its own.

    Args:
      engine: The engine.
      batch_size: Requests.
      num_steps: Steps.
      seed: Seed of the tokens that are drawn.
      routing: Overrides the router; None leaves it alone.
      fill: Is replayed before, to bring experts into the slots.
    """
    state = (
        engine.new_state(batch_size, num_steps)
        if fill is None
        else _filled(engine, batch_size, num_steps, fill)
    )
    table = None if routing is None else replay_table(engine, routing, batch_size)
    program = engine.program(batch_size, num_steps, is_replayed=routing is not None)
    generator = np.random.default_rng(seed)
    tokens, digests, num_misses = [], [], 0
    for step in range(num_steps):
        if step % _STEPS_PER_DRAW == 0:
            drawn = generator.integers(0, engine.config.vocab_size, batch_size, np.int32)
            state = with_tokens(state, drawn)
        state, output = program(state, None, table)
        tokens.append(np.asarray(output.token_ids)[0])
        digests.append(hashlib.sha256(np.asarray(output.logits).tobytes()).hexdigest())
        num_misses += int(np.asarray(output.counts)[..., COUNTS.index("misses")].sum())
    return Transcript(np.stack(tokens), tuple(digests), num_misses)


def is_identical(ours: Transcript, theirs: Transcript) -> bool:
    """Whether all tokens and all bits of all logits are equal."""
    return ours.digests == theirs.digests and np.array_equal(ours.token_ids, theirs.token_ids)


def count_difference(
    rig: Rig,
    engine: OffloadEngine,
    strategy: Strategy,
    routing: Routing,
    counts: Int32[np.ndarray, "steps layers counts"] | None = None,
    *,
    batch_size: int,
) -> str | None:
    """Where the engine's counts part from the simulator's, in words; None where they are equal.

    Args:
      rig: The model.
      engine: The engine.
      strategy: Its strategy.
      routing: What was replayed from empty slots.
      counts: What the engine counted; None replays the routing to find out.
      batch_size: Requests.
    """
    if counts is None:
        counts = replay_steps(engine, routing, batch_size, context=0).counts
    simulated = simulated_counts(
        strategy,
        engine.plan,
        routing.experts,
        num_experts=rig.config.num_experts,
        topk=rig.config.num_experts_per_tok,
        num_rows=rig.store.layout.num_rows,
        schedule=prefetch_schedule(engine),
        lookahead=routing.lookahead,
    )
    return first_difference(counts, simulated)


def _every_expert(rig: Rig) -> Routing:
    """Routing of one request that demands each expert at least once."""
    num_experts, topk = rig.config.num_experts, rig.config.num_experts_per_tok
    num_steps = -(-num_experts // topk)
    one_layer = np.resize(np.arange(num_experts), (num_steps, 1, topk))
    experts = np.repeat(one_layer, rig.num_layers, axis=1).astype(expert_dtype(num_experts))
    return Routing("every expert", experts)


def _filled(engine: OffloadEngine, batch_size: int, num_positions: int, fill: Routing):
    """A fresh state but for the experts, which have been through the routing."""
    state = engine.new_state(batch_size, num_positions)
    experts = np.tile(fill.experts, (1, 1, batch_size))
    table = replay_table(engine, fill._replace(experts=experts), batch_size)
    program = engine.program(batch_size, num_positions, is_replayed=True)
    for _ in range(len(experts)):
        state, _ = program(state, None, table)
        state = with_tokens(state, np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32))
    fresh = engine.new_state(batch_size, num_positions)
    # A replay that follows begins with its first step.
    tables = state.experts.tables._replace(step=fresh.experts.tables.step)
    return fresh._replace(experts=state.experts._replace(tables=tables))
