"""Lanes spread over devices: every device simulates its share, and none waits for another."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.errors import UsageError


def spread_over(num_devices: int) -> Callable[[Any], Any]:
    """Puts the leading axis of every leaf on devices, an equal share on each.

    Lanes are independent, so a program over leaves that are spread like this talks to no other
    device, and gives every lane the numbers that it has on one.

    Args:
      num_devices: How many; the leading axis must be a multiple of it.

    Returns:
      A function of a pytree.

    Raises:
      UsageError: There are not so many devices.
    """
    devices = jax.devices()
    if not 1 <= num_devices <= len(devices):
        raise UsageError(
            f"{num_devices} device(s) are asked for, and there are {len(devices)} of platform "
            f"{devices[0].platform}",
            f"Use 1 to {len(devices)}; `moejax env` lists what there is.",
        )
    mesh = Mesh(np.array(devices[:num_devices]), ("lanes",))
    sharding = NamedSharding(mesh, PartitionSpec("lanes"))
    return lambda tree: jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), tree)
