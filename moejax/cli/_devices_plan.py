"""A plan for several devices, for people."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moejax.units import format_bytes, format_ratio, format_seconds

from ._output import OutputFormat, emit

if TYPE_CHECKING:
    from moejax.tune import DevicesPlan, TierPlan


def show_devices_plan(plan: "DevicesPlan", hardware: str) -> None:
    """What to set on each device, then what it buys."""
    number = plan.num_devices
    title = f"{plan.model}, {plan.strategy}, on each of {number} devices: {hardware}"
    emit(tier_rows(plan.tiers), OutputFormat.table, title=title)
    lines = {
        "step latency": format_seconds(plan.step_latency_s),
        "one device with the same budget": format_seconds(plan.one_device_step_latency_s),
        "times as fast as that": f"{plan.speedup_ratio:.3g}",
        f"what {number} links and memories need": format_seconds(plan.links_and_memories_s),
        "all-reduce of one layer": format_seconds(plan.all_reduce_s),
        "same slots for every layer": format_seconds(plan.uniform_step_latency_s),
        "gain over that": format_ratio(plan.gain_over_uniform_ratio),
        "hit ratio": format_ratio(plan.hit_ratio),
        "fetched a step, by all": format_bytes(plan.fetched_bytes),
        "used of each budget": f"{format_bytes(plan.used_bytes)} of "
        f"{format_bytes(plan.budget_bytes)}",
    }
    for name, value in lines.items():
        print(f"{name:36} {value}")
    for warning in plan.warnings:
        print(f"note: {warning}")


def tier_rows(tiers: "Sequence[TierPlan]") -> list[dict[str, Any]]:
    """A row for each memory tier of a plan."""
    return [
        {
            "tier": tier.name,
            "memory": tier.memory,
            "capacity_bytes": tier.capacity_bytes,
            "slots": sum(tier.experts_per_layer),
            "slots_per_layer": _span(tier.experts_per_layer),
        }
        for tier in tiers
    ]


def _span(slots: tuple[int, ...]) -> str:
    low, high = min(slots), max(slots)
    return str(low) if low == high else f"{low} to {high}: {' '.join(map(str, slots))}"
