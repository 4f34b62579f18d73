"""What else of an engine is measured: long contexts, prompts, many steps, device memory."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moejax.engine import OffloadEngine
from moejax.qwen_moe import QwenMoeConfig
from moejax.trace import expert_dtype

from ._engine_ceilings import Ceilings
from ._engine_rig import Rig, StepSizes
from ._engine_steps import Routing, replay_steps, replay_table, take_steps, with_tokens

_NUM_PROMPTS = 5


def steady_routing(rig: Rig, num_steps: int) -> Routing:
    """Routing of one request that demands the same experts at every step."""
    config = rig.config
    shape = (num_steps, rig.num_layers, config.num_experts_per_tok)
    experts = np.broadcast_to(np.arange(config.num_experts_per_tok), shape)
    return Routing("steady", experts.astype(expert_dtype(config.num_experts)))


def measure_contexts(
    rig: Rig,
    engine: OffloadEngine,
    sizes: StepSizes,
    ceilings: Ceilings,
    contexts: Sequence[int],
    *,
    num_steps: int = 64,
    num_warmup: int = 16,
) -> list[dict[str, Any]]:
    """Times steps without misses at several contexts, each in a cache that ends where it does.

    What a longer context adds to a step is attention alone, and is set against the keys and values
    that it adds at the rate of device memory. Keys and values are all zeros, which costs the same.

    Args:
      rig: The model.
      engine: Its engine, with a slot for every expert of a token.
      sizes: Bytes that steps read.
      ceilings: Rates of this machine.
      contexts: Tokens behind the request at the first step; the first is what the others are
        compared with.
      num_steps: Steps that count.
      num_warmup: Steps before them.

    Returns:
      A record a context: `context` (mean over the steps), `step_s` (`median`, `samples`),
      `added_s`, `added_bytes`, `added_bound_s` and `bound_ratio`, None of the first.
    """
    routing = steady_routing(rig, num_warmup + num_steps)
    records: list[dict[str, Any]] = []
    for context in contexts:
        steps = replay_steps(engine, routing, 1, context=context)
        samples_s = steps.step_s[num_warmup:]
        mean_context = context + (num_warmup + len(steps.step_s)) / 2
        record: dict[str, Any] = {
            "context": mean_context,
            "step_s": {"median": float(np.median(samples_s)), "samples": samples_s},
            "added_s": None,
            "added_bytes": None,
            "added_bound_s": None,
            "bound_ratio": None,
        }
        if records:
            first = records[0]
            added_s = record["step_s"]["median"] - first["step_s"]["median"]
            added_bytes = (mean_context - first["context"]) * sizes.position_bytes
            bound_s = added_bytes / ceilings.hbm_bytes_per_s
            record |= {
                "added_s": added_s,
                "added_bytes": added_bytes,
                "added_bound_s": bound_s,
                "bound_ratio": added_s / bound_s,
            }
        records.append(record)
    return records


def measure_prefill(
    rig: Rig,
    engine: OffloadEngine,
    sizes: StepSizes,
    ceilings: Ceilings,
    num_tokens: int,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Times the reading of one prompt, all experts on the host, until its next token is there.

    Returns:
      `num_tokens`, `prefill_s` (`median`, `samples`), `copy_bound_s` (all routed experts over the
      link), `compute_bound_s` (operations of the chosen experts only, at the rate of a large
      product), `bound_ratio` over the larger of the two.
    """
    generator = np.random.default_rng(seed)
    prompt = generator.integers(0, rig.config.vocab_size, num_tokens).tolist()
    samples_s = []
    for _ in range(_NUM_PROMPTS + 1):
        generation = engine.generate([prompt], max_new_tokens=1).finish()
        samples_s.append(generation.timing.ttft_s)
    # The first run of a program sets it up.
    samples_s = samples_s[1:]
    copy_s = rig.num_layers * rig.store.layout.layer_bytes / ceilings.link_bytes_per_s
    num_flops = prefill_flops(rig.config, sizes, num_tokens)
    compute_s = num_flops / ceilings.flops_per_s
    median_s = float(np.median(samples_s))
    return {
        "num_tokens": num_tokens,
        "prefill_s": {"median": median_s, "samples": samples_s},
        "num_flops": num_flops,
        "copy_bound_s": copy_s,
        "compute_bound_s": compute_s,
        "bound_ratio": median_s / max(copy_s, compute_s),
    }


def prefill_flops(config: QwenMoeConfig, sizes: StepSizes, num_tokens: int) -> float:
    """Operations a prompt cannot do without: the head once, half of the attention matrix."""
    itemsize = sizes.row_bytes // config.hidden_size
    active = config.num_experts_per_tok * len(config.moe_layers) * sizes.expert_bytes
    num_head = config.vocab_size * config.hidden_size
    num_weights = (sizes.dense_bytes + active) / itemsize - num_head
    attention = config.num_attention_heads * config.head_dim * num_tokens * (num_tokens + 1)
    layers = config.num_hidden_layers
    return 2.0 * (num_tokens * num_weights + num_head + layers * attention)


def measure_drift(
    engine: OffloadEngine, routing: Routing, *, num_steps: int, num_ends: int, context: int
) -> dict[str, Any]:
    """Takes very many steps on the same routing over and over, always at about the same context.

    Every pass through the routing begins at the same positions again, so that attention does not
    grow: a drift would be the engine's.

    Args:
      engine: The engine.
      routing: Routing of one request.
      num_steps: Steps in all, to full passes.
      num_ends: Steps at either end that are compared.
      context: Tokens behind the request at the start of each pass.

    Returns:
      `num_steps`, medians `first_s` and `last_s` of either end, `drift_ratio` between them less
      one, and `samples_s`.
    """
    size = len(routing.experts)
    table = replay_table(engine, routing, 1)
    program = engine.program(1, context + size, is_replayed=True)
    state = engine.new_state(1, context + size, position=context)
    samples_s: list[float] = []
    for number in range(-(-num_steps // size) + 1):
        state = with_tokens(state, np.zeros(1, np.int32), np.full(1, context))
        state, steps = take_steps(program, state, size, table=table)
        # The first pass fills the slots; every pass begins with a step that waits for its launch.
        samples_s += steps.step_s[1:] if number else []
    first_s, last_s = np.median(samples_s[:num_ends]), np.median(samples_s[-num_ends:])
    return {
        "num_steps": len(samples_s),
        "num_ends": num_ends,
        "first_s": float(first_s),
        "last_s": float(last_s),
        "drift_ratio": float(last_s / first_s - 1),
        "samples_s": samples_s,
    }


def measure_memory(
    rig: Rig, engine: OffloadEngine, *, batch_size: int, num_positions: int
) -> dict[str, Any]:
    """Compares what the device holds for an engine with what was planned.

    Only the rise from before the state is made until after a few steps can be told from the
    allocator; dense weights and everything else that was there already are `before_bytes`.

    Returns:
      `planned_bytes` of slots and of keys and values, `before_bytes`, `in_use_bytes` after the
      steps, `state_ratio` (what was added over what was planned) and `peak_bytes` of the process;
      all None where the backend does not tell.
    """
    routing = steady_routing(rig, 4)
    before = _memory()
    experts = np.tile(routing.experts, (1, 1, batch_size))
    table = replay_table(engine, routing._replace(experts=experts), batch_size)
    program = engine.program(batch_size, num_positions, is_replayed=True)
    state = engine.new_state(batch_size, num_positions)
    kv_bytes = sum(array.nbytes for array in jax.tree.leaves(state.kv))
    planned = {"slots": engine.device_bytes["slots"], "keys_and_values": kv_bytes}
    state, _ = take_steps(program, state, 4, table=table)
    after = _memory()
    del state
    added = None
    if before["in_use"] is not None and after["in_use"] is not None:
        added = (after["in_use"] - before["in_use"]) / sum(planned.values())
    return {
        "batch_size": batch_size,
        "num_positions": num_positions,
        "planned_bytes": planned,
        "dense_bytes": engine.device_bytes["dense"],
        "before_bytes": before["in_use"],
        "in_use_bytes": after["in_use"],
        "state_ratio": added,
        "peak_bytes": after["peak"],
    }


def _memory() -> dict[str, int | None]:
    stats = jax.devices()[0].memory_stats() or {}
    return {"in_use": stats.get("bytes_in_use"), "peak": stats.get("peak_bytes_in_use")}
