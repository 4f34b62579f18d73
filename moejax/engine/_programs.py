"""The two programs of resident generation: reading prompts, and one more token for each.

Both are pure functions of the model and of plain arrays. The cache that goes into `decode` comes
out of it changed, so a caller that donates it has it updated in place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt

from moejax.qwen_moe import KVCache, Lookahead, QwenMoe, QwenMoeConfig, Routing
from moejax.trace import expert_dtype

from ._sampling import Draw, next_tokens

PREFILL_OPTIONS: dict[str, str | bool] = {"xla_allow_excess_precision": False}
"""How XLA compiles programs that read prompts: numbers are rounded to their types everywhere.

Where it may leave out a rounding between two operations, bfloat16 results depend on how a prompt's
work is cut into programs.
"""

_MIN_BUCKET = 16
_LENGTHS_PER_OCTAVE = 8


class ProgramSettings(NamedTuple):
    """What a program is compiled for; calls with equal settings share one.

    Attributes:
      batch_size: Requests.
      num_tokens: Tokens of each request that are read at once, with padding; 1 in decode.
      num_positions: Places of each request in the cache.
      is_greedy: Whether the best token is taken.
      is_recording: Whether the routing is returned.
      lookahead: How far the next layers' gates are asked; None does not ask.
    """

    batch_size: int
    num_tokens: int
    num_positions: int
    is_greedy: bool
    is_recording: bool = False
    lookahead: Lookahead | None = None


class Place(NamedTuple):
    """Where every request stands between two steps.

    Attributes:
      token_ids: Newest token of each request, not read yet.
      positions: Where it belongs.
      step: Its number among the new tokens of its request, from 0.
    """

    token_ids: Int32[Array, " batch"]
    positions: Int32[Array, " batch"]
    step: Int32[Array, " batch"]


class Routed(NamedTuple):
    """Routing of the tokens that a program read, in a trace's numbering; see `Trace`."""

    experts: UInt[Array, "batch tokens layers topk"]
    routing_weights: Float[Array, "batch tokens layers topk"]
    lookahead: UInt[Array, "batch tokens layers depth width"] | None


class StepOutput(NamedTuple):
    """What a call of a decode program tells the host.

    Attributes:
      token_ids: Chosen tokens, step by step.
      logits: Scores behind the last step.
      counts: `moejax.engine.COUNTS` of every step and layer; of several devices, the layers of one
        behind those of another.
      routed: Routing of the last step, where it is recorded.
    """

    token_ids: Int32[Array, "steps batch"]
    logits: Float[Array, "batch vocab"]
    counts: Int32[Array, "steps device_layers counts"]
    routed: Routed | None


def prefill(
    model: QwenMoe,
    settings: ProgramSettings,
    experts: str,
    token_ids: Int32[Array, "batch tokens"],
    num_tokens: Int32[Array, " batch"],
    draw: Draw | None,
) -> tuple[KVCache, Place, Float[Array, "batch vocab"], Routed | None]:
    """Reads whole prompts and chooses the first token after each.

    What follows a prompt's end is padding. It is behind everything a prompt's token may look at,
    and decode overwrites its places in the cache before it looks there.

    Args:
      model: The model.
      settings: What the program is compiled for.
      experts: How the routed experts are computed.
      token_ids: Prompts, filled up on the right.
      num_tokens: Length of each, at least 1.
      draw: How to draw the tokens; None takes the best.

    Returns:
      The cache, where the requests stand, the logits behind each prompt, and the routing.
    """
    hidden, cache, routings = model.hidden_states(
        token_ids,
        prompt_positions(*token_ids.shape),
        experts=experts,
        lookahead=settings.lookahead,
    )
    return finish_prefill(model, settings, hidden, cache, routings, num_tokens, draw)


def prompt_positions(batch: int, tokens: int) -> Int32[Array, "batch tokens"]:
    """Places of prompts that all begin at 0."""
    return jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))


def finish_prefill(
    model: QwenMoe,
    settings: ProgramSettings,
    hidden: Float[Array, "batch tokens hidden"],
    cache: KVCache,
    routings: tuple[Routing, ...],
    num_tokens: Int32[Array, " batch"],
    draw: Draw | None,
) -> tuple[KVCache, Place, Float[Array, "batch vocab"], Routed | None]:
    """What follows the last layer in `prefill`.

    Args:
      model: The model.
      settings: What the program is compiled for.
      hidden: Normed hidden states of the prompts.
      cache: Their keys and values, without room for more.
      routings: Their routing in every layer that has experts.
      num_tokens: Length of each prompt.
      draw: How to draw the tokens; None takes the best.

    Returns:
      What `prefill` returns.
    """
    last = jnp.take_along_axis(hidden, (num_tokens - 1)[:, None, None], axis=1)[:, 0]
    logits = model.logits(last)
    step = jnp.zeros(settings.batch_size, jnp.int32)
    place = Place(next_tokens(logits, step, draw), num_tokens, step)
    cache = _with_room(cache, settings.num_positions)
    return cache, place, logits, routed_of(model.config, settings, routings)


def decode(
    model: QwenMoe,
    settings: ProgramSettings,
    experts: str,
    cache: KVCache,
    place: Place,
    draw: Draw | None,
) -> tuple[KVCache, Place, Routed | None]:
    """Reads the newest token of every request and chooses the next.

    Args:
      model: The model.
      settings: What the program is compiled for.
      experts: How the routed experts are computed.
      cache: What was read before.
      place: Where the requests stand.
      draw: How to draw the tokens; None takes the best.

    Returns:
      The cache, where the requests stand now, and the routing of the tokens that were read.
    """
    hidden, cache, routings = model.hidden_states(
        place.token_ids[:, None],
        place.positions[:, None],
        cache,
        experts=experts,
        lookahead=settings.lookahead,
    )
    step = place.step + 1
    token_ids = next_tokens(model.logits(hidden[:, 0]), step, draw)
    return (
        cache,
        Place(token_ids, place.positions + 1, step),
        routed_of(model.config, settings, routings),
    )


def fill_up(
    prompts: Sequence[Int32[np.ndarray, " tokens"]], length: int
) -> tuple[Int32[np.ndarray, "batch length"], Int32[np.ndarray, " batch"]]:
    """Prompts filled up on the right to one length, and how long each is."""
    token_ids = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(token_ids, prompts, strict=True):
        row[: prompt.size] = prompt
    return token_ids, np.array([prompt.size for prompt in prompts], np.int32)


def prompt_bucket(num_tokens: int) -> int:
    """Length to which prompts are filled up: a power of two, 16 at least."""
    return max(_MIN_BUCKET, 1 << (num_tokens - 1).bit_length())


def cache_bucket(num_positions: int) -> int:
    """Length of a cache with room for so many tokens: eight lengths between powers of two.

    Every step reads the whole cache, so the eighth that may be too much is a cost of time; powers
    of two would cost up to half.
    """
    unit = max(_MIN_BUCKET, prompt_bucket(num_positions) // (2 * _LENGTHS_PER_OCTAVE))
    return -(-num_positions // unit) * unit


def _with_room(cache: KVCache, num_positions: int) -> KVCache:
    """The same cache with empty places behind."""

    def lengthen(array: Array) -> Array:
        return jnp.pad(array, ((0, 0), (0, num_positions - array.shape[1]), (0, 0), (0, 0)))

    return KVCache(tuple(map(lengthen, cache.keys)), tuple(map(lengthen, cache.values)))


def routed_of(
    config: QwenMoeConfig, settings: ProgramSettings, routings: tuple[Routing, ...]
) -> Routed | None:
    """The routing of all layers as it is recorded; None where it is not."""
    if not settings.is_recording:
        return None
    lead = (settings.batch_size, settings.num_tokens, len(routings))
    dtype = expert_dtype(config.num_experts)

    def stack(arrays: list[Array]) -> Array:
        stacked = jnp.stack(arrays, axis=1)
        return stacked.reshape(*lead, *stacked.shape[2:])

    said = None
    if settings.lookahead is not None:
        numbers = stack([r.lookahead for r in routings if r.lookahead is not None])
        said = jnp.where(numbers < 0, jnp.iinfo(dtype).max, numbers).astype(dtype)
    return Routed(
        experts=stack([routing.selected_experts for routing in routings]).astype(dtype),
        routing_weights=stack([routing.routing_weights for routing in routings]),
        lookahead=said,
    )
