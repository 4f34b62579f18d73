"""How sure a plan is: its constants, its workload and single runs drawn over and over.

Each draw takes constants from the profile's errors and steps, with replacement, from those that the
plan was not tuned on. What a measurement differs by beside both is drawn for every alternative by
itself, since that is what two runs of one machine differ by.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax.cards import Hardware, ModelSpec
from moejax.cost import CostParameters, Samples, copy_s, interval, sample_parameters
from moejax.cost import clock_from_parameters as clock_of

from ._plan import Plan
from ._problem import TierNumbers, TierProblem
from ._rounding import uniform_split
from ._step import Split, predict

# Between these chances nobody should decide: either may be the faster one.
_LEAST_SURE, _MOST_SURE = 0.05, 0.95
_NUM_SAMPLES = 400


@dataclass(frozen=True)
class Certainty:
    """What a plan's prediction can be trusted with.

    Attributes:
      latency_interval_s: What 90 % of measured mean step latencies are to lie in.
      beats_uniform_probability: Chance that the plan is faster than equal slots in every layer.
      beats_lru_probability: Chance that it is faster than `lru` with equal slots in every layer.
    """

    latency_interval_s: tuple[float, float]
    beats_uniform_probability: float
    beats_lru_probability: float

    @property
    def ties(self) -> tuple[str, ...]:
        """Alternatives that are neither surely slower nor surely faster."""
        chances = {"uniform": self.beats_uniform_probability, "lru": self.beats_lru_probability}
        return tuple(name for name, chance in chances.items() if is_tie(chance))


def certainty(
    plan: Plan,
    problem: TierProblem,
    lru_problem: TierProblem | None,
    hardware: Hardware,
    model: ModelSpec,
    *,
    batch_size: int,
    context_tokens: int,
    seed: int = 0,
) -> Certainty | None:
    """Draws what nobody knows exactly; None if the profile does not say how sure it is.

    Args:
      plan: The plan.
      problem: What it answers.
      lru_problem: The same question for `lru`; None where that is the plan's strategy.
      hardware: Profile that prices copies and compute.
      model: Card of the model.
      batch_size: Requests that decode in lockstep.
      context_tokens: Tokens in the KV cache of each.
      seed: Seed of the draws.
    """
    constants_key, steps_key, *case_keys = jax.random.split(jax.random.key(seed), 4)
    samples = sample_parameters(hardware, constants_key, _NUM_SAMPLES)
    if samples is None:
        return None

    def drawn_s(question: TierProblem, splits: tuple[Split, ...]) -> list[Array]:
        # The same steps for every split: only the splits differ.
        return _drawn_s(question, splits, samples, model, batch_size, context_tokens, steps_key)

    plan_s, uniform_s = drawn_s(problem, (_plan_split(plan), _as_split(uniform_split(problem))))
    plan_s = plan_s * samples.case_ratio

    def chance(key: Array, other_s: Array) -> float:
        other_s = other_s * jax.random.permutation(key, samples.case_ratio)
        return float(jnp.mean(plan_s < other_s))

    beats_uniform = beats_lru = chance(case_keys[0], uniform_s)
    if lru_problem is not None:
        (lru_s,) = drawn_s(lru_problem, (_as_split(uniform_split(lru_problem)),))
        beats_lru = chance(case_keys[1], lru_s)
    return Certainty(interval(plan_s), beats_uniform, beats_lru)


def is_tie(chance: float) -> bool:
    """Whether neither of two is surely the faster one."""
    return _LEAST_SURE < chance < _MOST_SURE


def _drawn_s(
    problem: TierProblem,
    splits: tuple[Split, ...],
    samples: Samples,
    model: ModelSpec,
    batch_size: int,
    context_tokens: int,
    key: Array,
) -> list[Float[Array, " samples"]]:
    """Mean step latency of each split in every draw."""
    numbers = problem.numbers._replace(sample_misses=None)
    nothing = jnp.zeros_like(samples.case_ratio)
    layer_s = samples.strategy_layer_s.get(problem.strategy, nothing)
    sizes = np.asarray(problem.expert_bytes, np.float64)

    def one(parameters: CostParameters, layer_s: Array, key: Array) -> list[Array]:
        clock = clock_of(
            parameters,
            model,
            batch_size=batch_size,
            context_tokens=context_tokens,
            expert_bytes=sizes,
            strategy_layer_s=layer_s,
        )
        priced = _with_drawn_steps(numbers, problem.check_misses, key)._replace(
            clock=clock,
            pageable_s=jnp.asarray(copy_s(parameters, clock.expert_bytes, "pageable")),
            store_s=jnp.asarray(copy_s(parameters, clock.expert_bytes, "nvme")),
        )
        return [predict(priced, split).step_latency_s for split in splits]

    keys = jax.random.split(key, len(samples.case_ratio))
    return jax.jit(jax.vmap(one))(samples.parameters, layer_s, keys)


def _with_drawn_steps(
    numbers: TierNumbers, check_misses: Float[Array, "samples layers slots"] | None, key: Array
) -> TierNumbers:
    if check_misses is None:
        return numbers
    num_steps = len(check_misses)
    chosen = jax.random.randint(key, (num_steps,), 0, num_steps)
    weight = jnp.zeros(num_steps).at[chosen].add(1.0 / num_steps)
    return numbers._replace(
        num_misses=jnp.tensordot(weight, check_misses, 1),
        any_miss_ratio=jnp.tensordot(weight, jnp.minimum(check_misses, 1.0), 1),
    )


def _plan_split(plan: Plan) -> Split:
    device, pinned, pageable = (np.array(tier.experts_per_layer) for tier in plan.tiers)
    landing = np.array(plan.prefetch_slots_per_layer)
    return _as_split(np.stack([device - landing, landing, pinned, pageable]))


def _as_split(split: np.ndarray) -> Split:
    return Split(*jnp.asarray(split, jnp.float32))
