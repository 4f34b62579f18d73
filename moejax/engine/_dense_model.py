"""The weights that are always on the device, as the programs of an offloaded model take them.

Kernels read them stacked over layers, and a streamed prompt layer by layer. So that they are
there once, a prompt's layers are cut out of the stack, each only while it computes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from moejax.devices import Team
from moejax.errors import UsageError
from moejax.qwen_moe import QwenMoe, QwenMoeConfig, RoutedExperts, abstract

from .kernels._dense_weights import DenseWeights, pack_dense, supports, take_layer

KERNELS = ("auto", "pallas", "xla", "interpret")
"""How a step runs: GPU kernels, plain JAX, or the kernels interpreted; `auto` chooses."""

Params: TypeAlias = dict[str, Any]
"""Parameters, or their shapes, by their paths in a module."""

_GATE = ("post_attention_layernorm.weight", "mlp.gate.weight")


class DenseModel(NamedTuple):
    """A model made ready for the kernels: all its weights but the routed experts, stacked.

    Attributes:
      config: Sizes and settings of the model.
      weights: The weights.
    """

    config: QwenMoeConfig
    weights: DenseWeights


def choose_kernels(kernels: str, model: QwenMoe | DenseModel) -> str:
    """One of `pallas`, `xla` and `interpret`: what was asked for, if it can be.

    Raises:
      UsageError: The kernels are not known, or cannot run this model here.
    """
    if kernels not in KERNELS:
        raise UsageError(f"kernels {kernels!r} are not known", f"Known: {', '.join(KERNELS)}.")
    has_gpu, reason = jax.default_backend() == "gpu", supports(model.config)
    if kernels == "auto":
        kernels = "pallas" if has_gpu and reason is None else "xla"
    if kernels == "xla" and isinstance(model, DenseModel):
        raise UsageError(
            "the model was prepared for kernels and is to run without them",
            "Run it with the kernels that it was prepared for, or give the model as it was loaded.",
        )
    if kernels != "xla" and reason is not None:
        raise UsageError(f"the kernels cannot run this model: {reason}", "Use the kernels xla.")
    if kernels == "pallas" and not has_gpu:
        raise UsageError("the kernels need a GPU and there is none", "Use the kernels xla.")
    return kernels


def prepare_model(model: QwenMoe, kernels: str = "auto") -> QwenMoe | DenseModel:
    """Brings a model's weights into the form that engines with these kernels share.

    Args:
      model: The model. Where kernels run it is used up: it can compute nothing afterwards.
      kernels: One of `KERNELS`.

    Returns:
      The weights stacked for the kernels, or without them the model itself.

    Raises:
      UsageError: The kernels are not known, or cannot run this model here.
    """
    if choose_kernels(kernels, model) == "xla":
        return model
    return DenseModel(model.config, pack_dense(model, is_consumed=True))


def spread_model(model: QwenMoe | DenseModel, team: Team) -> QwenMoe | DenseModel:
    """The model with a copy of its weights on every device; it comes back as it is if it has."""
    if team.mesh is None:
        return model
    if isinstance(model, DenseModel):
        return model._replace(weights=team.place(model.weights, Team.ALIKE))
    graph, state = nnx.split(model)
    return nnx.merge(graph, team.place(state, Team.ALIKE))


class Outline(NamedTuple):
    """A module without its parameters."""

    graph: Any
    tree: Any
    paths: tuple[str, ...]

    def merge(self, params: Mapping[str, Array]) -> Any:
        """The module with these parameters; those that are not given have size zero."""
        leaves = [params.get(path, jnp.zeros(0)) for path in self.paths]
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


class Layer(NamedTuple):
    """One layer of a model whose weights may lie elsewhere.

    Attributes:
      outline: The layer without them.
      shapes: Of the parameters.
      take: Gives the parameters; they are copies that should not be kept where they are stacked.
      take_gate: Gives those that `DecoderLayer.foresee` needs.
    """

    outline: Outline
    shapes: Params
    take: Callable[[], Params]
    take_gate: Callable[[], Params]

    @property
    def gate_shapes(self) -> Params:
        """Shapes of what `take_gate` gives."""
        return _pick(self.shapes)


class Parts(NamedTuple):
    """A model taken apart.

    Attributes:
      outer: The model without parameters.
      outer_params: Parameters of all that is no layer.
      layers: The layers.
    """

    outer: Outline
    outer_params: Params
    layers: tuple[Layer, ...]


def take_apart(model: QwenMoe | DenseModel) -> Parts:
    """The model in parts, without the routed experts; no weight is copied."""
    return _parts_of_stack(model) if isinstance(model, DenseModel) else _parts_of_model(model)


def _parts_of_model(model: QwenMoe) -> Parts:
    def part(module: nnx.Module) -> Layer:
        outline, params = _outline(module)
        shapes = {path: _shape(param) for path, param in params.items()}
        return Layer(outline, shapes, lambda: params, lambda: _pick(params))

    outer, params = _outline(model)
    return Parts(outer, _without_layers(params), tuple(part(layer) for layer in model.layers))


def _parts_of_stack(model: DenseModel) -> Parts:
    config, weights = model
    shell = abstract(config, weights.embedding.dtype)
    outline, shapes = _outline(shell.layers[0])
    first = np.int32(0)
    cut = jax.jit(partial(take_layer, config, shapes)).lower(weights.layers, first).compile()
    cut_gate = jax.jit(partial(take_layer, config, _pick(shapes)))

    def part(number: int) -> Layer:
        at = np.int32(number)
        return Layer(
            outline, shapes, lambda: cut(weights.layers, at), lambda: cut_gate(weights.layers, at)
        )

    outer, params = _outline(shell)
    ours = {
        "embed_tokens.weight": weights.embedding,
        "norm.weight": weights.final_norm,
        "lm_head.weight": weights.head,
    }
    outer_params = {path: ours[path] for path in _without_layers(params)}
    return Parts(outer, outer_params, tuple(map(part, range(config.num_hidden_layers))))


def _outline(module: nnx.Module) -> tuple[Outline, Params]:
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    found, _ = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    paths = tuple(".".join(str(key.key) for key in path) for path, _ in found)
    params = {
        path: leaf
        for path, (_, param), leaf in zip(paths, found, leaves, strict=True)
        if not isinstance(param, RoutedExperts)
    }
    return Outline(graph, tree, paths), params


def _without_layers(params: Params) -> Params:
    return {path: param for path, param in params.items() if not path.startswith("layers.")}


def _pick(params: Params) -> Params:
    """What `foresee` needs; nothing of a layer without experts."""
    return {path: params[path] for path in _GATE if path in params}


def _shape(param: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(param.shape, param.dtype)
