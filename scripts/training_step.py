"""One training step of a QwenMoe as pure arrays: layers in a scan, experts in buckets.

The layers are the package's own `DecoderLayer`s. Their weights are stacked, so that a model of 24
layers compiles like a model of one, and a layer is computed again in the backward pass instead of
being remembered. Master weights are float32; the computation is in bfloat16 except for the router,
the softmax and the loss.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray
from training_experts import TABLES, bucket_rows, bucketed

from moejax.errors import UsageError
from moejax.qwen_moe import QwenMoe, QwenMoeConfig, abstract
from moejax.qwen_moe.modeling import AttentionName

Weights = dict[str, Array]
"""Weights by checkpoint name, without a layer's number: those of the layers are stacked."""

LAYERS = "layers."
COMPUTE_DTYPE = jnp.bfloat16
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0

# Logits of this many tokens are held at once: 16k words of vocabulary make 0.5 GB in float32.
_LOSS_CHUNK_TOKENS = 8192
_ROUTER = "mlp.gate.weight"


class TrainState(NamedTuple):
    """What a step changes."""

    weights: Weights
    optimizer: optax.OptState


class StepMetrics(NamedTuple):
    """What a step tells.

    Attributes:
      loss: Cross-entropy of the next token, in nats.
      balance_ratio: Load-balancing loss over its least value, mean of layers; 1 is even.
      dropped_ratio: Share of (token, expert) pairs that found their bucket full.
      gradient_norm: Before clipping.
      is_skipped: Whether the gradient was not finite, and the step changed nothing.
    """

    loss: Float[Array, ""]
    balance_ratio: Float[Array, ""]
    dropped_ratio: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    is_skipped: Float[Array, ""]


def init_weights(config: QwenMoeConfig, key: PRNGKeyArray) -> Weights:
    """Fresh weights: normal, and smaller by the root of their number where layers add up.

    Reference:
      Radford et al., "Language models are unsupervised multitask learners", 2019, section 2.3.
    """
    shapes = _weight_shapes(config)

    def draw(name: str, key: PRNGKeyArray) -> Array:
        shape = shapes[name]
        if name.endswith("norm.weight"):
            return jnp.ones(shape)
        if name.endswith(".bias"):
            return jnp.zeros(shape)
        is_added = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
        scale = (2 * config.num_hidden_layers) ** -0.5 if is_added else 1.0
        return scale * config.initializer_range * jax.random.normal(key, shape)

    keys = jax.random.split(key, len(shapes))
    return {name: draw(name, key) for name, key in zip(sorted(shapes), keys, strict=True)}


def init_state(config: QwenMoeConfig, key: PRNGKeyArray) -> TrainState:
    """The state before the first step; `key` is consumed."""
    weights = init_weights(config, key)
    return TrainState(weights, _optimizer().init(weights))


@cache
def make_step(
    config: QwenMoeConfig, *, sequence_length: int, capacity_ratio: float, attention: AttentionName
) -> Callable[[TrainState, Array, Array, Array], tuple[TrainState, StepMetrics]]:
    """Makes the jitted step `(state, corpus, starts, learning_rate) -> (state, metrics)`.

    The state is donated. `corpus` holds all tokens, on the device; `starts` says where in it the
    windows of this batch begin, each of `sequence_length` tokens and one more to predict.
    """
    optimizer = _optimizer()

    @partial(jax.jit, donate_argnums=0)
    def step(state, corpus, starts, learning_rate):
        tokens = corpus[starts[:, None] + jnp.arange(sequence_length + 1)[None, :]]
        losses = partial(_losses, config=config, capacity_ratio=capacity_ratio, attention=attention)
        gradients, metrics = jax.grad(losses, has_aux=True)(state.weights, tokens.astype(jnp.int32))
        norm = sum(jnp.vdot(one, one) for one in jax.tree.leaves(gradients)) ** 0.5
        is_sound = jnp.isfinite(norm)
        shrink = jnp.minimum(1.0, MAX_GRADIENT_NORM / norm)
        gradients = jax.tree.map(lambda gradient: shrink * gradient, gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.weights)
        weights = jax.tree.map(lambda w, u: w - learning_rate * u, state.weights, updates)
        new = TrainState(weights, optimizer_state)
        new = jax.tree.map(lambda new, old: jnp.where(is_sound, new, old), new, state)
        loss, balance, dropped = metrics
        metrics = StepMetrics(loss, balance, dropped, norm, 1.0 - is_sound)
        return new, metrics

    return step


@cache
def make_evaluation(
    config: QwenMoeConfig, *, attention: AttentionName
) -> Callable[[Weights, Array], Float[Array, "batch tokens"]]:
    """Makes the jitted function from windows to the loss of each next token; nothing is dropped."""

    @jax.jit
    def evaluate(weights, tokens):
        hidden, _, _ = _hidden_states(
            weights, tokens[:, :-1], config, experts="scan", attention=attention
        )
        labels = tokens[:, 1:].reshape(-1)
        return token_losses(_flat(hidden), weights["lm_head.weight"], labels).reshape(
            tokens[:, 1:].shape
        )

    return evaluate


def to_model(config: QwenMoeConfig, weights: Weights, dtype: DTypeLike = jnp.bfloat16) -> QwenMoe:
    """The package's model with these weights."""
    graph, state = nnx.split(abstract(config, dtype))

    def find(name: str) -> Array:
        if not name.startswith(LAYERS):
            return weights[name]
        number, rest = name.removeprefix(LAYERS).split(".", 1)
        return weights[LAYERS + rest][int(number)]

    filled = {name: find(name).astype(dtype) for name in _variables(state)}
    return nnx.merge(graph, _fill(state, filled))


def from_model(model: QwenMoe) -> Weights:
    """The weights of a model, those of its layers stacked; the other way round of `to_model`."""
    found = {name: v.get_value() for name, v in _variables(nnx.split(model)[1]).items()}
    stacked = {}
    for name in _weight_shapes(model.config):
        if name.startswith(LAYERS):
            rest = name.removeprefix(LAYERS)
            layers = range(model.config.num_hidden_layers)
            stacked[name] = jnp.stack([found[f"{LAYERS}{layer}.{rest}"] for layer in layers])
        else:
            stacked[name] = found[name]
    return {name: weight.astype(jnp.float32) for name, weight in stacked.items()}


def token_losses(
    hidden: Float[Array, "tokens hidden"],
    head: Float[Array, "vocab hidden"],
    labels: Int[Array, " tokens"],
) -> Float[Array, " tokens"]:
    """Cross-entropy of each token, some tokens at a time, so that few logits exist at once."""
    num_tokens = hidden.shape[0]
    chunk = next(
        n for n in range(min(num_tokens, _LOSS_CHUNK_TOKENS), 0, -1) if num_tokens % n == 0
    )
    return _token_losses(hidden, head, labels, chunk)


def choose_attention(config: QwenMoeConfig, sequence_length: int) -> tuple[AttentionName, str]:
    """The attention that works here, and what was found wrong with the better one."""
    if jax.default_backend() != "gpu":
        return "xla", ""
    shape = (1, sequence_length, config.num_attention_heads, config.head_dim)

    def total(x):
        y = jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn")
        return y.astype(jnp.float32).sum()

    try:
        jax.block_until_ready(jax.jit(jax.grad(total))(jnp.ones(shape, COMPUTE_DTYPE)))
    except Exception as error:  # cuDNN is absent, too old or refuses the shape: several types.
        return "xla", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return "cudnn", ""


def _losses(
    weights: Weights,
    tokens: Array,
    *,
    config: QwenMoeConfig,
    capacity_ratio: float,
    attention: AttentionName,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """What is minimised, and the loss, balance and dropped share.

    The load-balancing loss is the reference's, but of each layer for itself, and summed: the
    reference pools the layers first, so that layers which each overload other experts look even.
    """
    hidden, counts, probabilities = _hidden_states(
        weights,
        tokens[:, :-1],
        config,
        experts=bucketed(capacity_ratio),
        attention=attention,
    )
    labels = tokens[:, 1:].reshape(-1)
    loss = token_losses(_flat(hidden), weights["lm_head.weight"], labels).mean()
    balance = config.num_experts * (counts / labels.size * probabilities).sum(axis=1)
    num_pairs = labels.size * config.num_experts_per_tok
    capacity = bucket_rows(num_pairs, config.num_experts, capacity_ratio)
    dropped = jnp.maximum(counts - capacity, 0).sum() / (num_pairs * config.num_hidden_layers)
    total = loss + config.router_aux_loss_coef * balance.sum()
    return total, (loss, balance.mean() / config.num_experts_per_tok, dropped)


def _hidden_states(
    weights: Weights,
    token_ids: Array,
    config: QwenMoeConfig,
    *,
    experts: str | Callable[..., Array],
    attention: AttentionName,
) -> tuple[Array, Array, Array]:
    """Normed hidden states; tokens of each expert and mean router probabilities, by layer."""
    graph, state = nnx.split(abstract(config, COMPUTE_DTYPE).layers[0])
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1])[None, :], token_ids.shape)

    def one_layer(x, stacked):
        layer = nnx.merge(graph, _fill(state, stacked))
        x, _ = layer.attend(x, positions, implementation=attention)
        x, routing = layer.feed_forward(x, implementation=experts)
        assert routing is not None
        chosen = routing.selected_experts.reshape(-1, 1)
        is_chosen = chosen == jnp.arange(config.num_experts)[None, :]
        probabilities = jax.nn.softmax(routing.router_logits, axis=-1)
        return x, (is_chosen.sum(axis=0), probabilities.mean(axis=0))

    layers = {name: _narrow(name, weights[LAYERS + name]) for name in _variables(state)}
    # The gather reads float32, so that its gradient is summed in float32.
    x = weights["embed_tokens.weight"][token_ids].astype(COMPUTE_DTYPE)
    keep_tables = jax.checkpoint_policies.save_only_these_names(TABLES)
    x, (counts, probabilities) = jax.lax.scan(
        jax.checkpoint(one_layer, policy=keep_tables), x, layers
    )
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + config.rms_norm_eps)
    hidden = wide * weights["norm.weight"][None, None, :]
    return hidden.astype(COMPUTE_DTYPE), counts, probabilities


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_losses(hidden: Array, head: Array, labels: Array, chunk: int) -> Array:
    return _token_losses_forward(hidden, head, labels, chunk)[0]


def _token_losses_forward(hidden, head, labels, chunk):
    narrow = head.astype(hidden.dtype)

    def one_chunk(_, part):
        hidden, labels = part
        logits = _logits(hidden, narrow)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        said = jnp.where(_is_label(logits, labels), logits, 0).sum(-1)
        return None, (normalizer - said, normalizer)

    _, (losses, normalizers) = jax.lax.scan(one_chunk, None, _chunks((hidden, labels), chunk))
    return losses.reshape(-1), (hidden, head, labels, normalizers.reshape(-1))


def _token_losses_backward(chunk, residuals, gradient):
    hidden, head, labels, normalizers = residuals
    narrow = head.astype(hidden.dtype)

    def one_chunk(head_gradient, part):
        hidden, labels, normalizers, gradient = part
        logits = _logits(hidden, narrow)
        error = jnp.exp(logits - normalizers[:, None]) - _is_label(logits, labels)
        error = (error * gradient[:, None]).astype(hidden.dtype)
        head_gradient += jnp.einsum("tv,th->vh", error, hidden, preferred_element_type=jnp.float32)
        return head_gradient, jnp.einsum("tv,vh->th", error, narrow)

    parts = _chunks((hidden, labels, normalizers, gradient), chunk)
    head_gradient, hidden_gradient = jax.lax.scan(
        one_chunk, jnp.zeros(head.shape, jnp.float32), parts
    )
    return hidden_gradient.reshape(hidden.shape), head_gradient.astype(head.dtype), None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def _logits(hidden: Array, head: Array) -> Array:
    return jnp.einsum("th,vh->tv", hidden, head, preferred_element_type=jnp.float32)


def _is_label(logits: Array, labels: Array) -> Array:
    return jnp.arange(logits.shape[1])[None, :] == labels[:, None]


def _chunks(arrays: tuple[Array, ...], chunk: int) -> tuple[Array, ...]:
    return tuple(array.reshape(-1, chunk, *array.shape[1:]) for array in arrays)


def _optimizer() -> optax.GradientTransformation:
    """AdamW without clipping and learning rate; norms and biases do not decay."""
    return optax.chain(
        optax.scale_by_adam(*BETAS),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=_decays),
    )


def _decays(weights: Weights) -> dict[str, bool]:
    return {name: not name.endswith(("norm.weight", ".bias")) for name in weights}


def _narrow(name: str, weight: Array) -> Array:
    """The weight as it is computed with: the router stays in float32."""
    return weight if name == _ROUTER else weight.astype(COMPUTE_DTYPE)


def _weight_shapes(config: QwenMoeConfig) -> dict[str, tuple[int, ...]]:
    if len(config.moe_layers) != config.num_hidden_layers or config.tie_word_embeddings:
        raise UsageError(
            "layers without experts or a tied head cannot be trained here",
            "Set decoder_sparse_step = 1, mlp_only_layers = [] and tie_word_embeddings = false.",
        )
    stacked = {}
    _, state = nnx.split(abstract(config, jnp.float32))
    for name, variable in _variables(state).items():
        shape = variable.get_value().shape
        if not name.startswith(LAYERS):
            stacked[name] = shape
        elif name.startswith(f"{LAYERS}0."):
            stacked[LAYERS + name.removeprefix(f"{LAYERS}0.")] = (config.num_hidden_layers, *shape)
    return stacked


def _variables(state: nnx.State) -> dict[str, nnx.Variable]:
    """The variables of a state by dotted name."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _fill(state: nnx.State, arrays: dict[str, Array]) -> nnx.State:
    """The state with these arrays, by dotted name."""
    return nnx.from_flat_state(
        [
            (path, variable.replace(arrays[".".join(map(str, path))]))
            for path, variable in nnx.to_flat_state(state)
        ]
    )


def _flat(hidden: Array) -> Array:
    return hidden.reshape(-1, hidden.shape[-1])
