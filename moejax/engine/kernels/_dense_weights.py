"""The weights that every step reads, stacked over layers as the kernels want them."""

import math
from collections.abc import Mapping
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from moejax.errors import UsageError
from moejax.qwen_moe import QwenMoe, QwenMoeConfig
from moejax.qwen_moe.modeling import DecoderLayer

from ._parts import next_power_of_2

NUM_GATE_ROWS = 16
"""Rows behind the router's: the shared expert's gate and 15 of zeros."""

# Tiles of the tensor cores have sides of at least so many.
_SIDE = 16
# Kernels count elements from an array's start in 32 bits.
_MAX_ELEMENTS = 2**31 - 1
_HINT = "Use the kernels `xla`: they run every model."


class DenseLayers(NamedTuple):
    """Weights of all layers, each matrix row-major [out, in].

    Attributes:
      input_norm: Weight of the norm before attention.
      qkv: Projections to queries, keys and values, one below the other.
      qkv_bias: Their bias; zeros where the model has none.
      output: Projection of what the heads gathered.
      post_norm: Weight of the norm before the experts.
      router: A row for each expert, zeros up to `padded_experts`, the shared expert's gate, and
        zeros again.
      shared_gate_up: Gate and up projection of the shared expert, one below the other.
      shared_down: Its down projection.
    """

    input_norm: Float[Array, "layers hidden"]
    qkv: Float[Array, "layers qkv hidden"]
    qkv_bias: Float[Array, "layers qkv"]
    output: Float[Array, "layers hidden queries"]
    post_norm: Float[Array, "layers hidden"]
    router: Float[Array, "layers logits hidden"]
    shared_gate_up: Float[Array, "layers two_ffn hidden"]
    shared_down: Float[Array, "layers hidden ffn"]


class DenseWeights(NamedTuple):
    """All weights but the routed experts; `head` is `embedding` itself where they are tied."""

    layers: DenseLayers
    embedding: Float[Array, "vocab hidden"]
    final_norm: Float[Array, " hidden"]
    head: Float[Array, "vocab hidden"]


def padded_experts(num_experts: int) -> int:
    """Rows of the router: a power of two that is not below the experts, 16 at least."""
    return max(_SIDE, next_power_of_2(num_experts))


def supports(config: QwenMoeConfig) -> str | None:
    """Why the kernels cannot run a model of such sizes; None if they can."""
    if len(config.moe_layers) < config.num_hidden_layers:
        missing = sorted(set(range(config.num_hidden_layers)) - set(config.moe_layers))
        return f"layer {missing[0]} has no routed experts"
    widths = {
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
    }
    for name, width in widths.items():
        if width < _SIDE or width % _SIDE:
            return f"{name} {width} is not a multiple of {_SIDE}"
    head_dim = config.head_dim
    if head_dim < _SIDE or head_dim != next_power_of_2(head_dim):
        return f"head_dim {head_dim} is not a power of two of at least {_SIDE}"
    if config.vocab_size < _SIDE:
        return f"vocab_size {config.vocab_size} is below {_SIDE}"
    name, count = max(_element_counts(config).items(), key=lambda item: item[1])
    if count > _MAX_ELEMENTS:
        return f"{name} would have {count} elements, more than 32 bits count"
    return None


def pack_dense(model: QwenMoe, *, is_consumed: bool = False) -> DenseWeights:
    """Stacks the weights of a model, whose routed experts are not looked at.

    One kind of parameter is stacked after the other, in place, so that at no time more is
    allocated than the model, the packed weights and one parameter of one layer.

    Args:
      model: The model.
      is_consumed: Whether the layers lose each kind of parameter as soon as it is packed, so that
        no more than one kind is ever there twice. The model can compute nothing afterwards.

    Raises:
      UsageError: The kernels cannot run this model.
    """
    reason = supports(model.config)
    if reason is not None:
        raise UsageError(f"the kernels cannot run this model: {reason}", _HINT)
    places, layers = _places(model.config), list(model.layers)
    packed = {name: _stack(layers, *places[name], is_consumed) for name in DenseLayers._fields}
    embedding = model.embed_tokens.weight[...]
    head = embedding if model.lm_head is None else model.lm_head.weight[...]
    return DenseWeights(DenseLayers(**packed), embedding, model.norm.weight[...], head)


def take_layer(
    config: QwenMoeConfig,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    layers: DenseLayers,
    number: Int32[Array, ""],
) -> dict[str, Array]:
    """Cuts one layer's parameters out of the stack again.

    Args:
      config: Sizes of the model.
      shapes: Of those that are wanted, by their paths in `DecoderLayer`.
      layers: The stack.
      number: Which layer.
    """
    taken = {}
    for name, (_, rows) in _places(config).items():
        for path, row in rows.items():
            if path in shapes:
                stack = getattr(layers, name)
                start = (number, jnp.int32(row), *[jnp.int32(0)] * (stack.ndim - 2))
                sizes = (1, *shapes[path].shape)
                taken[path] = jax.lax.dynamic_slice(stack, start, sizes)[0]
    return taken


def _places(config: QwenMoeConfig) -> dict[str, tuple[tuple[int, ...], dict[str, int]]]:
    """Of each stacked array: the shape in one layer, and the first row of what goes into it."""
    hidden, num_ffn = config.hidden_size, config.shared_expert_intermediate_size
    num_kv = config.num_key_value_heads * config.head_dim
    num_experts = padded_experts(config.num_experts)
    rows = {"q_proj": 0, "k_proj": hidden, "v_proj": hidden + num_kv}
    num_qkv = hidden + 2 * num_kv
    return {
        "input_norm": ((hidden,), {"input_layernorm.weight": 0}),
        "qkv": (
            (num_qkv, hidden),
            {f"self_attn.{name}.weight": row for name, row in rows.items()},
        ),
        "qkv_bias": ((num_qkv,), {f"self_attn.{name}.bias": row for name, row in rows.items()}),
        "output": ((hidden, hidden), {"self_attn.o_proj.weight": 0}),
        "post_norm": ((hidden,), {"post_attention_layernorm.weight": 0}),
        "router": (
            (num_experts + NUM_GATE_ROWS, hidden),
            {"mlp.gate.weight": 0, "mlp.shared_expert_gate.weight": num_experts},
        ),
        "shared_gate_up": (
            (2 * num_ffn, hidden),
            {
                "mlp.shared_expert.gate_proj.weight": 0,
                "mlp.shared_expert.up_proj.weight": num_ffn,
            },
        ),
        "shared_down": ((hidden, num_ffn), {"mlp.shared_expert.down_proj.weight": 0}),
    }


def _stack(
    layers: list[DecoderLayer], shape: tuple[int, ...], rows: dict[str, int], is_consumed: bool
) -> Array:
    """One kind of parameter of all layers; zeros where a layer has none, as of a bias."""
    dtype = attrgetter("input_layernorm.weight")(layers[0]).dtype
    packed = jnp.zeros((len(layers), *shape), dtype)
    for number, layer in enumerate(layers):
        for path, row in rows.items():
            place, _, name = path.rpartition(".")
            owner = attrgetter(place)(layer)
            param = getattr(owner, name)
            if param is None:
                continue
            packed = _put(packed, param[...], jnp.int32(number), jnp.int32(row))
            if is_consumed:
                setattr(owner, name, nnx.Param(jnp.zeros(0, dtype)))
    return packed


@partial(jax.jit, donate_argnums=0)
def _put(whole: Array, part: Array, layer: Array, row: Array) -> Array:
    """Writes one layer's parameter into its place without a copy of the whole."""
    at = (layer, row, *[jnp.int32(0)] * (whole.ndim - 2))
    return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype)[None], at)


def _element_counts(config: QwenMoeConfig) -> dict[str, int]:
    """Elements of each array that a kernel reads as a whole."""
    counts = {
        name: config.num_hidden_layers * math.prod(shape)
        for name, (shape, _) in _places(config).items()
    }
    return {**counts, "head": config.vocab_size * config.hidden_size}
