"""How many experts the device holds: plans that a budget buys, and plans that a tuner wrote."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from moejax.errors import BadFileError, InfeasibleBudgetError, UsageError
from moejax.units import format_bytes

Scope: TypeAlias = Literal["layer", "pool"]
"""Who shares slots: the experts of one layer, or those of all."""

SCOPES: tuple[str, ...] = get_args(Scope)

# Plans take a few kilobytes.
_MAX_PLAN_BYTES = 10**7
_PLAN_HINT = "Make one with: moejax tune-cache --budget SIZE --out plan.json"


class SlotPlan(NamedTuple):
    """How many experts stay on the device.

    Attributes:
      scope: `layer` where every layer has slots of its own, `pool` where all share them.
      slots: Slots of each layer, 0 of one that keeps nothing; of a pool their one number.
    """

    scope: Scope
    slots: tuple[int, ...]

    @property
    def num_slots(self) -> int:
        """Slots of all layers together."""
        return sum(self.slots)


class StoredPlan(NamedTuple):
    """A plan of a file, and the strategy that it was made for."""

    plan: SlotPlan
    strategy: str


def even_plan(
    num_layers: int,
    num_experts: int,
    *,
    expert_bytes: int,
    slots: int | None = None,
    budget_bytes: int | None = None,
    fixed_bytes: int = 0,
    scope: Scope = "layer",
) -> SlotPlan:
    """As many slots for every layer; what a budget leaves buys one more for the first layers.

    Args:
      num_layers: Layers that have experts.
      num_experts: Experts of a layer; more slots than experts are useless and not made.
      expert_bytes: Bytes of one expert.
      slots: Slots of each layer, of a pool those of all layers; or give `budget_bytes`.
      budget_bytes: Device bytes to spend.
      fixed_bytes: What else is paid from the budget, see `fixed_bytes`.
      scope: Who shares the slots.

    Raises:
      UsageError: Neither or both of slots and budget are given, or there are too many slots.
      InfeasibleBudgetError: The budget does not hold one expert beside what is fixed.
    """
    if (slots is None) == (budget_bytes is None):
        raise UsageError("slots and a budget exclude each other", "Give one of the two.")
    most = num_layers * num_experts
    if slots is not None:
        limit = most if scope == "pool" else num_experts
        if not 1 <= slots <= limit:
            where = "all layers" if scope == "pool" else "a layer"
            raise UsageError(
                f"{slots} slots for the {limit:,} experts of {where}",
                f"Take from 1 to {limit:,} slots.",
            )
        num_slots = slots if scope == "pool" else num_layers * slots
    else:
        assert budget_bytes is not None
        num_slots = min(most, _slots_within(budget_bytes, fixed_bytes, expert_bytes))
    if scope == "pool":
        return SlotPlan("pool", (num_slots,))
    each, left = divmod(num_slots, num_layers)
    return SlotPlan("layer", tuple(each + (layer < left) for layer in range(num_layers)))


def fixed_bytes(
    *,
    dense_bytes: int,
    kv_bytes_per_token: int,
    batch_size: int,
    num_positions: int,
    workspace_bytes: int,
) -> int:
    """What the device holds beside expert slots.

    Args:
      dense_bytes: All weights but the routed experts.
      kv_bytes_per_token: Keys and values of one token in all layers.
      batch_size: Requests that decode in lockstep.
      num_positions: Tokens that the cache of each request has room for.
      workspace_bytes: What programs need while they run.
    """
    return dense_bytes + batch_size * num_positions * kv_bytes_per_token + workspace_bytes


def read_plan(
    path: Path,
    *,
    model: str,
    num_layers: int,
    num_experts: int,
    scope: Scope = "layer",
    num_devices: int = 1,
) -> StoredPlan:
    """Reads the device tier of a plan that `moejax tune-cache --out` wrote.

    Slots in which prefetches land are among those of the device tier.

    Args:
      path: The file.
      model: Name of the model that will run.
      num_layers: Its layers that have experts.
      num_experts: Experts of one of them, on each device.
      scope: `pool` gives all layers together the slots that the plan gives each.
      num_devices: Devices that share the experts, each with these slots.

    Raises:
      BadFileError: The file cannot be read, is not such a plan, or contradicts itself.
      UsageError: It is a plan of another model, or for more or fewer devices.
    """
    table = _read_table(path)
    slots = _device_slots(table, path)
    planned_for, strategy = table.get("model"), table.get("strategy")
    if not isinstance(planned_for, str) or not isinstance(strategy, str):
        raise BadFileError(f"{path} does not name its model and its strategy", _PLAN_HINT)
    is_same = _plain(planned_for) == _plain(model)
    if not is_same or len(slots) != num_layers or max(slots) > num_experts:
        raise UsageError(
            f"{path} is a plan of {planned_for} with {len(slots)} layers and up to {max(slots)} "
            f"slots; {model} has {num_layers} layers of {num_experts} experts",
            f"Make a plan of this model: moejax tune-cache --model {model} --out plan.json ...",
        )
    planned = table.get("num_devices", 1)
    if planned != num_devices:
        raise UsageError(
            f"{path} is a plan for {planned!r:.40} device(s), not for {num_devices}",
            f"Run it with --devices {planned!r:.40}, or plan with --devices {num_devices}.",
        )
    if not any(slots):
        raise BadFileError(f"{path} keeps no expert on the device", _PLAN_HINT)
    plan = SlotPlan("pool", (sum(slots),)) if scope == "pool" else SlotPlan("layer", slots)
    return StoredPlan(plan, strategy)


def describe_cliff(
    plan: SlotPlan, *, num_layers: int, num_demands: int, expert_bytes: int
) -> str | None:
    """What to say before a pool runs that is smaller than one step's cycle through the layers.

    There each layer evicts what the next step will ask for first. Slots of single layers have no
    such cliff.

    Args:
      plan: The plan.
      num_layers: Layers that have experts.
      num_demands: Distinct experts that a step demands of a layer.
      expert_bytes: Bytes of one expert.

    Returns:
      The warning; None where there is nothing to warn of.
    """
    cycle = (num_layers - 1) * num_demands + 1
    if plan.scope == "layer" or plan.num_slots >= cycle:
        return None
    return (
        f"a pool of {plan.num_slots} experts ({format_bytes(plan.num_slots * expert_bytes)}) is "
        f"below one step's cycle of {cycle}, and an LRU pool would hardly hit. Raise it or use "
        "--scope layer"
    )


def _slots_within(budget_bytes: int, fixed: int, expert_bytes: int) -> int:
    smallest_bytes = fixed + expert_bytes
    if budget_bytes < smallest_bytes:
        what = f"one expert of {format_bytes(expert_bytes)}"
        if fixed:
            what += f" beside {format_bytes(fixed)} of other weights, cache and workspace"
        raise InfeasibleBudgetError(
            f"a budget of {format_bytes(budget_bytes)} does not hold {what}",
            f"The smallest feasible budget is {smallest_bytes}B ({format_bytes(smallest_bytes)}).",
        )
    return (budget_bytes - fixed) // expert_bytes


def _read_table(path: Path) -> dict[str, Any]:
    try:
        # A pipe or a device would block or never end, hence the question before opening.
        if not path.is_file():
            raise BadFileError(f"{path} is missing or not a file", _PLAN_HINT)
        if path.stat().st_size > _MAX_PLAN_BYTES:
            raise BadFileError(f"{path} is too large for a plan", _PLAN_HINT)
        table = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise BadFileError(
            f"{path} cannot be read: {error.strerror or error}", _PLAN_HINT
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{path} is no sound JSON: {error}", _PLAN_HINT) from error
    if not isinstance(table, dict):
        raise BadFileError(f"{path} is not a plan: it holds no table", _PLAN_HINT)
    return table


def _device_slots(table: dict[str, Any], path: Path) -> tuple[int, ...]:
    tiers = table.get("tiers")
    device = [
        tier
        for tier in (tiers if isinstance(tiers, list) else [])
        if isinstance(tier, dict) and tier.get("memory") == "device"
    ]
    slots = device[0].get("experts_per_layer") if len(device) == 1 else None
    if not isinstance(slots, list) or not slots:
        raise BadFileError(f"{path} is not a plan: it has no one device tier", _PLAN_HINT)
    # bool is an int to Python, but `true` is no number of slots.
    wrong = next((number for number in slots if type(number) is not int or number < 0), None)
    if wrong is not None:
        raise BadFileError(f"{path} gives a layer {wrong!r:.40} slots", _PLAN_HINT)
    return tuple(slots)


def _plain(name: str) -> str:
    """A model's name without its organisation and capitals."""
    return name.rpartition("/")[2].lower()
