"""How long copies take on this machine, by kind of memory and size."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, UInt8

from ._measure_sample import Probe, Progress, sample_probes

_SMALLEST_BYTES = 64 * 2**10
_LARGEST_BYTES = 256 * 2**20
_LARGEST_QUICK_BYTES = 16 * 2**20
_NUM_SAMPLES = 15
_NUM_QUICK_SAMPLES = 9
_MAX_COPIES = 32
_PAGE_BYTES = 4096


def measure_transfers(
    *, quick: bool, seed: int, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Times copies of 64 KiB to 256 MiB (`quick`: 16 MiB), doubling the size.

    `memory="host"` (`direction="h2h"`) is one thread's copy between two buffers, and with an
    accelerator `pageable` is `jax.device_put` of a plain array, both end to end; each sample takes
    another part of the buffer, so small copies do not come out of the processor's cache. `pinned`
    is one of up to 32 copies out of pinned host memory that a single program makes one after
    another, since a decode step does not pay Python's dispatch for every expert.

    Returns:
      One record per memory and size: `kind`, `memory`, `direction`, `num_bytes`,
      `num_copies_per_sample`, `samples_s` (each for one copy), `median_s`,
      `bandwidth_bytes_per_s`.
    """
    device = jax.devices()[0]
    largest_bytes = _LARGEST_QUICK_BYTES if quick else _LARGEST_BYTES
    num_doublings = (largest_bytes // _SMALLEST_BYTES).bit_length()
    sizes = [_SMALLEST_BYTES << doubling for doubling in range(num_doublings)]
    source = np.random.default_rng(seed).integers(0, 256, largest_bytes, np.uint8)
    target = np.zeros_like(source)
    cases = [_Case("host", size, 1, partial(_copy_host, source, target, size)) for size in sizes]
    if device.platform != "cpu":
        cases += _device_cases(source, sizes, device)
    samples_s = sample_probes(
        [case.probe for case in cases],
        num_samples=_NUM_QUICK_SAMPLES if quick else _NUM_SAMPLES,
        seed=seed,
        progress=progress,
        label="copies",
    )
    return [_record(case, samples) for case, samples in zip(cases, samples_s, strict=True)]


class _Case(NamedTuple):
    memory: str
    num_bytes: int
    num_copies: int
    probe: Probe


def _device_cases(
    source: UInt8[np.ndarray, " bytes"], sizes: list[int], device: Any
) -> list[_Case]:
    cases = [
        _Case("pageable", size, 1, partial(_copy_pageable, source, size, device)) for size in sizes
    ]
    if any(memory.kind == "pinned_host" for memory in device.addressable_memories()):
        sharding = SingleDeviceSharding(device, memory_kind="pinned_host")
        for size in sizes:
            pinned = jax.device_put(source[:size], sharding)
            num_copies = min(_MAX_COPIES, max(1, len(source) // size))
            program = _to_device.lower((pinned,) * num_copies).compile()
            probe = partial(_copy_pinned, program, pinned, num_copies)
            cases.append(_Case("pinned", size, num_copies, probe))
    return cases


def _copy_host(
    source: UInt8[np.ndarray, " bytes"],
    target: UInt8[np.ndarray, " bytes"],
    num_bytes: int,
    round_index: int,
) -> None:
    start = _offset(len(source), num_bytes, round_index)
    np.copyto(target[start : start + num_bytes], source[start : start + num_bytes])


def _copy_pageable(
    source: UInt8[np.ndarray, " bytes"], num_bytes: int, device: Any, round_index: int
) -> Array:
    start = _offset(len(source), num_bytes, round_index)
    return jax.device_put(source[start : start + num_bytes], device)


def _copy_pinned(
    program: Any, source: UInt8[Array, " bytes"], num_copies: int, round_index: int
) -> tuple[Array, ...]:
    del round_index  # The device reads pinned pages itself, past the processor's cache.
    return program((source,) * num_copies)


@jax.jit
def _to_device(sources: tuple[UInt8[Array, " bytes"], ...]) -> tuple[UInt8[Array, " bytes"], ...]:
    return tuple(jax.device_put(source, jax.memory.Space.Device) for source in sources)


def _offset(buffer_bytes: int, num_bytes: int, round_index: int) -> int:
    num_places = (buffer_bytes - num_bytes) // _PAGE_BYTES + 1
    # A large odd stride walks the whole buffer before it comes back.
    return (round_index * 7919) % num_places * _PAGE_BYTES


def _record(case: _Case, samples_s: list[float]) -> dict[str, Any]:
    copy_samples_s = [sample_s / case.num_copies for sample_s in samples_s]
    median_s = float(np.median(copy_samples_s))
    return {
        "kind": "transfer",
        "memory": case.memory,
        "direction": "h2h" if case.memory == "host" else "h2d",
        "num_bytes": case.num_bytes,
        "num_copies_per_sample": case.num_copies,
        "samples_s": copy_samples_s,
        "median_s": median_s,
        "bandwidth_bytes_per_s": case.num_bytes / median_s,
    }
