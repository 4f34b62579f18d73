"""Fits a profile of this machine from the micro-measurements of `moejax bench`.

Copies of every memory class follow latency + bytes / bandwidth. Expert compute follows

    t = fixed + smooth_maximum(bytes / bandwidth, FLOPs / peak),

where `bandwidth` is the device's times the kernel's efficiency: a token sweep sees only the
product, so the efficiency of such a profile is 1 and its `vram_bytes_per_s` is the effective one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from moejax.cards import Constant, Hardware, load_hardware
from moejax.errors import BadFileError

from ._compute import smooth_maximum
from ._fit import fit_log_parameters
from ._fit_copy import fit_copy
from ._fit_csv import copy_constants
from ._rebase import rebase

_COMPUTE_COUNTS = ("num_tokens", "num_experts", "num_bytes", "num_flops")


def fit_profile(
    measurements: Sequence[Mapping[str, Any]],
    *,
    base: Hardware | None = None,
    name: str = "measured",
    title: str = "measured on this machine",
    known: Mapping[str, Constant] | None = None,
) -> Hardware:
    """Fits what the measurements determine; the rest comes from `base`, marked assumed.

    Args:
      measurements: Each either `{"kind": "transfer", "memory": "pinned" | "pageable" | "host",
        "num_bytes", "samples_s"}` or `{"kind": "compute", "num_tokens", "num_experts", "num_bytes",
        "num_flops", "samples_s"}` with bytes and FLOPs of the whole measured call. A machine
        without accelerator has only `host` copies; they then stand for the link as well.
      base: Profile for everything else; None takes that of the RTX 3090.
      name: Name of the new profile.
      title: Its title.
      known: Constants of this machine that were found otherwise: they replace what is fitted.

    Returns:
      The profile, with standard errors.

    Raises:
      BadFileError: A sample or size is not finite and positive, a sweep has too few points, or
        there is nothing to fit.
    """
    base = load_hardware("rtx-3090") if base is None else base
    transfers: dict[str, list[tuple[float, float]]] = {}
    computes: list[tuple[float, ...]] = []
    for index, measurement in enumerate(measurements):
        where = f"measurement {index + 1}"
        kind = measurement.get("kind")
        if kind == "transfer" and measurement.get("memory") in ("pinned", "pageable", "host"):
            point = (_positive(measurement, "num_bytes", where), _median_s(measurement, where))
            transfers.setdefault(measurement["memory"], []).append(point)
        elif kind == "compute":
            counts = [_positive(measurement, count, where) for count in _COMPUTE_COUNTS]
            computes.append((*counts, _median_s(measurement, where)))
        else:
            raise BadFileError(
                f"{where} is of kind {kind!r} and memory {measurement.get('memory')!r}",
                "Known are transfers from pinned, pageable or host memory, and compute.",
            )
    constants = _transfer_constants(transfers) | _compute_constants(computes) | dict(known or {})
    if not constants:
        raise BadFileError(
            "there is no measurement to fit", "Run the benchmark without --no-measure."
        )
    return rebase(base, constants, name=name, title=title, is_same_machine=False)


def _transfer_constants(transfers: Mapping[str, list[tuple[float, float]]]) -> dict[str, Constant]:
    fits = {
        memory: fit_copy(*np.array(points, float).reshape(-1, 2).T)
        for memory, points in transfers.items()
    }
    constants = {}
    link = "pinned" if "pinned" in fits else "host"
    if link in fits:
        what = "copies from pinned memory" if link == "pinned" else "host copies, no accelerator"
        constants |= copy_constants(fits[link], f"fitted to {len(fits[link].rows)} {what}")
    link = "pageable" if "pageable" in fits else "host"
    if link in fits:
        law = copy_constants(fits[link], f"fitted to {len(fits[link].rows)} {link} copies")
        constants["pageable_latency_s"] = law["copy_latency_s"]
        constants["pageable_h2d_bytes_per_s"] = law["pinned_h2d_bytes_per_s"]
    if "host" in fits:
        law = copy_constants(fits["host"], f"fitted to {len(fits['host'].rows)} host copies")
        constants["host_copy_bytes_per_s"] = law["pinned_h2d_bytes_per_s"]
    return constants


def _compute_constants(computes: Sequence[tuple[float, ...]]) -> dict[str, Constant]:
    if not computes:
        return {}
    table = np.array(computes, float)
    work, time_s = table[:, 2:4], table[:, 4]
    initial = np.array([0.1 * time_s.min(), *(work / time_s[:, None]).max(axis=0)])
    fit = fit_log_parameters(_compute_law, initial, work, time_s)
    source = f"fitted to {len(time_s)} expert computations"
    fixed, bandwidth, peak = (
        Constant(float(value), unit, "fitted", float(error), source)
        for value, unit, error in zip(
            fit.parameters, ("s", "B/s", "FLOP/s"), fit.standard_errors, strict=True
        )
    )
    folded = Constant(1.0, "1", "derived", None, "folded into vram_bytes_per_s")
    constants = {"layer_fixed_s": fixed, "vram_bytes_per_s": bandwidth, "matmul_flops": peak}
    # A base's efficiency belongs to the base's bandwidth: both or neither.
    is_seen = fit.standard_errors[1] < fit.parameters[1]
    return constants | ({"kernel_efficiency_ratio": folded} if is_seen else {})


def _compute_law(
    parameters: Float[Array, "3"], inputs: Float[Array, "rows 2"]
) -> Float[Array, " rows"]:
    fixed_s, bytes_per_s, flops = parameters
    return fixed_s + smooth_maximum(inputs[:, 0] / bytes_per_s, inputs[:, 1] / flops)


def _median_s(measurement: Mapping[str, Any], where: str) -> float:
    samples = measurement.get("samples_s")
    if not isinstance(samples, Sequence) or isinstance(samples, str) or not len(samples):
        raise BadFileError(f"{where} has no samples_s", "Each measurement needs its samples.")
    return float(np.median([_finite(sample, f"{where}: a sample") for sample in samples]))


def _positive(measurement: Mapping[str, Any], name: str, where: str) -> float:
    return _finite(measurement.get(name), f"{where}: {name}")


def _finite(value: Any, where: str) -> float:
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise BadFileError(
            f"{where} = {value!r} is not a finite positive number", "Repeat the measurement."
        )
    return float(value)
