"""Taking samples fairly: warm, in interleaved order, all of them kept."""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Probe = Callable[[int], Any]
"""Called with the number of the round; returns what must be ready before the clock stops."""

Progress = Callable[[int, int, str], None]
"""Called as `progress(num_done, num_all, label)`."""

_NUM_WARM_UPS = 2


def sample_probes(
    probes: Sequence[Probe],
    *,
    num_samples: int,
    seed: int,
    progress: Progress | None = None,
    label: str = "",
) -> list[list[float]]:
    """Times every probe `num_samples` times, end to end from the call until its result is ready.

    Rounds visit all probes in another random order each, so that a slow spell of the machine
    falls on all of them instead of on one. Garbage collection is off meanwhile.

    Args:
      probes: What to time. Warm-up rounds have negative numbers.
      num_samples: Samples per probe.
      seed: Seed of the orders.
      progress: Told after each round.
      label: What the progress is called.

    Returns:
      For each probe its samples in seconds, in the order taken.
    """
    random = np.random.default_rng(seed)
    samples_s: list[list[float]] = [[] for _ in probes]
    for probe in probes:
        for warm_up in range(_NUM_WARM_UPS):
            jax.block_until_ready(probe(warm_up - _NUM_WARM_UPS))
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for round_index in range(num_samples):
            for index in random.permutation(len(probes)):
                samples_s[index].append(_time_s(probes[index], round_index))
            if progress is not None:
                progress(round_index + 1, num_samples, label)
    finally:
        if was_enabled:
            gc.enable()
    return samples_s


def _time_s(probe: Probe, round_index: int) -> float:
    start_s = time.perf_counter()
    jax.block_until_ready(probe(round_index))
    return time.perf_counter() - start_s
