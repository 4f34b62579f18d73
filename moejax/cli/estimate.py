"""`moejax estimate`: what arithmetic says before anything is replayed."""

from typing import Annotated, Any

import typer

from moejax.errors import InfeasibleBudgetError
from moejax.units import format_bytes

from ._options import (
    DEFAULT_HARDWARE,
    DEFAULT_MODEL,
    HardwareOption,
    ModelOption,
    OfflineOption,
    OutputOption,
    parse_size,
)
from ._output import OutputFormat, emit


def estimate(
    model: ModelOption = DEFAULT_MODEL,
    hardware: HardwareOption = DEFAULT_HARDWARE,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=255, help="Requests decoded in lockstep.")
    ] = 1,
    context_tokens: Annotated[
        int, typer.Option("--context-tokens", min=1, help="Tokens in each request's KV cache.")
    ] = 512,
    budget: Annotated[
        str, typer.Option("--budget", metavar="SIZE", help="Device bytes, such as 2GB or 2GiB.")
    ] = "",
    include_dense: Annotated[
        bool,
        typer.Option(
            "--include-dense", help="Dense weights, KV cache and workspace share the budget."
        ),
    ] = False,
    offline: OfflineOption = False,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show a model's sizes and the best and worst decode step that a machine allows.

    Times are those of a cost model, with every expert on the device (all hit) and with every
    expert copied from pinned host memory (all miss). With --budget: the expert slots it buys.

    Example: moejax estimate --model qwen3-30b-a3b --hardware rtx-3090 --budget 8GB
    """
    from moejax import cost
    from moejax.cards import load_hardware, load_model

    spec = load_model(model, offline=offline)
    profile = load_hardware(hardware)
    bounds = cost.estimate(profile, spec, batch_size=batch_size, context_tokens=context_tokens)
    record: dict[str, Any] = {
        "model": spec.name,
        "hardware": profile.title,
        "num_layers": spec.num_moe_layers,
        "num_experts": spec.num_experts,
        "num_experts_per_tok": spec.num_experts_per_tok,
        "expert_bytes": spec.expert_bytes,
        "total_params": spec.total_params,
        "active_params": spec.active_params,
        **bounds._asdict(),
    }
    record |= cost.estimate_intervals(
        profile, spec, batch_size=batch_size, context_tokens=context_tokens
    )
    if profile.uncertainty is None:
        record["intervals"] = f"none: {profile.name} does not say how sure it is"
    if budget:
        smallest_bytes = (
            bounds.smallest_dense_budget_bytes if include_dense else bounds.smallest_budget_bytes
        )
        record |= _slots(parse_size(budget, "--budget"), smallest_bytes, spec.expert_bytes)
        record["slots_per_layer"] = record["num_slots"] / spec.num_moe_layers
        record["warnings"] = _warnings(record["num_slots"], bounds.cliff_slots)
    emit(record, output)


def _slots(budget_bytes: int, smallest_bytes: int, expert_bytes: int) -> dict[str, int]:
    if budget_bytes < smallest_bytes:
        raise InfeasibleBudgetError(
            f"{format_bytes(budget_bytes)} is below the smallest plan of "
            f"{format_bytes(smallest_bytes)}",
            f"Raise --budget to at least {smallest_bytes}B.",
        )
    # The smallest plan holds one expert already.
    num_slots = 1 + (budget_bytes - smallest_bytes) // expert_bytes
    return {"budget_bytes": budget_bytes, "num_slots": num_slots}


def _warnings(num_slots: int, cliff_slots: int) -> list[str]:
    if num_slots >= cliff_slots:
        return []
    return [
        f"an LRU pool of {num_slots} slots is below one step's cycle of {cliff_slots} and would "
        "never hit: raise --budget, or give every layer its own slots (--scope layer)"
    ]
