"""A device's own experts among those that the router chooses from; see `moejax.devices.Team`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

from moejax.devices import Team
from moejax.strategies import NEVER

from ._event import Sizes, Tables


def own_numbers(
    sizes: Sizes, tables: Tables, selected: Int[Array, "*axes"]
) -> Int32[Array, "*axes"]:
    """The numbers that chosen experts have on this device; `NEVER` for those of other devices."""
    if tables.device is None:
        return selected.astype(jnp.int32)
    return number_on(selected, tables.device[0], sizes.num_devices)


def number_on(
    selected: Int[Array, "*axes"], device: Int[Array, ""], num_devices: int
) -> Int32[Array, "*axes"]:
    """The numbers that experts have on a device; `NEVER` for those of other devices."""
    is_own = (selected % num_devices == device) & (selected < NEVER)
    return jnp.where(is_own, selected // num_devices, NEVER).astype(jnp.int32)


def everyones_numbers(sizes: Sizes, tables: Tables) -> Int32[Array, " experts"]:
    """The numbers that the router has for this device's experts; works on references too."""
    number = jax.lax.iota(jnp.int32, sizes.num_padded)
    return number if tables.device is None else number * sizes.num_devices + tables.device[0]


def total(answer: Array, num_devices: int) -> Array:
    """The sum of what the devices' experts say; each has added up its own in their order."""
    return answer if num_devices == 1 else jax.lax.psum(answer, Team.AXIS)
