"""Several devices of this process side by side, and functions that run on all of them at once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.errors import UsageError


def local_mesh(num_devices: int, axis: str) -> Mesh:
    """The first devices of this process along one axis.

    Raises:
      UsageError: There are not so many devices.
    """
    devices = jax.local_devices()
    if not 1 <= num_devices <= len(devices):
        raise UsageError(
            f"{num_devices} device(s) are asked for, and there are {len(devices)} of platform "
            f"{devices[0].platform}",
            f"Use 1 to {len(devices)}; `moejax env` lists what there is.",
        )
    return Mesh(np.array(devices[:num_devices]), (axis,))


def on_mesh(mesh: Mesh | None, function: Callable[..., Any], in_specs: Any, out_specs: Any):
    """`function` on each device's share of its arguments.

    Args:
      mesh: Devices; None leaves the function as it is.
      function: Of arrays.
      in_specs: How what it takes is dealt out.
      out_specs: How what it gives is put together.
    """
    if mesh is None:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


class Team(NamedTuple):
    """The devices that a model runs on: one, or several that share its routed experts.

    Expert `e` of every layer belongs to device `e % num_devices`, where it has the number
    `e // num_devices`. Arrays of the devices' own things are joined along their leading axis,
    `OWN`; what every device has a copy of is `ALIKE`.

    Attributes:
      mesh: Several devices along `Team.AXIS`; None for one.
    """

    mesh: Mesh | None = None

    AXIS = "devices"
    OWN = PartitionSpec(AXIS)
    ALIKE = PartitionSpec()

    @property
    def num_devices(self) -> int:
        """How many there are."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def devices(self) -> Sequence[Any]:
        """They, in the order of their numbers."""
        return jax.devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)

    def run(self, function: Callable[..., Any], in_specs: Any, out_specs: Any):
        """`on_mesh` of these devices."""
        return on_mesh(self.mesh, function, in_specs, out_specs)

    def sharding(self, spec: PartitionSpec) -> NamedSharding | None:
        """Where arrays lie; None leaves one device's where they are."""
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    def place(self, tree: Any, spec: PartitionSpec) -> Any:
        """Puts arrays where programs of these devices take them."""
        sharding = self.sharding(spec)
        return tree if sharding is None else jax.device_put(tree, sharding)

    def shapes(self, tree: Any, spec: PartitionSpec) -> Any:
        """Shapes of arrays that `place` will put there, for programs compiled ahead."""
        sharding = self.sharding(spec)

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(shape, tree)


ONE_DEVICE = Team()


def team(num_devices: int) -> Team:
    """The first devices of this process.

    Raises:
      UsageError: There are not so many devices.
    """
    return Team() if num_devices == 1 else Team(local_mesh(num_devices, Team.AXIS))
