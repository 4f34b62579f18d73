"""What joins the devices of a machine, added to the profile of one of them."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from moejax.cards import Constant, Hardware
from moejax.errors import BadFileError

from ._fit_copy import fit_copy


def fit_devices(
    base: Hardware,
    num_devices: int,
    all_reduce_s: Mapping[int, float],
    *,
    alone_bytes_per_s: float,
    beside_bytes_per_s: float,
) -> Hardware:
    """The profile `base` with the constants of several devices.

    Sizes that tell no bandwidth, such as one alone or a larger one that takes no longer, give the
    latency of an all-reduce only.

    Args:
      base: Profile of one device.
      num_devices: How many were measured.
      all_reduce_s: Time of an all-reduce of so many bytes.
      alone_bytes_per_s: Rate of one link while the others are idle.
      beside_bytes_per_s: Rate of each while all of them copy.

    Raises:
      BadFileError: There is no all-reduce, or a number is not finite and positive.
    """
    numbers = [*all_reduce_s, *all_reduce_s.values(), alone_bytes_per_s, beside_bytes_per_s]
    if wrong := [number for number in numbers if not (math.isfinite(number) and number > 0)]:
        raise BadFileError(
            f"a size, time or rate of {num_devices} devices is {wrong[0]}", "Measure them again."
        )
    if not all_reduce_s:
        raise BadFileError(f"no all-reduce of {num_devices} devices was measured")
    what = f"of {num_devices} devices"
    # Two links that copy no slower than one differ by noise.
    ratio = min(1.0, beside_bytes_per_s / alone_bytes_per_s)
    beside = Constant(ratio, "1", "measured", None, f"links {what}, all copying over one alone")
    found = _all_reduce(all_reduce_s, what) | {"links_beside_ratio": beside}
    return dataclasses.replace(base, constants=MappingProxyType({**base.constants, **found}))


def _all_reduce(times_s: Mapping[int, float], what: str) -> dict[str, Constant]:
    """Through two sizes a line, to more of them a fit."""
    num_bytes, time_s = (np.array(list(values), float) for values in (times_s, times_s.values()))
    latency_name, rate_name = "all_reduce_latency_s", "all_reduce_bytes_per_s"
    if len(num_bytes) > 2:
        law = fit_copy(num_bytes, time_s)
        latency_error_s, error = law.latency_standard_error_s, law.bytes_per_s_standard_error
        if latency_error_s < law.latency_s and error < law.bytes_per_s:
            source = f"latency + bytes / bandwidth fitted to {len(num_bytes)} all-reduces {what}"
            return {
                latency_name: Constant(law.latency_s, "s", "fitted", latency_error_s, source),
                rate_name: Constant(law.bytes_per_s, "B/s", "fitted", error, source),
            }
    if len(num_bytes) == 2:
        slope, latency_s = np.polyfit(num_bytes, time_s, 1)
        if slope > 0 and latency_s > 0:
            source = f"latency + bytes / bandwidth through two sizes of all-reduces {what}"
            return {
                latency_name: Constant(float(latency_s), "s", "measured", None, source),
                rate_name: Constant(float(1 / slope), "B/s", "measured", None, source),
            }
    source = f"median of {len(num_bytes)} sizes of all-reduces {what}, which tell no bandwidth"
    return {latency_name: Constant(float(np.median(time_s)), "s", "measured", None, source)}
