"""Lanes spread over devices: every device simulates its share, and none waits for another."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.devices import local_mesh, on_mesh

_Tree = TypeVar("_Tree")

AXIS = "lanes"
# What leads with lanes, what leads with steps, and what every device sees whole.
ROWS, COLUMNS, ALL = PartitionSpec(AXIS), PartitionSpec(None, AXIS), PartitionSpec()


def placed(mesh: Mesh | None, tree: _Tree) -> _Tree:
    """The same leaves with their leading axis of lanes on the mesh.

    Left on one device they would be cut up and sent on again for every program that reads them.
    """
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, ROWS))


def spread_over(num_devices: int) -> Callable[[Any], Any]:
    """Puts the leading axis of every leaf on devices, an equal share on each.

    Lanes are independent: a program over leaves that are spread like this gives every lane the
    numbers that it has on one device. Made by `apart`, it talks to no other device.

    Args:
      num_devices: How many; the leading axis must be a multiple of it.

    Returns:
      A function of a pytree.

    Raises:
      UsageError: There are not so many devices.
    """
    sharding = NamedSharding(local_mesh(num_devices, AXIS), ROWS)
    return lambda tree: jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), tree)


def apart(num_devices: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of leaves that `spread_over` placed, run by every device on its own share.

    Without it the devices would wait for each other wherever one lane's loop may turn once more
    than another's, such as at every event of a strategy that prefetches.

    Args:
      num_devices: As given to `spread_over`.
      function: Of leaves that lead with lanes, as are those of what it returns.

    Raises:
      UsageError: There are not so many devices.
    """
    mesh = None if num_devices == 1 else local_mesh(num_devices, AXIS)
    return on_mesh(mesh, function, ROWS, ROWS)
