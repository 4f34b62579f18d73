"""A router driven by a hidden state with the memories of text: topic, phrase, token."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax._types import Scalar
from moejax.trace import expert_dtype

from ._routing import LOOKAHEAD_DEPTH, Router, Routing
from ._workload import Workload

_HIDDEN_SIZE = 16
_NUM_TOKEN_TYPES = 4096


class LatentParameters(NamedTuple):
    """Numbers of the latent router; shares are of the hidden state's variance.

    Attributes:
      popularity: Standard deviation of the experts' biases; the hidden state's part of a logit
        has standard deviation 1.
      topic_share: Part that barely changes within a request.
      topic_memory: Its correlation from one token to the next.
      phrase_share: Part shared with the next few tokens.
      phrase_memory: Its correlation from one token to the next.
      token_share: Part fixed by the token's type, so that repeated tokens route alike. What the
        three shares leave of 1 is fresh with every token.
      token_zipf: Exponent of the frequencies of token types.
      kinship: Cosine between an expert's router row and that of its counterpart one layer before.
      layer_mix: Correlation of the hidden states of adjacent layers.
    """

    popularity: Scalar
    topic_share: Scalar
    topic_memory: Scalar
    phrase_share: Scalar
    phrase_memory: Scalar
    token_share: Scalar
    token_zipf: Scalar
    kinship: Scalar
    layer_mix: Scalar


class LatentModel(NamedTuple):
    """What stays fixed for a workload whatever the requests."""

    routers: Float[np.ndarray, "layers hidden experts"]
    biases: Float[np.ndarray, "layers experts"]
    embeddings: Float[np.ndarray, "types layers hidden"]


def latent_router(workload: Workload) -> Router:
    """A router whose logits are a random projection of an autoregressive hidden state.

    Each layer's hidden state is the one before, mixed with an innovation that has the same
    memories over tokens; so the time statistics of all layers agree and adjacent layers resemble
    each other.
    """
    parameters = LatentParameters(**workload.parameters)
    model = _draw_model(workload, parameters)
    cumulative = np.cumsum((1.0 + np.arange(_NUM_TOKEN_TYPES)) ** -parameters.token_zipf)
    dtype = expert_dtype(workload.num_experts)

    def route(seed: int, request: int, num_tokens: int, *, with_lookahead: bool) -> Routing:
        random = np.random.default_rng((workload.model_seed, seed, request))
        token_ids = np.searchsorted(cumulative, cumulative[-1] * random.random(num_tokens))
        shape = (3, num_tokens, workload.num_layers, _HIDDEN_SIZE)
        # On a CPU wherever JAX has one: an accelerator rounds otherwise, and a seed would name
        # other routing there.
        with _on_cpu():
            experts, weights, lookahead = _route_request(
                parameters,
                model.routers,
                model.biases,
                random.standard_normal(shape, np.float32),
                model.embeddings[token_ids],
                topk=workload.num_experts_per_tok,
                with_lookahead=with_lookahead,
            )
        return Routing(
            np.asarray(experts).astype(dtype),
            np.asarray(weights).astype(np.float16),
            # -1 wraps to the largest value, which stands for "none".
            None if lookahead is None else np.asarray(lookahead).astype(dtype),
            token_ids.astype(np.int32),
        )

    return route


def _on_cpu() -> AbstractContextManager:
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        # JAX_PLATFORMS may leave the CPU out.
        return nullcontext()


def _draw_model(workload: Workload, parameters: LatentParameters) -> LatentModel:
    num_layers, num_experts = workload.num_layers, workload.num_experts
    random = np.random.default_rng(workload.model_seed)
    rows = _unit(random.standard_normal((num_layers, num_experts, _HIDDEN_SIZE), np.float32))
    kinship = parameters.kinship
    for layer in range(1, num_layers):
        counterparts = random.permutation(rows[layer - 1])
        rows[layer] = _unit(kinship * counterparts + np.sqrt(1 - kinship**2) * rows[layer])
    biases = random.standard_normal((num_layers, num_experts), np.float32)
    embeddings = random.standard_normal((_NUM_TOKEN_TYPES, num_layers, _HIDDEN_SIZE), np.float32)
    return LatentModel(
        routers=rows.transpose(0, 2, 1),
        biases=np.float32(parameters.popularity) * biases,
        embeddings=embeddings,
    )


def _unit(rows: Float[np.ndarray, "*layers experts hidden"]) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("topk", "with_lookahead"))
def _route_request(
    parameters: LatentParameters,
    routers: Float[Array, "layers hidden experts"],
    biases: Float[Array, "layers experts"],
    noise: Float[Array, "3 tokens layers hidden"],
    embedded: Float[Array, "tokens layers hidden"],
    *,
    topk: int,
    with_lookahead: bool,
) -> tuple[
    Int[Array, "tokens layers topk"],
    Float[Array, "tokens layers topk"],
    Int[Array, "tokens layers depth width"] | None,
]:
    hidden = _hidden_states(parameters, noise, embedded)
    logits = jnp.einsum("tlh,lhe->tle", hidden, routers) + biases[None]
    scores, experts = jax.lax.top_k(logits, topk)
    weights = jnp.exp(scores - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    lookahead = _look_ahead(routers, biases, hidden, topk) if with_lookahead else None
    return experts, weights, lookahead


def _look_ahead(
    routers: Float[Array, "layers hidden experts"],
    biases: Float[Array, "layers experts"],
    hidden: Float[Array, "tokens layers hidden"],
    topk: int,
) -> Int[Array, "tokens layers depth width"]:
    """What the routers further on choose from this layer's hidden state."""
    # Routers 1, 2, ... layers further on; what wraps round is marked as "none" below.
    depths = range(1, LOOKAHEAD_DEPTH + 1)
    ahead_routers = jnp.stack([jnp.roll(routers, -depth, axis=0) for depth in depths], axis=1)
    ahead_biases = jnp.stack([jnp.roll(biases, -depth, axis=0) for depth in depths], axis=1)
    ahead_logits = jnp.einsum("tlh,ldhe->tlde", hidden, ahead_routers) + ahead_biases[None]
    lookahead = jax.lax.top_k(ahead_logits, 2 * topk)[1]
    num_layers = hidden.shape[1]
    reached = jnp.arange(num_layers)[:, None] + jnp.array(depths)[None, :]
    return jnp.where((reached < num_layers)[None, :, :, None], lookahead, -1)


def _hidden_states(
    parameters: LatentParameters,
    noise: Float[Array, "3 tokens layers hidden"],
    embedded: Float[Array, "tokens layers hidden"],
) -> Float[Array, "tokens layers hidden"]:
    topic = _autoregression(noise[0], parameters.topic_memory)
    phrase = _autoregression(noise[1], parameters.phrase_memory)
    fresh_share = 1 - parameters.topic_share - parameters.phrase_share - parameters.token_share
    innovation = (
        jnp.sqrt(parameters.topic_share) * topic
        + jnp.sqrt(parameters.phrase_share) * phrase
        + jnp.sqrt(parameters.token_share) * embedded
        + jnp.sqrt(jnp.maximum(fresh_share, 0.0)) * noise[2]
    )
    mix = _mixing_matrix(parameters.layer_mix, noise.shape[2])
    return jnp.einsum("lm,tmh->tlh", mix, innovation)


def _autoregression(
    noise: Float[Array, "tokens layers hidden"], memory: Scalar
) -> Float[Array, "tokens layers hidden"]:
    """A stationary first-order process of variance 1 along the tokens."""

    def step(state: Array, noise: Array) -> tuple[Array, Array]:
        state = memory * state + jnp.sqrt(1 - memory**2) * noise
        return state, state

    _, later = jax.lax.scan(step, noise[0], noise[1:])
    return jnp.concatenate([noise[:1], later])


def _mixing_matrix(layer_mix: Scalar, num_layers: int) -> Float[Array, "layers layers"]:
    """Weights of the innovations g in h[l] = mix h[l - 1] + sqrt(1 - mix^2) g[l], h[0] = g[0]."""
    layer = jnp.arange(num_layers)
    distance = layer[:, None] - layer[None, :]
    decay = jnp.where(distance >= 0, layer_mix ** jnp.maximum(distance, 0), 0.0)
    scale = jnp.where(layer > 0, jnp.sqrt(1 - layer_mix**2), 1.0)
    return decay * scale[None, :]
