"""What an engine is measured with: a model, its experts outside of it, and what its steps read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.devices import ONE_DEVICE, Team
from moejax.engine import DenseModel, OffloadEngine, prepare_model, spread_model
from moejax.offload import ExpertLayout, ExpertStore, Scope, SlotPlan, random_store
from moejax.qwen_moe import QwenMoe, QwenMoeConfig, RoutedExperts, abstract
from moejax.simulate import PrefetchSchedule
from moejax.strategies import Strategy

_SPREAD = 0.02
"""Of random weights, as published models are initialised."""


@dataclass(frozen=True, eq=False)
class Rig:
    """A model ready to be measured with any slots and strategy.

    Attributes:
      name: Of the model.
      model: The model, its routed experts taken out; for kernels, what `prepare_model` makes of
        it, so that all engines share one copy.
      store: Those experts.
      kernels: Of the engine: `auto`, `pallas`, `interpret` or `xla`.
      layers_per_copy: Of the engine: how many layers hide the copy of one expert; None leaves it
        to the engine.
      has_random_weights: Whether no checkpoint was read.
    """

    name: str
    model: QwenMoe | DenseModel
    store: ExpertStore
    kernels: str = "auto"
    layers_per_copy: int | None = None
    has_random_weights: bool = False

    @property
    def config(self) -> QwenMoeConfig:
        """Sizes and settings of the model."""
        return self.model.config

    @property
    def num_layers(self) -> int:
        """Layers that have routed experts."""
        return self.store.num_layers

    def even_plan(self, slots: int, scope: Scope) -> SlotPlan:
        """So many slots a layer, or as many in all in a pool."""
        of_layers = (slots,) * self.num_layers
        return SlotPlan(scope, of_layers if scope == "layer" else (sum(of_layers),))

    def engine(self, plan: SlotPlan, strategy: Strategy) -> OffloadEngine:
        """An engine with these slots."""
        options = {}
        if self.layers_per_copy is not None:
            options["layers_per_copy"] = self.layers_per_copy
        return OffloadEngine(
            self.model, self.store, plan, strategy, kernels=self.kernels, **options
        )


class StepSizes(NamedTuple):
    """Bytes that decode steps read and fetch.

    Attributes:
      dense_bytes: Every weight but the routed experts; an embedding counts only where it is the
        head as well, since a step reads no more than one row of it for each request.
      position_bytes: Keys and values of one position in all layers.
      expert_bytes: One routed expert.
      row_bytes: One row of a packed expert.
    """

    dense_bytes: int
    position_bytes: int
    expert_bytes: int
    row_bytes: int


def step_sizes(rig: Rig) -> StepSizes:
    """The sizes of a rig's model."""
    config, layout = rig.config, rig.store.layout
    width = jnp.dtype(layout.dtype).itemsize
    shapes = nnx.state(abstract(config, layout.dtype), nnx.Not(RoutedExperts))
    num_dense = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    if not config.tie_word_embeddings:
        num_dense -= config.vocab_size * config.hidden_size
    num_cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return StepSizes(num_dense * width, num_cached * width, layout.expert_bytes, layout.row_bytes)


def prefetch_schedule(engine: OffloadEngine) -> PrefetchSchedule | None:
    """The engine's prefetch as the simulator takes it; None if it prefetches nothing."""
    sizes = engine.sizes
    if sizes.schedule is None:
        return None
    return PrefetchSchedule(
        layers_per_copy=sizes.schedule.layers_per_copy,
        depth=sizes.shape.depth,
        num_rows=sizes.num_rows,
        rows_per_event=sizes.schedule.rows_per_event,
        rows_before_demand=sizes.schedule.rows_before_experts,
    )


def random_rig(
    config: QwenMoeConfig,
    *,
    name: str,
    dtype: str | None = None,
    kernels: str = "auto",
    team: Team = ONE_DEVICE,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rig:
    """A rig of random weights, drawn where they stay: speed needs no checkpoint.

    Args:
      config: Shape of the model.
      name: What it is called.
      dtype: Type of the weights; the config's by default.
      kernels: Of the engine.
      team: The devices that share the experts; the weights do not depend on them.
      seed: Seed of the weights.
      on_progress: Told the bytes done and the bytes to do of the experts, after every layer.

    Raises:
      BackendError: Host memory cannot hold the experts.
    """
    dtype = dtype or config.dtype
    layout = ExpertLayout(
        config.num_experts, config.hidden_size, config.moe_intermediate_size, dtype
    )
    num_layers = len(config.moe_layers)
    store = random_store(layout, num_layers, seed, team=team, on_progress=on_progress)
    model = spread_model(prepare_model(_random_model(config, dtype, seed), kernels), team)
    return Rig(name, model, store, kernels, has_random_weights=True)


def _random_model(config: QwenMoeConfig, dtype: str, seed: int) -> QwenMoe:
    """Norms are ones and routed experts take no room."""
    graph, shapes = nnx.split(abstract(config, jnp.dtype(dtype)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(
        shapes, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def draw(key: jax.Array, path: tuple, param: nnx.Variable) -> nnx.Variable:
        shape = param.get_value().shape
        if isinstance(param, RoutedExperts):
            return param.replace(jnp.zeros((0, *shape[1:]), dtype))
        if "norm" in jax.tree_util.keystr(path):
            return param.replace(jnp.ones(shape, dtype))
        return param.replace(_draw(key, shape, dtype))

    drawn = [draw(key, path, param) for key, (path, param) in zip(keys, leaves, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, drawn))


def _draw(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return _SPREAD * jax.random.normal(key, shape, jnp.dtype(dtype))
