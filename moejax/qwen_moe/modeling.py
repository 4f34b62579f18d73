"""Qwen1.5-MoE in Flax: the reference's architecture, names and arithmetic.

Parameter paths are the published checkpoint's keys without the leading `model.`, and every matrix
keeps its published orientation [out, in], so loading transposes nothing. The one difference is
that a layer's routed experts are stacked into two arrays, of type `RoutedExperts`:

    graph, experts, rest = nnx.split(model, RoutedExperts, ...)

Reference:
  Qwen Team, "Qwen1.5-MoE: Matching 7B Model Performance with 1/3 Activated Parameters", 2024;
  `Qwen2MoeForCausalLM` of Hugging Face transformers.
"""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32

from ._blocks import MLP, Embedding, Linear, RMSNorm, normal, product, rotate
from ._config import QwenMoeConfig
from ._experts import ExpertsFunction, experts

# Above so many queries the scores of 16 heads take gigabytes at once.
_MOST_QUERIES, _QUERY_BLOCK = 2048, 512

AttentionName: TypeAlias = Literal["xla", "cudnn"]
"""How attention is computed; see `jax.nn.dot_product_attention`."""


class RoutedExperts(nnx.Param):
    """A parameter of the routed experts: what an engine may keep outside the device."""


class KVCache(NamedTuple):
    """Keys and values of what was read so far, one array a layer."""

    keys: tuple[Float[Array, "batch positions kv_heads head_dim"], ...]
    values: tuple[Float[Array, "batch positions kv_heads head_dim"], ...]


class Lookahead(NamedTuple):
    """How far ahead the next layers' gates are asked, and for how many experts."""

    depth: int
    width: int


class Routing(NamedTuple):
    """What the router of one layer decided for each token.

    Attributes:
      selected_experts: The chosen experts, best first.
      routing_weights: What each counts.
      router_logits: Scores of all experts before the softmax.
      lookahead: `lookahead[:, d - 1]` are the experts that the gate `d` layers on would choose
        if it saw this layer's input; -1 where there is no such layer. None where not asked for.
    """

    selected_experts: Int32[Array, "tokens topk"]
    routing_weights: Float[Array, "tokens topk"]
    router_logits: Float[Array, "tokens experts"]
    lookahead: Int32[Array, "tokens depth width"] | None = None


def empty_cache(
    config: QwenMoeConfig, batch_size: int, num_positions: int, dtype: DTypeLike
) -> KVCache:
    """A cache with room for `num_positions` tokens of every request."""
    shape = (batch_size, num_positions, config.num_key_value_heads, config.head_dim)
    layers = range(config.num_hidden_layers)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, dtype) for _ in layers),
    )


class Experts(nnx.Module):
    """The routed experts of one layer, stacked: what the engine takes out."""

    def __init__(self, config: QwenMoeConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        count, hidden, ffn = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = RoutedExperts(normal(rngs, (count, 2 * ffn, hidden), config, dtype))
        self.down_proj = RoutedExperts(normal(rngs, (count, hidden, ffn), config, dtype))


class SparseMoeBlock(nnx.Module):
    """Router, routed experts, and a shared expert behind a sigmoid gate."""

    def __init__(self, config: QwenMoeConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, num_shared = config.hidden_size, config.shared_expert_intermediate_size
        self.config = config
        self.gate = Linear(hidden, config.num_experts, config, dtype=dtype, rngs=rngs)
        self.experts = Experts(config, dtype=dtype, rngs=rngs)
        self.shared_expert = MLP(num_shared, config, dtype=dtype, rngs=rngs)
        self.shared_expert_gate = Linear(hidden, 1, config, dtype=dtype, rngs=rngs)

    def route(self, x: Float[Array, "tokens hidden"]) -> Routing:
        """Chooses experts: softmax over all in float32, the best k, their weights as they are.

        Only with `norm_topk_prob` are the chosen weights scaled to sum to 1.
        """
        logits = self.gate(x).astype(jnp.float32)
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, selected = jax.lax.top_k(probabilities, self.config.num_experts_per_tok)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return Routing(selected.astype(jnp.int32), weights, logits)

    def __call__(
        self, x: Float[Array, "tokens hidden"], implementation: str | ExpertsFunction
    ) -> tuple[Float[Array, "tokens hidden"], Routing]:
        """The block's answer and the routing that led to it."""
        routing = self.route(x)
        routed = experts(
            x,
            routing.selected_experts,
            routing.routing_weights,
            self.experts.gate_up_proj[...],
            self.experts.down_proj[...],
            implementation=implementation,
        )
        shared = jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return routed + shared, routing


class Attention(nnx.Module):
    """Grouped-query attention with biased projections and rotary positions."""

    def __init__(self, config: QwenMoeConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, head_dim = config.hidden_size, config.head_dim
        num_q, num_kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        bias = config.qkv_bias
        self.config = config
        self.q_proj = Linear(hidden, num_q, config, has_bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(hidden, num_kv, config, has_bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(hidden, num_kv, config, has_bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(num_q, hidden, config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens hidden"],
        positions: Int[Array, "batch tokens"],
        cached: tuple[Array, Array] | None,
        implementation: AttentionName,
    ) -> tuple[Float[Array, "batch tokens hidden"], tuple[Array, Array]]:
        """Attends to the cache, or without one to the sequence itself, and returns both.

        Args:
          x: Normed hidden states.
          positions: Place of each token in its request.
          cached: Keys and values of this layer.
          implementation: `xla`, or `cudnn` for long sequences on a GPU; see
            `jax.nn.dot_product_attention`.
        """
        batch, tokens, _ = x.shape
        heads = (batch, tokens, -1, self.config.head_dim)
        q = rotate(self.q_proj(x).reshape(heads), positions, self.config.rope_theta)
        k = rotate(self.k_proj(x).reshape(heads), positions, self.config.rope_theta)
        v = self.v_proj(x).reshape(heads)
        if cached is None:
            y = _attend_to_itself(q, k, v, implementation)
        else:
            # A place beyond the cache is dropped, never wrapped onto another token.
            at = (jnp.arange(batch)[:, None], positions)
            k, v = (
                old.at[at].set(new, mode="drop") for old, new in zip(cached, (k, v), strict=True)
            )
            y = _attend(q, k, v, implementation, mask=_sees(positions, k.shape[1]))
        return self.o_proj(y.reshape(batch, tokens, -1)), (k, v)


class DecoderLayer(nnx.Module):
    """Attention, then experts or a plain MLP, each behind a norm and added to the stream."""

    def __init__(self, config: QwenMoeConfig, number: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype=dtype)
        if number in config.moe_layers:
            self.mlp = SparseMoeBlock(config, dtype=dtype, rngs=rngs)
        else:
            self.mlp = MLP(config.intermediate_size, config, dtype=dtype, rngs=rngs)

    def attend(
        self,
        x: Float[Array, "batch tokens hidden"],
        positions: Int[Array, "batch tokens"],
        cached: tuple[Array, Array] | None = None,
        *,
        implementation: AttentionName = "xla",
    ) -> tuple[Float[Array, "batch tokens hidden"], tuple[Array, Array]]:
        """The stream after attention, and this layer's keys and values."""
        y, cached = self.self_attn(self.input_layernorm(x), positions, cached, implementation)
        return x + y, cached

    def feed_forward(
        self,
        x: Float[Array, "batch tokens hidden"],
        *,
        implementation: str | ExpertsFunction = "auto",
    ) -> tuple[Float[Array, "batch tokens hidden"], Routing | None]:
        """The stream after the experts, and their routing; None for a layer without."""
        flat = self.post_attention_layernorm(x).reshape(-1, x.shape[-1])
        if isinstance(self.mlp, SparseMoeBlock):
            y, routing = self.mlp(flat, implementation)
        else:
            y, routing = self.mlp(flat), None
        return x + y.reshape(x.shape), routing

    def foresee(
        self, x: Float[Array, "batch tokens hidden"], width: int
    ) -> Int32[Array, "tokens width"]:
        """The experts this layer's own norm and gate would choose for another layer's stream."""
        assert isinstance(self.mlp, SparseMoeBlock)
        logits = self.mlp.gate(self.post_attention_layernorm(x).reshape(-1, x.shape[-1]))
        return jax.lax.top_k(logits.astype(jnp.float32), width)[1].astype(jnp.int32)


class QwenMoe(nnx.Module):
    """The whole model: embedding, layers, norm and head.

    Args:
      config: Sizes and settings.
      rngs: Source of fresh weights; nothing but the first `params` stream is used.
      dtype: Type of the weights, and so of the activations.
    """

    def __init__(self, config: QwenMoeConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.embed_tokens = Embedding(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [
                DecoderLayer(config, number, dtype=dtype, rngs=rngs)
                for number in range(config.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            nnx.data(None)
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, config, dtype=dtype, rngs=rngs)
        )

    def hidden_states(
        self,
        token_ids: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        cache: KVCache | None = None,
        *,
        experts: str | ExpertsFunction = "auto",
        attention: AttentionName = "xla",
        lookahead: Lookahead | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden"], KVCache, tuple[Routing, ...]]:
        """Everything but the head.

        Args:
          token_ids: Tokens to read; a prompt shorter than others is padded on the right.
          positions: Place of each token in its request. A token sees what the cache holds at its
            own and earlier places, so padding is overwritten before anyone looks at it.
          cache: What was read before; None reads the sequence for itself alone.
          experts: How the routed experts are computed, see `experts`.
          attention: How attention is computed, see `jax.nn.dot_product_attention`.
          lookahead: Whether and how far the next layers' gates are asked too.

        Returns:
          Normed hidden states, the cache with the new tokens in it, and the routing of every
          layer that has experts.
        """
        x = self.embed_tokens(token_ids)
        keys, values, routings = [], [], []
        for number, layer in enumerate(self.layers):
            cached = None if cache is None else (cache.keys[number], cache.values[number])
            x, (key, value) = layer.attend(x, positions, cached, implementation=attention)
            keys.append(key)
            values.append(value)
            stream = x
            x, routing = layer.feed_forward(x, implementation=experts)
            if routing is not None:
                if lookahead is not None:
                    routing = routing._replace(lookahead=self.foresee(stream, number, lookahead))
                routings.append(routing)
        return self.norm(x), KVCache(tuple(keys), tuple(values)), tuple(routings)

    def foresee(
        self, stream: Float[Array, "batch tokens hidden"], number: int, lookahead: Lookahead
    ) -> Int32[Array, "tokens depth width"]:
        """The experts that the next layers' gates would choose for what enters this layer's.

        Args:
          stream: The residual stream that enters the experts of layer `number`.
          number: That layer, counted among all.
          lookahead: How far and how wide to ask.

        Returns:
          Experts, best first; -1 where there is no such layer.
        """
        following = [layer for layer in self.config.moe_layers if layer > number]
        num_tokens = stream.shape[0] * stream.shape[1]
        absent = jnp.full((num_tokens, lookahead.width), -1, jnp.int32)
        rows = [
            self.layers[following[step]].foresee(stream, lookahead.width)
            if step < len(following)
            else absent
            for step in range(lookahead.depth)
        ]
        return jnp.stack(rows, axis=1)

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Scores of the next token, in float32."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return product(hidden, head.weight[...], jnp.float32)

    def __call__(
        self,
        token_ids: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        cache: KVCache | None = None,
        *,
        experts: str | ExpertsFunction = "auto",
        attention: AttentionName = "xla",
        lookahead: Lookahead | None = None,
    ) -> tuple[Float[Array, "batch tokens vocab"], KVCache, tuple[Routing, ...]]:
        """Logits after every token; the arguments are those of `hidden_states`."""
        hidden, cache, routings = self.hidden_states(
            token_ids,
            positions,
            cache,
            experts=experts,
            attention=attention,
            lookahead=lookahead,
        )
        return self.logits(hidden), cache, routings


def abstract(config: QwenMoeConfig, dtype: DTypeLike) -> QwenMoe:
    """A model whose parameters have shapes and types but no values, for a loader to fill."""
    return nnx.eval_shape(lambda: QwenMoe(config, rngs=nnx.Rngs(0), dtype=dtype))


def _attend_to_itself(q: Array, k: Array, v: Array, implementation: AttentionName) -> Array:
    """Causal attention; of a long sequence some queries at a time, so that few scores exist."""
    num_tokens = q.shape[1]
    is_short = num_tokens <= _MOST_QUERIES or num_tokens % _QUERY_BLOCK
    if is_short or implementation != "xla":
        return _attend(q, k, v, implementation, is_causal=True)

    def attend_block(block):
        queries, places = block
        return _attend(queries, k, v, implementation, mask=_sees(places[None, :], num_tokens))

    blocks = q.reshape(q.shape[0], -1, _QUERY_BLOCK, *q.shape[2:]).swapaxes(0, 1)
    y = jax.lax.map(attend_block, (blocks, jnp.arange(num_tokens).reshape(-1, _QUERY_BLOCK)))
    return y.swapaxes(0, 1).reshape(q.shape)


def _attend(q: Array, k: Array, v: Array, implementation: AttentionName, **visible: Any) -> Array:
    """Attention, in float32 where float16 is no type for it: XLA has no such product on a CPU."""
    is_widened = implementation == "xla" and q.dtype == jnp.float16
    wide = [x.astype(jnp.float32) if is_widened else x for x in (q, k, v)]
    y = jax.nn.dot_product_attention(*wide, **visible, implementation=implementation)
    return y.astype(q.dtype)


def _sees(positions: Array, num_positions: int) -> Bool[Array, "batch 1 tokens positions"]:
    """A query sees the places up to its own."""
    places = jnp.arange(num_positions)
    return places[None, None, None, :] <= positions[:, None, :, None]
