"""Every routed expert in host memory that the device reads by itself: pinned, a layer an array."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Shaped

from moejax.errors import BackendError
from moejax.units import format_bytes

from ._layout import ExpertLayout, pack

ReadLayer: TypeAlias = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""Gives `gate_up` and `down` of a layer, counted among those that have experts."""

Device: TypeAlias = Any
"""A `jax.Device`, which type checkers take for a variable."""

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
    """

    layout: ExpertLayout
    layers: tuple[Shaped[Array, "experts ffn3 hidden"], ...]

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
    device: Device | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExpertStore:
    """Packs the experts layer by layer; beside the store no more than one layer is in memory.

    Args:
      layout: How the experts of a layer are packed.
      num_layers: Layers that have experts.
      read_layer: Gives the matrices of one of them, from 0.
      device: Who will read the store; the first device if None.
      on_progress: Told the bytes done and the bytes to do after every layer.

    Returns:
      The store.

    Raises:
      BackendError: Host memory, or the part of it that may be pinned, cannot hold the experts.
    """

    def packed(number: int) -> np.ndarray:
        buffer = _aligned(layout)
        pack(*read_layer(number), out=buffer)
        return buffer

    return _fill(layout, num_layers, packed, device, on_progress)


def random_store(
    layout: ExpertLayout,
    num_layers: int,
    seed: int,
    *,
    num_distinct: int | None = None,
    device: Device | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExpertStore:
    """A store of random experts, to measure without a checkpoint.

    Args:
      layout: How the experts of a layer are packed.
      num_layers: Layers that have experts.
      seed: Seed of the weights; a layer's weights do not depend on how many there are.
      num_distinct: Layers that are really made; the others repeat them in turn. All by default.
      device: Who will read the store, and draws it; the first device if None.
      on_progress: Told the bytes done and the bytes to do after every layer.

    Raises:
      BackendError: Host memory, or the part of it that may be pinned, cannot hold the experts.
    """
    device = jax.devices()[0] if device is None else device
    key = jax.device_put(jax.random.key(seed), device)
    made = min(num_layers, num_distinct or num_layers)
    store = _fill(
        layout,
        made,
        lambda number: _draw(jax.random.fold_in(key, number), layout),
        device,
        on_progress,
    )
    return ExpertStore(layout, tuple(store.layers[i % made] for i in range(num_layers)))


def _fill(
    layout: ExpertLayout,
    num_layers: int,
    make_layer: Callable[[int], np.ndarray | Array],
    device: Device | None,
    on_progress: Callable[[int, int], None] | None,
) -> ExpertStore:
    reader = jax.devices()[0] if device is None else device
    is_pinned = reader.platform != "cpu"
    all_bytes = num_layers * layout.layer_bytes
    _check_room(all_bytes, is_pinned=is_pinned)
    place = SingleDeviceSharding(reader, memory_kind="pinned_host" if is_pinned else None)
    layers: list[Array] = []
    for number in range(num_layers):
        done_bytes = number * layout.layer_bytes
        with _explaining(done_bytes, all_bytes):
            # Waiting keeps what is packed but not copied from piling up.
            layers.append(jax.device_put(make_layer(number), place).block_until_ready())
        if on_progress is not None:
            on_progress(done_bytes + layout.layer_bytes, all_bytes)
    return ExpertStore(layout, tuple(layers))


@partial(jax.jit, static_argnums=1)
def _draw(key: Array, layout: ExpertLayout) -> Array:
    return _RANDOM_STD * jax.random.normal(key, layout.shape, jnp.dtype(layout.dtype))


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
