"""Everything beyond the grid and the audit, small enough to run beside them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.bench._grid import GridSettings, Progress, draw_runs
from moejax.bench._requests import Requests
from moejax.cards import Hardware, ModelSpec
from moejax.results import to_plain
from moejax.strategies import STRATEGIES, Profile

from ._cells import Wanted, ends, simulate_cells, told
from ._gpus import (
    MOST_RUNS,
    cells_of_cards,
    describe_card,
    load_cards,
    room_on,
    rooms_of_models,
)
from ._hybrids import HYBRIDS, cautious
from ._models import cells_of_shares, describe, run_other_model
from ._top_k import run_top_k

_MOST_RUNS = 3
"""Draws but for cards, which have fewer, and hybrids, which have all that they are paired with."""

_FEW_SLOTS = (1, 2, 4, 8)
_SHARES_RATIO = (0.25, 0.75)


def run_further(
    settings: GridSettings,
    model: ModelSpec,
    hardware: Hardware,
    requests: Requests,
    profile: Profile,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs the experiments that the study left open, on the first draws of the grid.

    Args:
      settings: The grid's, with the strategies to compare.
      model: Card of the run's model.
      hardware: Profile of the run.
      requests: The run's.
      profile: What they teach.
      progress: Told before each strategy.

    Returns:
      For `results.json`: `capacities` (other cache sizes), `gpus` (six cards), `models` (another
      model beside this one), `hybrids` (wrapped strategies) and `top_k` (K and top-k of 4, 8 and
      16), each with `settings` and `cells`, whose fields are lists over runs.
    """
    # Every speedup is over what keeps nothing.
    settings = dataclasses.replace(
        settings, strategies=tuple(dict.fromkeys(("on_demand", *settings.strategies)))
    )
    few = dataclasses.replace(settings, num_runs=min(settings.num_runs, _MOST_RUNS))
    draws = draw_runs(requests, settings)
    cards, sizes = load_cards(), ends(settings.batch_sizes)
    layer_bytes = None
    if draws[0].expert_bytes is not None:
        layer_bytes = float(draws[0].expert_bytes.sum())
    rooms = [
        room_on(card, model, size, settings.context_tokens, layer_bytes)
        for card in cards
        for size in sizes
    ]
    wanted = {
        "capacities": _capacities(settings, model, hardware),
        "gpus": cells_of_cards(cards, rooms, settings.slots, model.num_moe_layers),
        "models": cells_of_shares(model, hardware, sizes),
    }
    cells = _split(
        wanted,
        simulate_cells(
            {name: STRATEGIES[name].make(profile) for name in settings.strategies},
            [one for several in wanted.values() for one in several],
            model,
            draws[: few.num_runs],
            few,
            what="sizes and cards",
            progress=progress,
        ),
    )
    share_ratio = max(settings.slots) / 2 / model.num_experts
    other, cells_of_other = run_other_model(
        model, hardware, dataclasses.replace(few, batch_sizes=sizes), progress=progress
    )
    hybrids = simulate_cells(
        {name: hybrid.make(profile, share_ratio) for name, hybrid in HYBRIDS.items()},
        [
            Wanted(machine, size, settings.slots, {"host": host})
            for host, machine in (("stated", hardware), ("cautious", cautious(hardware)))
            for size in sizes
        ],
        model,
        draws,
        settings,
        what="hybrids",
        progress=progress,
    )
    found = {
        "capacities": {"settings": told(few), "cells": cells["capacities"]},
        "gpus": {
            "settings": told(few) | {"num_runs": MOST_RUNS},
            "cards": [describe_card(card) for card in cards],
            "rooms": rooms,
            "rooms_of_models": rooms_of_models(cards, sizes, settings.context_tokens),
            "cells": cells["gpus"],
        },
        "models": {
            "settings": told(few),
            "models": [describe(model, requests.workload), other],
            "cells": cells["models"] + cells_of_other,
        },
        "hybrids": {
            "settings": told(settings) | {"pinned_share_ratio": share_ratio},
            "parts": {name: list(hybrid.parts) for name, hybrid in HYBRIDS.items()},
            "cells": hybrids,
        },
        "top_k": run_top_k(few, progress=progress),
    }
    return to_plain(found)


def _capacities(settings: GridSettings, model: ModelSpec, hardware: Hardware) -> list[Wanted]:
    """Other cache sizes than the grid's, which has that one with more draws."""
    shares = (round(share * model.num_experts) for share in _SHARES_RATIO)
    choices = sorted({*_FEW_SLOTS, *shares} - {max(settings.slots)})
    return [
        Wanted(hardware, size, (slots,) * model.num_moe_layers)
        for slots in choices
        if slots <= model.num_experts
        for size in settings.batch_sizes
    ]


def _split(
    wanted: Mapping[str, Sequence[Wanted]], cells: Sequence[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Gives every experiment its cells back; they lie strategy by strategy."""
    owners = [name for name, several in wanted.items() for _ in several]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    for index, cell in enumerate(cells):
        found[owners[index % len(owners)]].append(cell)
    return found
