"""What an all-reduce takes on a machine, added to the profile of one of its devices."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from moejax.cards import Constant, Hardware
from moejax.errors import BadFileError

from ._fit_copy import fit_copy

# A law of two constants needs a size more than it has constants.
_LEAST_SIZES = 3


def fit_all_reduce(records: Sequence[Mapping[str, Any]], base: Hardware) -> Hardware:
    """The profile `base` with the constants of an all-reduce.

    Sizes that do not tell a bandwidth, such as one alone or none that takes longer than another,
    give the latency only.

    Args:
      records: Each of a size: `num_devices`, `all_reduce_bytes` and `all_reduce_s`, seconds or a
        measurement with `samples`. All of them are of the same number of devices.
      base: Profile of one device.

    Raises:
      BadFileError: A number is missing or not positive, or the numbers of devices differ.
    """
    if not records:
        raise BadFileError("there is no all-reduce to fit", "Measure two devices or more.")
    counts = {record.get("num_devices") for record in records}
    if len(counts) > 1:
        raise BadFileError(
            f"all-reduces over {sorted(map(str, counts))} devices are not one law",
            "Keep the records of one number of devices.",
        )
    num_bytes = np.array([_number(record, "all_reduce_bytes") for record in records])
    time_s = np.array([_number(record, "all_reduce_s") for record in records])
    source = f"{len(records)} all-reduces over {counts.pop()} devices"
    return dataclasses.replace(
        base,
        constants=MappingProxyType({**base.constants, **_constants(num_bytes, time_s, source)}),
    )


def _constants(num_bytes: np.ndarray, time_s: np.ndarray, source: str) -> dict[str, Constant]:
    if len(np.unique(num_bytes)) >= _LEAST_SIZES:
        law = fit_copy(num_bytes, time_s)
        latency_error_s, error = law.latency_standard_error_s, law.bytes_per_s_standard_error
        if latency_error_s < law.latency_s and error < law.bytes_per_s:
            source = f"latency + bytes / bandwidth fitted to {source}"
            return {
                "all_reduce_latency_s": Constant(
                    law.latency_s, "s", "fitted", latency_error_s, source
                ),
                "all_reduce_bytes_per_s": Constant(law.bytes_per_s, "B/s", "fitted", error, source),
            }
    latency_s = float(np.median(time_s))
    source = f"median of {source}, which tell no bandwidth"
    return {"all_reduce_latency_s": Constant(latency_s, "s", "measured", None, source)}


def _number(record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    if isinstance(value, Mapping):
        samples = value.get("samples")
        value = float(np.median(samples)) if isinstance(samples, list) and samples else None
    if isinstance(value, int | float) and math.isfinite(value) and value > 0:
        return float(value)
    raise BadFileError(
        f"{name} = {record.get(name)!r} is not a positive number", "Repeat the measurement."
    )
