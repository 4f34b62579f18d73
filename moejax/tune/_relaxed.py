"""Gradient optimisation of a fractional split: a softmax over each budget, from several starts."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from moejax._types import PRNGKey

from ._problem import TierNumbers
from ._step import Objective, Split, split_objective

NUM_STARTS = 8
NUM_UPDATES = 500

_LEARNING_RATE = 0.1
_START_SPREAD = 0.5
# Landing slots start out rare: a fifteenth of a layer's device slots.
_START_LANDING_LOGIT = -2.7


class SplitLogits(NamedTuple):
    """Unbounded variables behind a relaxed split.

    Attributes:
      device: How each layer competes for the device budget.
      landing: Log odds that a device slot of the layer is kept for landing.
      pinned: How each layer competes for the pinned budget.
      pageable: How each layer competes for the pageable budget.
    """

    device: Float[Array, "*batch layers"]
    landing: Float[Array, "*batch layers"]
    pinned: Float[Array, "*batch layers"]
    pageable: Float[Array, "*batch layers"]


@functools.partial(jax.jit, static_argnames="objective")
def relaxed_optimum(
    numbers: TierNumbers, key: PRNGKey, *, objective: Objective
) -> tuple[Split, Float[Array, " starts"]]:
    """Descends from every start at once; compiled once for all budgets of a model.

    Args:
      numbers: The problem.
      key: Draws the starts; consumed.
      objective: What to minimise.

    Returns:
      The fractional split each start ends at, and its objective.
    """
    starts = _starts(key, numbers.num_misses.shape[0])
    value = functools.partial(split_objective, numbers, objective=objective)
    splits = jax.vmap(functools.partial(_descend, numbers, objective))(starts)
    return splits, jax.vmap(value)(splits)


def spend(numbers: TierNumbers, logits: SplitLogits) -> Split:
    """The split that spends every budget as the logits say.

    A budget is shared by softmax. What exceeds a layer's room goes to the layers that have room
    left, in proportion to it, so the whole budget is used while anything is left to store.
    """
    num_experts = float(numbers.num_misses.shape[-1] - 1)
    size_bytes = numbers.clock.expert_bytes + jnp.zeros_like(logits.device)
    device_bytes, pinned_bytes, pageable_bytes = numbers.budgets_bytes
    room = jnp.full_like(logits.device, num_experts)
    device = _share(logits.device, device_bytes, size_bytes, room)
    landing = jnp.minimum(device * jax.nn.sigmoid(logits.landing), numbers.max_landing)
    retained = device - landing
    pinned = _share(logits.pinned, pinned_bytes, size_bytes, room - retained)
    pageable = _share(logits.pageable, pageable_bytes, size_bytes, room - retained - pinned)
    return Split(retained, landing, pinned, pageable)


def _starts(key: PRNGKey, num_layers: int) -> SplitLogits:
    # The first start is the uniform split.
    noise = _START_SPREAD * jax.random.normal(key, (4, NUM_STARTS, num_layers))
    noise = noise.at[:, 0].set(0.0)
    return SplitLogits(noise[0], noise[1] + _START_LANDING_LOGIT, noise[2], noise[3])


def _descend(numbers: TierNumbers, objective: Objective, start: SplitLogits) -> Split:
    schedule = optax.cosine_decay_schedule(_LEARNING_RATE, NUM_UPDATES)
    optimizer = optax.adam(schedule)

    def loss(logits: SplitLogits) -> Float[Array, ""]:
        return split_objective(numbers, spend(numbers, logits), objective=objective)

    def update(carry: tuple, _: None) -> tuple[tuple, None]:
        logits, state, best, best_loss = carry
        value, gradient = jax.value_and_grad(loss)(logits)
        is_better = value < best_loss
        best = jax.tree.map(lambda new, old: jnp.where(is_better, new, old), logits, best)
        updates, state = optimizer.update(gradient, state)
        logits = optax.apply_updates(logits, updates)
        return (logits, state, best, jnp.minimum(value, best_loss)), None

    carry = (start, optimizer.init(start), start, jnp.asarray(jnp.inf))
    (_, _, best, _), _ = jax.lax.scan(update, carry, None, length=NUM_UPDATES)
    return spend(numbers, best)


def _share(
    logits: Float[Array, " layers"],
    budget_bytes: Float[Array, ""],
    size_bytes: Float[Array, " layers"],
    room: Float[Array, " layers"],
) -> Float[Array, " layers"]:
    wanted = budget_bytes * jax.nn.softmax(logits) / size_bytes
    num_slots = jnp.minimum(wanted, room)
    left_bytes = budget_bytes - jnp.sum(num_slots * size_bytes)
    free_bytes = jnp.sum((room - num_slots) * size_bytes)
    # Float32 rounding may leave a few bytes too many or too few; neither may become a slot.
    filled_ratio = jnp.clip(left_bytes / jnp.maximum(free_bytes, 1.0), 0.0, 1.0)
    return num_slots + filled_ratio * (room - num_slots)
