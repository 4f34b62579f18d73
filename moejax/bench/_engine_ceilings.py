"""The rates that bound an engine on this machine: the link, device memory, matrix products."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Shaped

from moejax.results import Measurement

from ._measure_sample import sample_probes

_NUM_SAMPLES = 7
_NUM_CALLS = 8
"""Programs in flight in one sample, so that none waits for its launch."""

_READ_BYTES, _CPU_READ_BYTES = 2**31, 2**26
_COPY_BYTES = 2**26
_SIDE, _CPU_SIDE = 2**13, 2**9
_MAX_THREADS = 8
_THREAD_BYTES = 2**27


class Ceilings(NamedTuple):
    """What no decode step can go beyond: the fastest samples of this run.

    Attributes:
      link_bytes_per_s: Copies of a whole layer's experts from where the store keeps them.
      hbm_bytes_per_s: Reads of device memory, by a reduction or by a matrix times a vector,
        whichever is faster.
      flops_per_s: A large product of square matrices in the model's type.
      samples: What the rates were computed from.
    """

    link_bytes_per_s: float
    hbm_bytes_per_s: float
    flops_per_s: float
    samples: dict[str, Measurement]


def measure_ceilings(
    layer: Shaped[Array, "experts ffn3 hidden"], head_shape: tuple[int, int], *, seed: int = 0
) -> Ceilings:
    """Measures all three; needs some 3 GB of device memory on an accelerator.

    Args:
      layer: A layer of the expert store.
      head_shape: Rows and columns of the matrix that stands for the head.
      seed: Seed of the order of the samples.
    """
    is_cpu = jax.default_backend() == "cpu"
    dtype = layer.dtype
    width = _power_of_2_root((_CPU_READ_BYTES if is_cpu else _READ_BYTES) // dtype.itemsize)
    large = jnp.ones((width, width), dtype)
    head, vector = jnp.ones(head_shape, dtype), jnp.ones(head_shape[1], dtype)
    side = _CPU_SIDE if is_cpu else _SIDE
    square = jnp.ones((side, side), dtype)
    source = _copy_source(layer)
    # Times are of one call, bytes and operations too.
    probes = {
        "link": partial(_copy_to_device, source),
        "reduction": partial(_call, jax.jit(lambda x: x.max(axis=1)), large),
        "head": partial(_call, jax.jit(jnp.dot), head, vector),
        "product": partial(_call, jax.jit(jnp.dot), square, square),
    }
    taken = sample_probes(list(probes.values()), num_samples=_NUM_SAMPLES, seed=seed)
    samples = {
        name: Measurement(name, "s", tuple(s / (1 if name == "link" else _NUM_CALLS) for s in each))
        for name, each in zip(probes, taken, strict=True)
    }
    rates = [
        large.nbytes / min(samples["reduction"].samples),
        head.nbytes / min(samples["head"].samples),
    ]
    return Ceilings(
        link_bytes_per_s=source.nbytes / min(samples["link"].samples),
        hbm_bytes_per_s=max(rates),
        flops_per_s=2 * side**3 / min(samples["product"].samples),
        samples=samples,
    )


def measure_host_reads(
    layer: Shaped[Array, "experts ffn3 hidden"], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Times a program that reads one expert of the store at a time, host idle and host busy.

    The program picks the expert by number, as a decode step does. Busy means that threads read
    host memory all the while.

    Returns:
      A record each for the idle and the busy host: `kind`, `memory`, `is_host_busy`,
      `num_bytes` (of one expert), `num_copies_per_sample`, `samples_s` (each for one expert),
      `median_s`, `bandwidth_bytes_per_s`.
    """
    num_copies = min(_NUM_CALLS, layer.shape[0])
    numbers = [jnp.int32(number) for number in range(num_copies)]
    records = []
    for is_busy in (False, True):
        with _busy_host() if is_busy else nullcontext():
            (taken,) = sample_probes(
                [lambda _: [_fetch(layer, number) for number in numbers]],
                num_samples=_NUM_SAMPLES,
                seed=seed,
            )
        samples_s = [sample_s / num_copies for sample_s in taken]
        median_s = float(np.median(samples_s))
        num_bytes = layer.nbytes // layer.shape[0]
        records.append(
            {
                "kind": "host_read",
                "memory": layer.sharding.memory_kind,
                "is_host_busy": is_busy,
                "num_bytes": num_bytes,
                "num_copies_per_sample": num_copies,
                "samples_s": samples_s,
                "median_s": median_s,
                "bandwidth_bytes_per_s": num_bytes / median_s,
            }
        )
    return records


def _copy_source(layer: Array) -> Any:
    """The layer itself; on a CPU, where nothing is far, a plain array of some size."""
    if jax.default_backend() == "cpu":
        return np.ones(max(_COPY_BYTES, layer.nbytes), np.uint8)
    return layer


def _copy_to_device(source: Any, round_index: int) -> Array:
    del round_index
    if isinstance(source, np.ndarray):
        # Without a copy JAX would take over the array as it is.
        return jnp.array(source, copy=True)
    device = next(iter(source.devices()))
    return jax.device_put(source, SingleDeviceSharding(device, memory_kind="device"))


def _call(program: Any, *arguments: Any) -> list[Array]:
    # The number of the round comes last.
    return [program(*arguments[:-1]) for _ in range(_NUM_CALLS)]


@jax.jit
def _fetch(layer: Shaped[Array, "experts ffn3 hidden"], number: Array) -> Array:
    expert = jax.lax.dynamic_index_in_dim(layer, number, keepdims=False)
    return jax.device_put(expert, jax.memory.Space.Device)


def _power_of_2_root(size: int) -> int:
    """Side of the largest square of a power of two that has no more entries."""
    return 1 << ((size.bit_length() - 1) // 2)


@contextmanager
def _busy_host() -> Iterator[None]:
    """Threads that read host memory until the block ends."""
    is_over = threading.Event()

    def read() -> None:
        values = np.ones(_THREAD_BYTES // 8)
        while not is_over.is_set():
            values.max()

    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    threads = [threading.Thread(target=read, daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
