"""The traces and strategies that `bench_simulator.py` times, made from a fixed seed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from moejax.strategies import CacheShape, Decision, Profile, Strategy, lfu, lru, oracle, top_k

SEED = 20_240_502
TOPIC_STEPS = 256
_SKEW, _DRIFT = 0.8, 1.5


class Geometry(NamedTuple):
    """Sizes of a trace."""

    num_layers: int
    num_experts: int
    num_steps: int
    topk: int


def make_experts(geometry: Geometry, number: int) -> UInt8[np.ndarray, "steps layers topk"]:
    """Skewed routing whose hot experts move on with every topic; distinct experts an event."""
    layers, experts, steps, topk = geometry
    generator = np.random.default_rng([SEED, number])
    skew = -_SKEW * np.log(np.arange(1, experts + 1))
    popularity = np.stack([generator.permutation(skew) for _ in range(layers)])
    blocks = []
    for start in range(0, steps, TOPIC_STEPS):
        rows = min(TOPIC_STEPS, steps - start)
        worth = popularity + _DRIFT * generator.normal(size=(layers, experts))
        drawn = worth + generator.gumbel(size=(rows, layers, experts))
        blocks.append(np.argpartition(-drawn, topk, axis=-1)[..., :topk].astype(np.uint8))
    return np.concatenate(blocks)


def draw_lanes(geometry: Geometry, num_lanes: int) -> UInt8[np.ndarray, "steps lanes layers topk"]:
    """The same kind of routing for many seeds at once, drawn on the accelerator."""
    layers, experts, steps, topk = geometry
    rows = (num_lanes, layers)

    @jax.jit
    def topic(popularity, key):
        first, second = jax.random.split(key)
        worth = popularity + _DRIFT * jax.random.normal(first, popularity.shape)
        drawn = worth[None] + jax.random.gumbel(second, (TOPIC_STEPS, *popularity.shape))
        return jax.lax.top_k(drawn, topk)[1].astype(jnp.uint8)

    skew = jnp.broadcast_to(-_SKEW * jnp.log(jnp.arange(1.0, experts + 1)), (*rows, experts))
    popularity = jax.random.permutation(jax.random.key(SEED), skew, axis=-1, independent=True)
    keys = jax.random.split(jax.random.key(SEED + 1), -(-steps // TOPIC_STEPS))
    return np.concatenate([np.asarray(topic(popularity, key)) for key in keys])[:steps]


def make_profile(geometry: Geometry) -> Profile:
    """Uses and successions of another trace, for the strategies that learn beforehand."""
    layers, num_experts, steps, topk = geometry
    earlier = make_experts(geometry._replace(num_steps=max(2, steps // 10)), 1)
    demand = demanded(earlier, num_experts).astype(np.float32).transpose(1, 0, 2)
    return Profile(
        num_tokens=len(earlier),
        topk=topk,
        num_uses=demand.sum(1),
        transition=np.zeros((layers, 0, num_experts, num_experts), np.float32),
        successor=demand[:, :-1].transpose(0, 2, 1) @ demand[:, 1:],
    )


def make_strategies(profile: Profile) -> dict[str, Strategy]:
    """Those that score for all capacities at once."""
    return {
        "lru": lru(),
        "lfu": lfu(),
        "oracle": oracle(),
        "top_k": top_k(profile),
        "transition": transition_scores(profile),
    }


def transition_scores(profile: Profile) -> Strategy:
    """Keeps what followed these experts in the same layer of the profile."""

    def init(shape: CacheShape):
        return jnp.asarray(profile.successor)

    def step(state, access, key):
        used = (access.demand > 0).astype(jnp.float32)
        # Sums of whole numbers, which the short floats of a GPU's products would round.
        return state, Decision(jnp.matmul(used, state, precision=jax.lax.Precision.HIGHEST))

    return Strategy(init, step)


def demanded(
    experts: Shaped[np.ndarray, "steps layers topk"], num_experts: int
) -> Bool[np.ndarray, "steps layers experts"]:
    """Whether each expert is demanded."""
    found = np.zeros((*experts.shape[:2], num_experts), bool)
    np.put_along_axis(found, experts.astype(np.intp), True, axis=-1)
    return found
