"""A profile of the machine that was measured, and what an engine's steps say to it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from moejax.cards import HARDWARE, Constant, Hardware, load_hardware
from moejax.cost import fit_profile

# Steps that are off by more than this share weigh less: some wait for the host.
_USUAL_RATIO = 0.02
_NUM_ROUNDS = 50


def machine_profile(results: Mapping[str, Any], *, command: str) -> Hardware:
    """The profile that fits what was measured, completed by that of the same kind of device.

    Where an engine ran on a device with memory of its own, its steps count more than the plain
    programs of the sweeps, which take longer than its kernels.

    Args:
      results: A run with `environment` and `measured`; of the engine also `engine`, `ceilings`,
        `sizes` and `model`.
      command: What made them.

    Returns:
      A profile named `this-machine`.

    Raises:
      BadFileError: The measurements cannot be fitted.
    """
    environment, measured = results["environment"], results["measured"]
    base, known = _profile_of(environment["device"]), None
    if "engine" in results and environment["backend"] != "cpu":
        step_fixed_s = 0.0 if base is None else base.value("step_fixed_s")
        known = engine_constants(results, step_fixed_s=step_fixed_s)
    return fit_profile(
        [*measured["transfer"], *measured["compute"]],
        base=base,
        name="this-machine",
        title=f"measured on {environment['device']} by {command}",
        known=known,
    )


def engine_constants(results: Mapping[str, Any], *, step_fixed_s: float) -> dict[str, Constant]:
    """Fits a straight line to the steps of `lru` over their misses, one request, layer by layer.

    A step takes what reading the dense weights, keys and values and all demanded experts from
    device memory takes, a fixed time, and for each miss the copy of one expert: the law of
    `moejax.cost.step_latency_s`. What a layer adds to its bytes is the fixed time.

    Args:
      results: What `describe_bench` and `run_cases` give, from a device with memory of its own.
      step_fixed_s: Fixed time of a step beside that of its layers, which steps do not tell apart.

    Returns:
      Constants by name, with standard errors of those that are fitted; none where there are fewer
      than three numbers of misses.
    """
    rows = [row for row in results["engine"] if _is_plain(row)]
    num_misses = np.array([n for row in rows for n in row["steps"]["misses"]], np.float64)
    step_s = np.array([s for row in rows for s in row["step_s"]["samples"]])
    if len(np.unique(num_misses)) < 3:
        return {}
    (base_s, miss_s), (base_error_s, miss_error_s) = _line(num_misses, step_s)
    ceilings, expert_bytes = results["ceilings"], results["sizes"]["expert_bytes"]
    model = results["model"]
    num_layers = round(model["routed_bytes"] / (model["config"]["num_experts"] * expert_bytes))
    read_bytes = rows[0]["device_bytes_per_step"] + rows[0]["misses_per_step"] * expert_bytes
    read_s = read_bytes / ceilings["hbm_bytes_per_s"]
    source = f"fitted to {len(step_s)} steps of lru, batch 1"
    return {
        "vram_bytes_per_s": _measured(ceilings["hbm_bytes_per_s"], "B/s", "device memory read"),
        "matmul_flops": _measured(ceilings["flops_per_s"], "FLOP/s", "a large product"),
        "pinned_h2d_bytes_per_s": _measured(ceilings["link_bytes_per_s"], "B/s", "a layer copied"),
        "kernel_efficiency_ratio": Constant(1.0, "1", "derived", None, "folded into layer_fixed_s"),
        "layer_fixed_s": Constant(
            float(base_s - read_s - step_fixed_s) / num_layers,
            "s",
            "fitted",
            float(base_error_s) / num_layers,
            f"{source}: what a step without misses adds to its bytes",
        ),
        "copy_latency_s": Constant(
            float(miss_s) - expert_bytes / ceilings["link_bytes_per_s"],
            "s",
            "fitted",
            float(miss_error_s),
            f"{source}: what a miss adds, less its bytes over the link",
        ),
    }


def _profile_of(device: str) -> Hardware | None:
    """The profile of this kind of device, which supplies what was not measured; None if none."""
    words = device.lower().replace("-", " ").split()
    return next(
        (load_hardware(name) for name in HARDWARE if set(name.split("-")) <= set(words)), None
    )


def _is_plain(row: Mapping[str, Any]) -> bool:
    kind = (row["strategy"], row["scope"], row["batch_size"])
    return row["replayed"] and kind == ("lru", "layer", 1)


def _line(
    x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]
) -> tuple[Float[np.ndarray, "2"], Float[np.ndarray, "2"]]:
    """Intercept and slope by relative errors, robust against outliers, and standard errors.

    Reference:
      Huber, "Robust estimation of a location parameter", 1964; by reweighted least squares.
    """
    design, weight = np.stack([np.ones_like(x), x], axis=1) / y[:, None], np.ones_like(y)
    found = np.zeros(2)
    for _ in range(_NUM_ROUNDS):
        root = np.sqrt(weight)
        found, *_ = np.linalg.lstsq(design * root[:, None], root, rcond=None)
        left = design @ found - 1
        weight = np.minimum(1.0, _USUAL_RATIO / np.maximum(np.abs(left), 1e-12))
    variance = (weight * left**2).sum() / (len(x) - 2)
    covariance = np.linalg.inv((design * weight[:, None]).T @ design) * variance
    return found, np.sqrt(np.diag(covariance))


def _measured(value: float, unit: str, what: str) -> Constant:
    return Constant(value, unit, "measured", None, f"{what}, the fastest sample of the run")
