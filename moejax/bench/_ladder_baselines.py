"""What simpler laws say of a case: a datasheet's roofline, and two constants that were measured."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from moejax.cost import CountedCase

from ._engine_fit import Row


class Datasheet(NamedTuple):
    """Rates as a vendor states them: device memory, and a PCI Express link in one direction."""

    vram_bytes_per_s: float
    link_bytes_per_s: float


# NVIDIA's datasheets of the SXM cards; 32 GT/s x 16 lanes x 128/130 by PCI Express 5.0.
DATASHEETS: Mapping[str, Datasheet] = MappingProxyType(
    {"H100": Datasheet(3.35e12, 63.0e9), "H200": Datasheet(4.8e12, 63.0e9)}
)
"""By a word of the device's name."""


def baselines(results: Row, row: Row, case: CountedCase) -> dict[str, Any]:
    """Step times of two simpler laws.

    Returns:
      `roofline_s`, the larger of what the datasheet's memory and its link take for the bytes, None
      for a device whose datasheet is not known; and `two_constants_s`, the measured rates of memory
      and link one after the other, with nothing fixed and nothing hidden.
    """
    sizes, ceilings = results["sizes"], results["ceilings"]
    device_bytes = (
        sizes["dense_bytes"]
        + case.batch_size * case.context_tokens * sizes["position_bytes"]
        + case.num_demands * sizes["expert_bytes"]
    )
    num_copies = case.num_misses + case.num_late / 2 + case.num_shadowed
    link_bytes = num_copies * sizes["expert_bytes"]
    words = results["environment"]["device"].replace("-", " ").split()
    sheet = next((DATASHEETS[word] for word in words if word in DATASHEETS), None)
    roofline_s = None
    if sheet is not None:
        device_s = device_bytes / sheet.vram_bytes_per_s
        roofline_s = float(max(device_s, link_bytes / sheet.link_bytes_per_s))
    two_s = device_bytes / ceilings["hbm_bytes_per_s"] + link_bytes / ceilings["link_bytes_per_s"]
    return {"roofline_s": roofline_s, "two_constants_s": float(two_s)}
