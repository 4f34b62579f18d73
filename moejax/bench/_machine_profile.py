"""A profile of the machine that was measured."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from moejax.cards import HARDWARE, Hardware, load_hardware
from moejax.cost import fit_profile

from ._engine_fit import engine_fit


def machine_profile(
    results: Mapping[str, Any], *, command: str, base: Hardware | None = None
) -> Hardware:
    """The profile that fits what was measured, completed by that of the same kind of device.

    Where an engine ran, its steps count more than the plain programs of the sweeps, which take
    longer than its kernels; on a CPU only if cases are marked for the fit.

    Args:
      results: A run with `environment` and `measured`; of the engine also `engine`, `ceilings`,
        `sizes` and `model`.
      command: What made them.
      base: Profile that supplies what was not measured; None takes that of the same kind of device.

    Returns:
      A profile named `this-machine`, with intervals where an engine ran.

    Raises:
      BadFileError: The measurements cannot be fitted.
    """
    environment, measured = results["environment"], results["measured"]
    base, found = base or _profile_of(environment["device"]), None
    is_marked = any(row.get("fit") for row in results.get("engine", ()))
    if "engine" in results and (environment["backend"] != "cpu" or is_marked):
        found = engine_fit(results, base)
    constants = {} if found is None else found[0] | found[1].constants
    profile = fit_profile(
        [*measured["transfer"], *measured["compute"]],
        base=base,
        name="this-machine",
        title=f"measured on {environment['device']} by {command}",
        known=constants,
    )
    if found is None:
        return profile
    return dataclasses.replace(
        profile,
        # Also what is not determined: the other constants were fitted beside its value.
        constants=MappingProxyType({**profile.constants, **constants}),
        strategy_layer_s=found[1].strategy_layer_s,
        uncertainty=found[1].uncertainty,
    )


def _profile_of(device: str) -> Hardware | None:
    """The profile of this kind of device, which supplies what was not measured; None if none."""
    words = device.lower().replace("-", " ").split()
    return next(
        (load_hardware(name) for name in HARDWARE if set(name.split("-")) <= set(words)), None
    )
