"""Slots filled from the prompts, so that the texts behind them do not begin with misses only.

Decode begins as if the last tokens of the prompts had been decoded one by one, from empty slots
and without prefetching: the counts of every step after are those of that replay. The experts of
a layer are found and copied while all of the layer's are on the device; what else the strategy
would have learned follows when the routing of every layer is known.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from moejax.devices import ONE_DEVICE, Team
from moejax.qwen_moe import Routing
from moejax.strategies import Strategy, keep_best

from ._directory import NOWHERE
from ._event import Sizes, Tables, demand_row, read_access, remember
from ._expert_cache import ExpertCache, booleans
from ._programs import ProgramSettings
from ._share import own_numbers

WARM_STEPS = 32
"""Tokens of each prompt that count, at most."""


class WarmUp:
    """The programs that fill slots, compiled once for each batch and length of prompts.

    Args:
      strategy: What decides which experts stay; it must not read the future.
      sizes: What the programs are compiled for; every layer must have slots of its own.
      team: The devices whose slots are filled.

    Attributes:
      num_compiles: How often each kind of program was traced and compiled.
    """

    def __init__(self, strategy: Strategy, sizes: Sizes, team: Team = ONE_DEVICE):
        self.num_compiles = {"fill": 0, "learn": 0}
        self._strategy, self._sizes, self._team = strategy, sizes, team
        self._compiled: dict[tuple[int, int], tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def prepare(
        self, settings: ProgramSettings, cache: ExpertCache, packed: jax.ShapeDtypeStruct
    ) -> None:
        """Compiles what prompts of these settings need and is not there yet.

        Args:
          settings: Shapes of the prompts.
          cache: Of the model, in shapes and where they lie.
          packed: One layer's experts, likewise.
        """
        key = (settings.batch_size, settings.num_tokens)
        if key in self._compiled:
            return
        shape = self._sizes.shape
        num_tokens = jax.ShapeDtypeStruct((settings.batch_size,), jnp.int32)
        selected = jax.ShapeDtypeStruct(
            (settings.batch_size * settings.num_tokens, shape.topk), jnp.int32
        )
        layer = jax.ShapeDtypeStruct((), jnp.int32)
        prompt = self._team.shapes((selected, num_tokens, layer), Team.ALIKE)
        own, alike = Team.OWN, Team.ALIKE
        fill, fill_output = self._compile(
            "fill", _fill, 0, (own, own, own, alike, alike, alike), own, *cache, packed, *prompt
        )
        layers = [self._team.shapes(fill_output[1], own)] * shape.num_layers
        learn, _ = self._compile(
            "learn", _learn, (), (own, own, alike), own, cache.tables, layers, prompt[1]
        )
        self._compiled[key] = fill, learn

    def begin(
        self,
        settings: ProgramSettings,
        cache: ExpertCache,
        num_tokens: Int32[np.ndarray, " batch"],
    ) -> "Filling":
        """Starts with empty slots, which are used up."""
        return Filling(*self._compiled[settings.batch_size, settings.num_tokens], cache, num_tokens)

    def _compile(
        self,
        name: str,
        function: Callable[..., Any],
        donated: Any,
        in_specs: Any,
        out_specs: Any,
        *arguments: Any,
    ) -> tuple[Callable[..., Any], Any]:
        """The compiled function and the shapes of what it gives."""

        def program(*arguments):
            self.num_compiles[name] += 1
            return function(self._strategy, self._sizes, *arguments)

        program = self._team.run(program, in_specs, out_specs)
        lowered = jax.jit(program, donate_argnums=donated).lower(*arguments)
        return lowered.compile(), lowered.out_info


class Filling:
    """Slots that are being filled; `on_layer` is what `StreamedPrefill` calls."""

    def __init__(
        self,
        fill: Callable[..., Any],
        learn: Callable[..., Any],
        cache: ExpertCache,
        num_tokens: Int32[np.ndarray, " batch"],
    ):
        self._fill, self._learn, self._num_tokens = fill, learn, num_tokens
        self._slots, self._tables = cache
        self._layers: list[_Layer] = []

    def on_layer(self, moe_layer: int, packed: Array, routing: Routing) -> Array:
        """Copies a layer's experts into its slots; the next call uses up what this one returns."""
        self._slots, found = self._fill(
            self._slots,
            self._tables,
            packed,
            routing.selected_experts,
            self._num_tokens,
            np.int32(moe_layer),
        )
        self._layers.append(found)
        return self._slots

    def finish(self) -> ExpertCache:
        """The cache, when every layer was shown."""
        tables = self._learn(self._tables, self._layers, self._num_tokens)
        return ExpertCache(self._slots, tables)


class _Layer(NamedTuple):
    """What one layer's last tokens came to.

    Attributes:
      demand: Requests that demand each expert, step by step.
      is_kept: The experts in slots after each step.
      score: What the strategy gave them in the last step.
    """

    demand: Int32[Array, "*layers steps experts"]
    is_kept: Bool[Array, "*layers steps experts"]
    score: Float[Array, "*layers experts"]


def _fill(
    strategy: Strategy,
    sizes: Sizes,
    slots: Float[Array, "slots rows hidden"],
    tables: Tables,
    packed: Float[Array, "experts rows hidden"],
    selected: Int32[Array, "tokens topk"],
    num_tokens: Int32[Array, " batch"],
    layer: Int32[Array, ""],
) -> tuple[Float[Array, "slots rows hidden"], _Layer]:
    """Finds what one layer keeps, and copies that into its slots."""
    found = _rehearse(strategy, sizes, tables, selected, num_tokens, layer)
    is_kept, first = found.is_kept[-1], tables.first_slot[layer]
    order = jnp.argsort(~is_kept, stable=True)

    def copy(turn, slots):
        expert = jax.lax.dynamic_index_in_dim(packed, order[turn], keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(slots, expert, first + turn, 0)

    return jax.lax.fori_loop(0, is_kept.sum(dtype=jnp.int32), copy, slots), found


def _rehearse(
    strategy: Strategy,
    sizes: Sizes,
    tables: Tables,
    selected: Int32[Array, "tokens topk"],
    num_tokens: Int32[Array, " batch"],
    layer: Int32[Array, ""],
) -> _Layer:
    """Goes through the steps of one layer.

    No strategy scores a layer's experts by what other layers demand, so nothing demands there.
    """
    demands = _last_demand(sizes, own_numbers(sizes, tables, selected), num_tokens)

    def step(carry, now):
        state, is_kept, _ = carry
        number, demand = now
        seen = tables._replace(step=number[None])
        access = read_access(sizes, seen, None, layer, demand, is_kept, None)
        new, decision = strategy.step(state, access, None)
        candidates = is_kept | (demand > 0)
        if decision.admit is not None:
            candidates &= decision.admit
        score = decision.keep_score.astype(jnp.float32)
        kept = keep_best(score, candidates, access.capacity)
        carry = _if_real(number, (new, kept, score), carry)
        return carry, carry[1]

    state = jax.tree.map(lambda leaf: leaf[layer], _states(strategy, sizes, tables))
    start = (state, jnp.zeros(sizes.num_padded, bool), tables.score[layer])
    numbers = _numbers(len(demands), num_tokens)
    (_, _, score), is_kept = jax.lax.scan(step, start, (numbers, demands))
    return _Layer(demands, is_kept, score)


def _learn(
    strategy: Strategy,
    sizes: Sizes,
    tables: Tables,
    layers: list[_Layer],
    num_tokens: Int32[Array, " batch"],
) -> Tables:
    """The directory after the last step, from what each layer found."""
    found: _Layer = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    demands, kept = found.demand.swapaxes(0, 1), found.is_kept.swapaxes(0, 1)
    index = jnp.arange(len(layers), dtype=jnp.int32)

    def step(carry, now):
        tables, state = carry
        number, demand, resident = now
        rows = demand_row(sizes, tables, index)
        new = tables._replace(
            demand=tables.demand.at[rows].set(demand), resident=resident.astype(jnp.int32)
        )
        one = partial(remember, strategy, sizes, new, None)
        learned = jax.vmap(one)(index, state)
        carry = _if_real(number, (new._replace(step=new.step + 1), learned), carry)
        return carry, None

    before = jnp.concatenate([jnp.zeros_like(kept[:1]), kept[:-1]])
    steps = (_numbers(len(demands), num_tokens), demands, before)
    (new, state), _ = jax.lax.scan(step, (tables, _states(strategy, sizes, tables)), steps)
    slot = tables.first_slot[:, None] + jnp.cumsum(kept[-1], axis=1, dtype=jnp.int32) - 1
    return new._replace(
        slot_of=tables.slot_of.at[index].set(jnp.where(kept[-1], slot, NOWHERE)),
        score=tables.score.at[index].set(found.score),
        state=jax.tree.map(lambda leaf, new: new.astype(leaf.dtype), tables.state, state),
    )


def _if_real(number: Int[Array, ""], new: Any, old: Any) -> Any:
    """Nothing happens in a step before the longest prompt begins; its number is below 0."""

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(number >= 0, new.astype(old.dtype), old)

    return jax.tree.map(choose, new, old)


def _last_demand(
    sizes: Sizes, selected: Int32[Array, "tokens topk"], num_tokens: Int32[Array, " batch"]
) -> Int32[Array, "steps experts"]:
    """How many requests demand each expert, the last tokens of all in the last step."""
    batch = len(num_tokens)
    by_request = selected.reshape(batch, -1, selected.shape[-1])
    num_steps = min(WARM_STEPS, by_request.shape[1])
    at = num_tokens[:, None] - num_steps + jnp.arange(num_steps)[None, :]
    ids = jnp.take_along_axis(by_request, jnp.maximum(at, 0)[..., None], axis=1)
    ids = jnp.where(at[..., None] >= 0, ids, sizes.num_padded)
    return jax.nn.one_hot(ids, sizes.num_padded, dtype=jnp.int32).sum((0, 2), dtype=jnp.int32)


def _numbers(num_steps: int, num_tokens: Int32[Array, " batch"]) -> Int32[Array, " steps"]:
    """Numbers of the steps; below 0 before the longest prompt begins."""
    first = jnp.minimum(num_tokens.max(), num_steps) - num_steps
    return first.astype(jnp.int32) + jnp.arange(num_steps, dtype=jnp.int32)


def _states(strategy: Strategy, sizes: Sizes, tables: Tables) -> Any:
    """The strategy's states as it knows them, with booleans."""

    def restore(leaf: Array, is_bool: bool) -> Array:
        return leaf != 0 if is_bool else leaf

    return jax.tree.map(restore, tables.state, booleans(strategy, sizes))
