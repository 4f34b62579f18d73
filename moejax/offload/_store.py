"""Every routed expert in host memory that the device reads by itself: pinned, a layer an array."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jaxtyping import Array, Shaped

from moejax.devices import ONE_DEVICE, Team
from moejax.errors import BackendError
from moejax.units import format_bytes

from ._layout import ExpertLayout, pack

ReadLayer: TypeAlias = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""Gives `gate_up` and `down` of a layer, counted among those that have experts."""

# XLA's pool of pinned memory: its cap in GiB, and the cap where the variable is not set.
_LIMIT_VARIABLE, _DEFAULT_LIMIT_GIB = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", 64
# The pool grows in steps that layers do not fill to the end.
_POOL_SLACK_RATIO = 1.25
# JAX takes over an array of the host without a copy if it is aligned so.
_ALIGNMENT_BYTES = 64
# As published models are initialised.
_RANDOM_STD = 0.02


@dataclass(frozen=True, eq=False)
class ExpertStore:
    """The routed experts of all layers that have any.

    Attributes:
      layout: How the experts of a layer are packed.
      layers: One packed array a layer: on a GPU in pinned host memory, on a CPU in plain memory.
        Of several devices, the experts of one stand behind those of another; each has as many,
        and what a device lacks is zeros.
      team: Who reads them.
    """

    layout: ExpertLayout
    layers: tuple[Shaped[Array, "experts ffn3 hidden"], ...]
    team: Team = ONE_DEVICE

    @property
    def num_layers(self) -> int:
        """Layers that have experts."""
        return len(self.layers)

    @property
    def num_bytes(self) -> int:
        """Host memory that is held; a layer that stands for several counts once."""
        return sum(layer.nbytes for layer in {id(layer): layer for layer in self.layers}.values())


def build_store(
    layout: ExpertLayout,
    num_layers: int,
    read_layer: ReadLayer,
    *,
    team: Team = ONE_DEVICE,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExpertStore:
    """Packs the experts layer by layer; beside the store one layer at most is in memory.

    Of several devices, one device's share of that layer comes on top.

    Args:
      layout: How the experts of a layer are packed.
      num_layers: Layers that have experts.
      read_layer: Gives the matrices of one of them, from 0.
      team: The devices that will read the store, each its own experts.
      on_progress: Told the bytes done and the bytes to do after every layer.

    Returns:
      The store.

    Raises:
      BackendError: Host memory, or the part of it that may be pinned, cannot hold the experts.
    """

    def packed(number: int) -> Iterator[np.ndarray]:
        buffer = _aligned(layout)
        pack(*read_layer(number), out=buffer)
        if team.num_devices == 1:
            yield buffer
            return
        for device in range(team.num_devices):
            own = _aligned(layout.share(team.num_devices))
            num_own = len(range(device, layout.num_experts, team.num_devices))
            own[:num_own] = buffer[device :: team.num_devices]
            own[num_own:] = 0
            yield own

    return _fill(layout, num_layers, packed, team, on_progress)


def random_store(
    layout: ExpertLayout,
    num_layers: int,
    seed: int,
    *,
    num_distinct: int | None = None,
    team: Team = ONE_DEVICE,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExpertStore:
    """A store of random experts, to measure without a checkpoint.

    Args:
      layout: How the experts of a layer are packed.
      num_layers: Layers that have experts.
      seed: Seed of the weights; a layer's weights depend neither on how many there are nor on
        who reads them.
      num_distinct: Layers that are really made; the others repeat them in turn. All by default.
      team: The devices that will read the store, each its own experts, and draw them.
      on_progress: Told the bytes done and the bytes to do after every layer.

    Raises:
      BackendError: Host memory, or the part of it that may be pinned, cannot hold the experts.
    """
    keys = [jax.device_put(jax.random.key(seed), device) for device in team.devices]
    made = min(num_layers, num_distinct or num_layers)

    def drawn(number: int) -> Iterator[Array]:
        for device, key in enumerate(keys):
            yield _draw(jax.random.fold_in(key, number), layout, device, team.num_devices)

    store = _fill(layout, made, drawn, team, on_progress)
    return ExpertStore(layout, tuple(store.layers[i % made] for i in range(num_layers)), team)


def _fill(
    layout: ExpertLayout,
    num_layers: int,
    make_shares: Callable[[int], Iterable[np.ndarray | Array]],
    team: Team,
    on_progress: Callable[[int, int], None] | None,
) -> ExpertStore:
    is_pinned = team.devices[0].platform != "cpu"
    shape = layout.share(team.num_devices)
    layer_bytes = team.num_devices * shape.layer_bytes
    all_bytes = num_layers * layer_bytes
    _check_room(all_bytes, is_pinned=is_pinned)
    memory = "pinned_host" if is_pinned else None
    places = [SingleDeviceSharding(device, memory_kind=memory) for device in team.devices]
    layers: list[Array] = []
    for number in range(num_layers):
        done_bytes = number * layer_bytes
        with _explaining(done_bytes, all_bytes):
            # Waiting keeps what is packed but not copied from piling up.
            shares = [
                jax.device_put(share, place).block_until_ready()
                for share, place in zip(make_shares(number), places, strict=True)
            ]
            layers.append(_join(shares, team, memory))
        if on_progress is not None:
            on_progress(done_bytes + layer_bytes, all_bytes)
    return ExpertStore(layout, tuple(layers), team)


def _join(shares: list[Array], team: Team, memory: str | None) -> Array:
    """One array of all devices' experts; none of them moves."""
    if team.mesh is None:
        return shares[0]
    num_experts, *expert = shares[0].shape
    whole = NamedSharding(team.mesh, Team.OWN, memory_kind=memory)
    shape = (len(shares) * num_experts, *expert)
    return jax.make_array_from_single_device_arrays(shape, whole, shares)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Array, layout: ExpertLayout, device: int, num_devices: int) -> Array:
    all_ = _RANDOM_STD * jax.random.normal(key, layout.shape, jnp.dtype(layout.dtype))
    own = all_[device::num_devices]
    missing = layout.share(num_devices).num_experts - own.shape[0]
    return jnp.pad(own, ((0, missing), (0, 0), (0, 0)))


def _check_room(all_bytes: int, *, is_pinned: bool) -> None:
    """Refuses at once what would fail after a minute of copying."""
    room_bytes = _available_bytes()
    if room_bytes is not None and all_bytes > room_bytes:
        raise BackendError(
            f"the routed experts take {format_bytes(all_bytes)} of host memory and "
            f"{format_bytes(room_bytes)} are available",
            "Free host memory, or take a smaller model.",
        )
    limit_bytes = _limit_gib() * 2**30
    if is_pinned and all_bytes > limit_bytes:
        raise BackendError(
            f"the routed experts take {format_bytes(all_bytes)} of pinned host memory and XLA "
            f"pins at most {format_bytes(limit_bytes)}",
            _raise_limit(all_bytes),
        )


@contextmanager
def _explaining(done_bytes: int, all_bytes: int) -> Iterator[None]:
    """Says of an allocation that failed how far it came and what to do."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise BackendError(
            f"host memory ran out after {format_bytes(done_bytes)} of "
            f"{format_bytes(all_bytes)} of routed experts",
            f"Free host memory. {_raise_limit(all_bytes)}",
        ) from error


def _raise_limit(all_bytes: int) -> str:
    gib = math.ceil(_POOL_SLACK_RATIO * all_bytes / 2**30)
    return f"Where the host has the memory, set {_LIMIT_VARIABLE}={gib} before the start."


def _limit_gib() -> int:
    text = os.environ.get(_LIMIT_VARIABLE, "")
    return int(text) if text.strip().isdecimal() else _DEFAULT_LIMIT_GIB


def _available_bytes() -> int | None:
    """Host memory that could be had, files kept in memory for speed included; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, ValueError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _aligned(layout: ExpertLayout) -> np.ndarray:
    room = np.empty(layout.layer_bytes + _ALIGNMENT_BYTES, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT_BYTES
    values = room[begin : begin + layout.layer_bytes].view(jnp.dtype(layout.dtype))
    return values.reshape(layout.shape)
