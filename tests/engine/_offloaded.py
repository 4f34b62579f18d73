"""Tiny offloaded models, and what the simulator says of the routing that they follow."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.cost import LayerClock
from moejax.engine import COUNTS, Engine, OffloadEngine
from moejax.offload import ExpertLayout, ExpertStore, SlotPlan, pack
from moejax.qwen_moe import Lookahead, QwenMoe, QwenMoeConfig, RoutedExperts
from moejax.simulate import PrefetchSchedule, replay, timeline
from moejax.simulate._replay import Replay
from moejax.strategies import Profile, Strategy, learn_profile
from moejax.trace import Trace

from ._tiny import CONFIG, random_model

NUM_EXPERTS, TOPK, NUM_LAYERS = 12, 3, 3
NUM_POSITIONS, NUM_STEPS = 64, 26
# Four layers, of which layer 1 has no experts; and one whose widths the kernels can do.
WITH_A_GAP = replace(CONFIG, num_hidden_layers=4, num_experts=NUM_EXPERTS, num_experts_per_tok=TOPK)
FOR_KERNELS = replace(
    WITH_A_GAP,
    vocab_size=48,
    hidden_size=32,
    num_hidden_layers=NUM_LAYERS,
    mlp_only_layers=(),
    moe_intermediate_size=16,
    shared_expert_intermediate_size=32,
)
FIRST_TOKENS = (3, 14, 15)


class Run(NamedTuple):
    """What a few steps gave."""

    token_ids: np.ndarray
    logits: np.ndarray
    counts: np.ndarray


def take_apart(config: QwenMoeConfig) -> tuple[QwenMoe, ExpertStore]:
    """A random model without its routed experts, and these."""
    model = random_model(config)
    layers = []
    for number in config.moe_layers:
        experts = model.layers[number].mlp.experts
        matrices = (np.asarray(p[...]) for p in (experts.gate_up_proj, experts.down_proj))
        layers.append(jnp.asarray(pack(*matrices)))
    graph, routed, rest = nnx.split(model, RoutedExperts, ...)
    hollow = jax.tree.map(lambda array: jnp.zeros(0, array.dtype), routed)
    layout = ExpertLayout(
        config.num_experts, config.hidden_size, config.moe_intermediate_size, "float32"
    )
    return nnx.merge(graph, hollow, rest), ExpertStore(layout, tuple(layers))


@functools.cache
def recorded(config: QwenMoeConfig, batch_size: int) -> tuple[np.ndarray, Replay, np.ndarray]:
    """Tokens and routing of the texts that `start` begins, as the resident engine records them."""
    generation = Engine(random_model(config)).generate(
        [[token] for token in FIRST_TOKENS[:batch_size]],
        max_new_tokens=NUM_STEPS + 1,
        record=True,
        lookahead=Lookahead(2, 2 * TOPK),
    )
    routing = generation.finish().routing
    token_ids = np.stack([text[:NUM_STEPS] for text in generation.token_ids], axis=1)
    experts = np.stack([one.experts[:NUM_STEPS] for one in routing], axis=2)
    said = np.stack([one.lookahead[:NUM_STEPS] for one in routing], axis=3)
    flat = experts.reshape(NUM_STEPS, NUM_LAYERS, -1)
    return token_ids, replay(flat, NUM_EXPERTS, lookahead=said), experts


def decode(engine: OffloadEngine, batch_size: int, num_steps: int, *, plan=None, table=None) -> Run:
    """Decodes step by step from cold experts, the plan one of as many slots as the engine's."""
    if plan is not None:
        # The split of the slots is data: the programs stay what they are.
        engine = engine.with_plan(plan)
    program = engine.program(batch_size, NUM_POSITIONS, is_replayed=table is not None)
    state = start(engine, batch_size)
    outputs = []
    for _ in range(num_steps):
        state, output = program(state, None, table)
        outputs.append(output)
    outputs = jax.device_get(outputs)
    return Run(*(np.stack([step[i] for step in outputs]) for i in range(3)))


def start(engine: OffloadEngine, batch_size: int):
    state = engine.new_state(batch_size, NUM_POSITIONS)
    token_ids = jnp.asarray(FIRST_TOKENS[:batch_size], jnp.int32)
    return state._replace(place=state.place._replace(token_ids=token_ids))


def check_counts(
    engine: OffloadEngine, strategy: Strategy, lane: Replay, plans: Sequence[SlotPlan], counts
) -> None:
    """Every count of every layer and step is the simulator's."""
    schedule = PrefetchSchedule(
        layers_per_copy=engine.schedule.layers_per_copy,
        depth=engine.sizes.shape.depth,
        num_rows=engine.sizes.num_rows,
        rows_per_event=engine.schedule.rows_per_event,
        rows_before_demand=engine.schedule.rows_before_experts,
    )
    one = jnp.ones(lane.demand.shape[1], jnp.float32)
    number = jnp.float32(1)
    clock = LayerClock(
        attention_s=number,
        shared_s=number,
        expert_read_s=one,
        expert_token_s=one,
        copy_s=one,
        host_expert_s=one,
        step_fixed_s=number,
        overlap_ratio=number,
        shadow_copy_s=one,
        expert_bytes=one,
    )

    def simulate(lane, slots):
        key = jax.random.key(0)
        return timeline(strategy, lane, clock, slots, key, topk=TOPK, schedule=schedule)

    slots = np.array([plan.slots for plan in plans])
    lane = jax.tree.map(jnp.asarray, lane)
    record = jax.device_get(jax.jit(jax.vmap(simulate, in_axes=(None, 0)))(lane, slots))
    expected = {
        "demands": record.num_demands,
        "hits": record.num_hits,
        "late": record.num_late,
        "misses": record.num_misses,
        "prefetches": record.num_prefetches.sum(-1),
        "fetched_rows": record.num_fetched_rows,
    }
    assert tuple(expected) == COUNTS
    for i, name in enumerate(COUNTS):
        found = np.stack([run[:, 0, :, i] for run in counts])
        np.testing.assert_array_equal(found, expected[name], err_msg=name)


def predictable(num_steps: int, seed: int, batch_size: int = 1) -> tuple[np.ndarray, Replay]:
    """Batched routing whose layers mostly lead to one another, and gates that mostly know."""
    rng = np.random.default_rng(seed)
    num_sets = NUM_EXPERTS // TOPK
    chosen = np.zeros((num_steps * NUM_LAYERS, batch_size), int)
    for event in range(1, len(chosen)):
        follows = (chosen[event - 1] * 3 + 1 + event % NUM_LAYERS) % num_sets
        is_stray = rng.random(batch_size) < 0.1
        chosen[event] = np.where(is_stray, rng.integers(0, num_sets, batch_size), follows)
    experts = chosen[..., None] * TOPK + np.arange(TOPK)
    ahead = np.stack([np.roll(experts, -1 - step, axis=0) for step in range(2)], axis=1)
    is_wrong = rng.random(ahead.shape) < 0.1
    said = np.where(is_wrong, rng.integers(0, NUM_EXPERTS, ahead.shape), ahead)
    experts = experts.reshape(num_steps, NUM_LAYERS, -1).astype(np.uint8)
    said = said.reshape(num_steps, NUM_LAYERS, 2, batch_size, TOPK).astype(np.uint8)
    return experts, replay(experts, NUM_EXPERTS, lookahead=said)


def profile() -> Profile:
    """What such routing teaches."""
    experts, _ = predictable(300, seed=9)
    return learn_profile(Trace(experts, NUM_EXPERTS, np.array([0, 300], np.int64)))
