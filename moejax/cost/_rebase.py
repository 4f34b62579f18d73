"""Puts measured constants into a profile whose other constants come from elsewhere."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from moejax.cards import Constant, Hardware


def rebase(
    base: Hardware,
    constants: Mapping[str, Constant],
    *,
    name: str,
    title: str,
    is_same_machine: bool,
) -> Hardware:
    """A profile with `constants` in place of the base's; the order of the base is kept.

    On another machine the base's remaining constants are only assumptions and are marked so.
    A constant whose standard error reaches its value was not determined by its measurements: the
    base's stays.
    """
    merged = {}
    for key, constant in base.constants.items():
        fitted = constants.get(key)
        if fitted is not None and _is_determined(fitted):
            merged[key] = fitted
        elif is_same_machine:
            merged[key] = constant
        else:
            reason = "the measurements do not determine it" if fitted else "not measured"
            source = f"{reason}; taken from profile {base.name} ({constant.kind})"
            merged[key] = dataclasses.replace(
                constant, kind="assumed", standard_error=None, source=source
            )
    new = {key: value for key, value in constants.items() if key not in merged}
    merged |= {key: value for key, value in new.items() if _is_determined(value)}
    return Hardware(
        name=name,
        title=title,
        constants=MappingProxyType(merged),
        source=f"measured constants beside those of profile {base.name}",
        note="Constants of kind assumed were not measured on this machine.",
    )


def _is_determined(constant: Constant) -> bool:
    return constant.standard_error is None or constant.standard_error < constant.value
