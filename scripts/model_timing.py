"""How long a model of random weights takes, and how long its bytes and products must take.

Used by `bench_model.py`. Times are those of programs as a user runs them: compiled once, called
with plain arrays, the clock stopped when results are there.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.qwen_moe import EXPERTS, KVCache, QwenMoe, QwenMoeConfig, abstract
from moejax.qwen_moe.modeling import AttentionName
from moejax.results import Measurement

CACHE_POSITIONS, CONTEXT = 512, 96
SEED = 0
# Layers called one after the other, so that no cache answers for the memory.
_NUM_CHAINED = 4
_NUM_SAMPLES = 7
_NUM_PREFILLS = 7
_SPREAD = 0.02

Row: TypeAlias = dict[str, Any]
"""What is known about one case, with `Measurement`s; becomes a row of the results."""


@dataclass(frozen=True)
class RandomModel:
    """A model as its programs take it.

    Attributes:
      config: Sizes and settings.
      weights: Every parameter, in one list.
      names: Path of each.
      merge: Makes the model of such a list.
    """

    config: QwenMoeConfig
    weights: list[jax.Array]
    names: list[str]
    merge: Callable[[list[jax.Array]], QwenMoe]

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.weights[0].dtype.itemsize

    def routed_experts(self, part: str) -> list[jax.Array]:
        """One of the two matrices of the experts, layer by layer."""
        named = zip(self.names, self.weights, strict=True)
        return [array for name, array in named if "experts" in name and part in name]

    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(
            array.nbytes
            for part in ("gate_up_proj", "down_proj")
            for array in self.routed_experts(part)
        )

    def dense_bytes(self) -> int:
        """Bytes that every token reads: all but the routed experts and an embedding of its own."""
        total = sum(array.nbytes for array in self.weights) - self.expert_bytes()
        return (
            total if self.config.tie_word_embeddings else total - self.head_size() * self.itemsize
        )

    def head_size(self) -> int:
        """Numbers in the head, and in the embedding."""
        return self.config.vocab_size * self.config.hidden_size


def draw_weights(config: QwenMoeConfig, dtype: jnp.dtype) -> RandomModel:
    """A model with random matrices and biases, drawn one by one where they stay."""
    graph, state = nnx.split(abstract(config, dtype))
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    keys = jax.random.split(jax.random.key(SEED), len(leaves))
    weights = [
        jnp.ones(leaf.shape, dtype) if "norm" in name else _draw(key, leaf.shape, dtype)
        for key, name, (_, leaf) in zip(keys, names, leaves, strict=True)
    ]
    jax.block_until_ready(weights)
    return RandomModel(
        config, weights, names, lambda weights: nnx.merge(graph, jax.tree.unflatten(tree, weights))
    )


def measure_ceilings(dtype: jnp.dtype) -> Row:
    """Rates of the device: memory by a copy and by a read, products by a large square one."""
    width, side = (2**12, 2**9) if jax.default_backend() == "cpu" else (2**15, 2**13)
    keys = jax.random.split(jax.random.key(SEED), 3)
    large = _draw(keys[0], (width, width), dtype)
    a, b = (_draw(key, (side, side), dtype) for key in keys[1:])
    copy, read, multiply = jax.jit(jnp.negative), jax.jit(lambda x: x.max(axis=1)), jax.jit(jnp.dot)
    copy_s = _sample(lambda: copy(large), "copy")
    read_s = _sample(lambda: read(large), "read")
    product_s = _sample(lambda: multiply(a, b), "matrix product")
    return {
        "copy": copy_s,
        "read": read_s,
        "product": product_s,
        "bytes_per_s": large.nbytes * max(2 / copy_s.median, 1 / read_s.median),
        "flops_per_s": 2 * side**3 / product_s.median,
    }


def time_decode(
    model: RandomModel, ceilings: Row, batch_size: int, experts: str, window: int, num_windows: int
) -> Row:
    """Greedy steps, every token fed back on the device.

    Every window of steps starts at the same context. `pipelined` dispatches a window and waits
    once; `blocked` waits for every token; `dispatch` is the host's part of `pipelined`.
    """
    keys = jax.random.split(jax.random.key(batch_size), 2 * num_windows + 2)
    shape = (batch_size, 1)
    cache, positions = _draw_cache(model, batch_size, keys[-1]), jnp.full(shape, CONTEXT, jnp.int32)
    starts = [
        (jax.random.randint(key, shape, 0, model.config.vocab_size, jnp.int32), positions)
        for key in keys[:-1]
    ]
    step, about = _compile(_decode(model, experts), model.weights, cache, *starts[0], donate=1)
    pipelined_s, dispatch_s, blocked_s, chosen = [], [], [], []
    cache, *_ = _run_window(step, model, cache, starts[0], window, is_blocked=False)
    for number, start in enumerate(starts[1:]):
        is_blocked = number >= num_windows
        cache, window_s, steps_s, selected = _run_window(
            step, model, cache, start, window, is_blocked=is_blocked
        )
        if is_blocked:
            blocked_s += steps_s
        else:
            pipelined_s.append(window_s / window)
            dispatch_s += steps_s
            chosen.append(selected)
    num_distinct = _count_distinct(np.concatenate(chosen))
    num_bytes = _step_bytes(model, batch_size, num_distinct, CONTEXT + (window + 1) / 2)
    pipelined = Measurement("decode step, pipelined", "s", tuple(pipelined_s))
    return {
        **about,
        "pipelined": pipelined,
        "blocked": Measurement("decode step, blocked", "s", tuple(blocked_s)),
        "dispatch": Measurement("dispatch of a step", "s", tuple(dispatch_s)),
        "num_distinct_experts": num_distinct,
        "num_bytes": num_bytes,
        **_bound(pipelined, ceilings, num_bytes, 0.0),
    }


def time_prefill(
    model: RandomModel, ceilings: Row, num_tokens: int, experts: str, attention: AttentionName
) -> Row:
    """One prompt read at once up to the next token; every call is waited for."""

    def prefill(weights, token_ids, positions):
        merged = model.merge(weights)
        hidden, cache, _ = merged.hidden_states(
            token_ids, positions, experts=experts, attention=attention
        )
        return jnp.argmax(merged.logits(hidden[:, -1]), axis=-1), cache

    key, vocab = jax.random.key(num_tokens), model.config.vocab_size
    token_ids = jax.random.randint(key, (1, num_tokens), 0, vocab, jnp.int32)
    arguments = (model.weights, token_ids, jnp.arange(num_tokens, dtype=jnp.int32)[None])
    read, about = _compile(prefill, *arguments)
    jax.block_until_ready(read(*arguments))
    samples_s = []
    for _ in range(_NUM_PREFILLS):
        start = time.perf_counter()
        jax.block_until_ready(read(*arguments))
        samples_s.append(time.perf_counter() - start)
    prompt = Measurement(f"prompt of {num_tokens} tokens", "s", tuple(samples_s))
    num_bytes, num_flops = model.dense_bytes() + model.expert_bytes(), _flops(model, num_tokens)
    return {
        **about,
        "prefill": prompt,
        "tokens_per_s": num_tokens / prompt.median,
        "num_bytes": num_bytes,
        "num_flops": num_flops,
        **_bound(prompt, ceilings, num_bytes, num_flops),
    }


def time_experts(model: RandomModel, ceilings: Row, num_tokens: int, implementation: str) -> Row:
    """Seconds of one layer's experts, from several layers in a row with choices of their own."""
    config = model.config
    gate_ups = model.routed_experts("gate_up_proj")[:_NUM_CHAINED]
    downs = model.routed_experts("down_proj")[:_NUM_CHAINED]
    num_layers, topk = len(gate_ups), config.num_experts_per_tok
    scores = np.random.default_rng(num_tokens).random((num_layers, num_tokens, config.num_experts))
    chosen = np.argsort(-scores, axis=-1)[..., :topk].astype(np.int32)

    def chain(x, chosen, routing_weights, gate_ups, downs):
        for layer, weights in enumerate(zip(gate_ups, downs, strict=True)):
            x = x + EXPERTS[implementation](x, chosen[layer], routing_weights, *weights)
        return x

    x = _draw(jax.random.key(num_tokens), (num_tokens, config.hidden_size), gate_ups[0].dtype)
    routing_weights = jnp.full((num_tokens, topk), 1 / topk, jnp.float32)
    arguments = (x, jnp.asarray(chosen), routing_weights, gate_ups, downs)
    run, about = _compile(chain, *arguments)
    chained = _sample(lambda: run(*arguments), implementation)
    samples_s = tuple(sample_s / num_layers for sample_s in chained.samples)
    layer = Measurement(f"experts of a layer, {num_tokens} tokens", "s", samples_s)
    expert_bytes = (gate_ups[0].nbytes + downs[0].nbytes) / config.num_experts
    num_distinct = _count_distinct(chosen[None])
    num_flops = 2 * num_tokens * topk * expert_bytes / model.itemsize
    return {
        **about,
        "layer": layer,
        "num_distinct_experts": num_distinct,
        **_bound(layer, ceilings, num_distinct * expert_bytes, num_flops),
    }


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return _SPREAD * jax.random.normal(key, shape, dtype)


def _compile(function: Callable[..., Any], *arguments: Any, donate: int | None = None):
    """A program for these arguments, and what it took to make."""
    start = time.perf_counter()
    jitted = jax.jit(function, donate_argnums=() if donate is None else donate)
    program = jitted.lower(*arguments).compile()
    text = program.as_text() or ""
    return program, {
        "compile_s": time.perf_counter() - start,
        "num_kernels": sum(text.count(f" {kind}(") for kind in ("fusion", "custom-call", "sort")),
        "temporary_bytes": getattr(program.memory_analysis(), "temp_size_in_bytes", None),
    }


def _sample(call: Callable[[], Any], name: str) -> Measurement:
    """Seconds per call, several dispatched ahead between two readings of the clock."""
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(call())
    num_calls = int(np.clip(0.02 / (time.perf_counter() - start), 1, 50))
    samples_s = []
    for _ in range(_NUM_SAMPLES):
        start = time.perf_counter()
        for _ in range(num_calls - 1):
            call()
        jax.block_until_ready(call())
        samples_s.append((time.perf_counter() - start) / num_calls)
    return Measurement(name, "s", tuple(samples_s))


def _decode(model: RandomModel, experts: str) -> Callable[..., Any]:
    def decode(weights, cache, token_ids, positions):
        merged = model.merge(weights)
        hidden, cache, routings = merged.hidden_states(token_ids, positions, cache, experts=experts)
        token_ids = jnp.argmax(merged.logits(hidden), axis=-1).astype(jnp.int32)
        selected = jnp.stack([routing.selected_experts for routing in routings])
        return cache, token_ids, positions + 1, selected

    return decode


def _run_window(
    step: Callable[..., Any],
    model: RandomModel,
    cache: KVCache,
    place: Sequence[jax.Array],
    num_steps: int,
    *,
    is_blocked: bool,
) -> tuple[KVCache, float, list[float], np.ndarray]:
    """Cache, seconds of the window, seconds until each call returned, experts of every step."""
    steps_s, selected = [], []
    jax.block_until_ready((cache, place))
    window_start = time.perf_counter()
    for _ in range(num_steps):
        start = time.perf_counter()
        cache, *place, chosen = step(model.weights, cache, *place)
        if is_blocked:
            jax.block_until_ready(place)
        steps_s.append(time.perf_counter() - start)
        selected.append(chosen)
    jax.block_until_ready(place)
    return cache, time.perf_counter() - window_start, steps_s, np.stack(selected)


def _draw_cache(model: RandomModel, batch_size: int, key: jax.Array) -> KVCache:
    """Random keys and values; those behind a request's newest token are never seen."""
    config = model.config
    shape = (batch_size, CACHE_POSITIONS, config.num_key_value_heads, config.head_dim)
    keys = jax.random.split(key, 2 * config.num_hidden_layers)
    arrays = [_draw(key, shape, model.weights[0].dtype) for key in keys]
    return KVCache(tuple(arrays[::2]), tuple(arrays[1::2]))


def _count_distinct(selected: np.ndarray) -> float:
    """Mean number of different experts in a layer of a step, [steps, layers, tokens, topk]."""
    rows = selected.reshape(-1, selected.shape[-2] * selected.shape[-1])
    return float(np.mean([len(set(row)) for row in rows.tolist()]))


def _step_bytes(model: RandomModel, batch_size: int, num_distinct: float, context: float) -> float:
    """Bytes a step cannot do without: weights once, chosen experts once, the context once."""
    config = model.config
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return (
        model.dense_bytes()
        + num_distinct / config.num_experts * model.expert_bytes()
        + batch_size * context * cached * model.itemsize
    )


def _flops(model: RandomModel, num_tokens: int) -> float:
    """Operations a prompt cannot do without: the head once, half of the attention matrix."""
    config = model.config
    active = config.num_experts_per_tok / config.num_experts * model.expert_bytes()
    num_weights = (model.dense_bytes() + active) / model.itemsize - model.head_size()
    attention = config.num_attention_heads * config.head_dim * num_tokens * (num_tokens + 1)
    return 2.0 * (
        num_tokens * num_weights + model.head_size() + config.num_hidden_layers * attention
    )


def _bound(measured: Measurement, ceilings: Row, num_bytes: float, num_flops: float) -> Row:
    """What the device's rates allow at best, and how many times longer it took."""
    bound_s = max(num_bytes / ceilings["bytes_per_s"], num_flops / ceilings["flops_per_s"])
    return {"bound_s": bound_s, "bound_ratio": measured.median / bound_s}
