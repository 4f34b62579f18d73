"""Six cards: what fits on each, and what each cell of them costs."""

from collections.abc import Sequence
from typing import Any

from moejax.cards import HARDWARE, Hardware, ModelSpec, load_hardware, load_model
from moejax.cost import workspace_bytes
from moejax.workloads import WORKLOADS

from ._cells import Wanted

MOST_RUNS = 1
"""Draws of requests; cards differ by far more than draws."""


def load_cards() -> list[Hardware]:
    """Every shipped profile of a GPU, smallest memory first."""
    cards = [load_hardware(name) for name in HARDWARE]
    return sorted(cards, key=lambda card: (card.value("vram_bytes"), card.name))


def describe_card(card: Hardware) -> dict[str, Any]:
    """A card with its price, which is None where no source gives one."""
    price = card.constants.get("price_usd")
    return {
        "name": card.name,
        "title": card.title,
        "vram_bytes": card.value("vram_bytes"),
        "price_usd": None if price is None else price.value,
        "price_source": None if price is None else price.source,
    }


def room_on(
    card: Hardware,
    model: ModelSpec,
    batch_size: int,
    context_tokens: int,
    layer_bytes: float | None = None,
) -> dict[str, Any]:
    """What a card's memory holds beside everything that must be there.

    Args:
      card: Its `vram_bytes` counts.
      model: Card of the model.
      batch_size: Requests that decode in lockstep.
      context_tokens: Tokens in the KV cache of each.
      layer_bytes: One slot in every layer; None takes the model's experts.

    Returns:
      Sizes, and `slots_that_fit` in every layer: None where a step cannot run at all. Unless all
      experts fit, the largest demand of one layer needs room to pass through.
    """
    fixed_bytes = {
        "dense_bytes": model.dense_bytes,
        "kv_bytes": batch_size * context_tokens * model.kv_bytes_per_token,
        "workspace_bytes": workspace_bytes(model, batch_size),
    }
    if layer_bytes is None:
        layer_bytes = model.num_moe_layers * model.expert_bytes
    most_demanded = min(model.num_experts, batch_size * model.num_experts_per_tok)
    staging_bytes = most_demanded * model.expert_bytes
    left_bytes = card.value("vram_bytes") - sum(fixed_bytes.values())
    slots: int | None = None
    if left_bytes >= model.num_experts * layer_bytes:
        slots = model.num_experts
    elif left_bytes >= staging_bytes:
        slots = min(model.num_experts - 1, int((left_bytes - staging_bytes) // layer_bytes))
    return {
        "hardware": card.name,
        "model": model.name,
        "batch_size": batch_size,
        "context_tokens": context_tokens,
        **fixed_bytes,
        "staging_bytes": staging_bytes,
        "num_experts": model.num_experts,
        "slots_that_fit": slots,
    }


def rooms_of_models(
    cards: Sequence[Hardware], batch_sizes: Sequence[int], context_tokens: int
) -> list[dict[str, Any]]:
    """`room_on` for every model that has a workload of its own."""
    names = dict.fromkeys(one.model for one in WORKLOADS.values() if one.targets)
    models = sorted((load_model(name) for name in names), key=lambda one: one.routed_bytes)
    return [
        room_on(card, model, size, context_tokens)
        for model in models
        for card in cards
        for size in batch_sizes
    ]


def cells_of_cards(
    cards: Sequence[Hardware],
    rooms: Sequence[dict[str, Any]],
    slots: tuple[int, ...],
    num_layers: int,
) -> list[Wanted]:
    """On every card and batch size: the run's own slots, and all that fit."""
    by_name = {card.name: card for card in cards}
    wanted = []
    for room in rooms:
        choices = {"as in the run": slots}
        if room["slots_that_fit"] is not None:
            choices["all that fit"] = (room["slots_that_fit"],) * num_layers
        wanted += [
            Wanted(
                by_name[room["hardware"]],
                room["batch_size"],
                chosen,
                {"hardware": room["hardware"], "cache": cache},
                MOST_RUNS,
            )
            for cache, chosen in choices.items()
        ]
    return wanted
