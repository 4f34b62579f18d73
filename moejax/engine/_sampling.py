"""Choosing the next token: the best one, or one drawn from the likely ones."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, UInt32

from moejax.errors import UsageError

# Scores divided by less than this are greedy in all but name, and overflow float32 soon after.
_MIN_TEMPERATURE = 1e-3


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: What the scores are divided by; 0 takes the best token always.
      top_p: Tokens are drawn from the fewest that together are at least this likely; 1 leaves
        out none, save for less than a millionth of the probability through rounding.

    Raises:
      UsageError: A value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        is_warm = _MIN_TEMPERATURE <= self.temperature < math.inf
        if not (self.temperature == 0 or is_warm):
            raise UsageError(
                f"a temperature of {self.temperature} cannot be sampled at",
                f"Use 0 for the best token always, or {_MIN_TEMPERATURE} and more.",
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(
                f"top-p {self.top_p} is not a share of probability",
                "Use more than 0 and at most 1; 1 leaves no token out.",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether chance plays no part."""
        return self.temperature == 0


GREEDY = Sampling()


class Draw(NamedTuple):
    """What a drawn token depends on besides its scores.

    Each request draws by its own number, so its text is the same in every batch.

    Attributes:
      seed: Seed of all draws.
      requests: Number of each request.
      temperature: See `Sampling`.
      top_p: See `Sampling`.
    """

    seed: UInt32[Array, ""]
    requests: Int32[Array, " batch"]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


def make_draw(sampling: Sampling, seed: int, first_request: int, batch_size: int) -> Draw:
    """How requests that are numbered one after another draw."""
    return Draw(
        seed=jnp.uint32(seed),
        requests=jnp.arange(first_request, first_request + batch_size, dtype=jnp.int32),
        temperature=jnp.float32(sampling.temperature),
        top_p=jnp.float32(sampling.top_p),
    )


def abstract_draw(batch_size: int) -> Draw:
    """Shapes and types of a `Draw`."""
    return jax.eval_shape(lambda: make_draw(GREEDY, 0, 0, batch_size))


def next_tokens(
    logits: Float[Array, "batch vocab"], step: Int[Array, " *batch"], draw: Draw | None
) -> Int32[Array, " batch"]:
    """The next token of every request; ties go to the lower number.

    Args:
      logits: Scores of the vocabulary.
      step: Number of the token within its text, from 0, for each request or for all; every step
        draws anew.
      draw: How to draw; None takes the best.
    """
    if draw is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key = jax.random.key(draw.seed)

    def one_request(logits, request, step):
        own_key = jax.random.fold_in(jax.random.fold_in(key, request), step)
        order = jnp.argsort(logits, descending=True, stable=True)
        scores = (logits[order] - jnp.max(logits)) / draw.temperature
        probability = jax.nn.softmax(scores)
        mass_before = jnp.cumsum(probability) - probability
        scores = jnp.where(mass_before < draw.top_p, scores, -jnp.inf)
        return order[jax.random.categorical(own_key, scores)]

    steps = jnp.broadcast_to(step, draw.requests.shape)
    return jax.vmap(one_request)(logits, draw.requests, steps).astype(jnp.int32)
