"""How many expert slots the card of a run has room for."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from moejax.cards import DTYPE_BYTES, ModelSpec

from ._data import ReportData
from ._places import pointer

MEMORY_PLACE = pointer("hardware", "constants", "vram_bytes")


class Room(NamedTuple):
    """What a card holds besides a model's routed experts, and the slots that are left.

    Attributes:
      memory_bytes: All memory of the card.
      dense_bytes: Weights that are no routed expert.
      kv_bytes: The KV cache of one request.
      context_tokens: Tokens in that cache.
      slots: Slots of every layer that the rest holds, at most one for each expert. A driver and
        other programs leave less.
      num_experts: Routed experts of a layer.
    """

    memory_bytes: float
    dense_bytes: int
    kv_bytes: int
    context_tokens: int
    slots: int
    num_experts: int


def room(data: ReportData) -> Room | None:
    """What fits on the run's card; None where the run does not say how large card or model are."""
    constant, spec = data.run.constants.get("vram_bytes"), _spec(data.run.model)
    context_tokens = data.run.settings.get("context_tokens")
    if constant is None or spec is None or not isinstance(context_tokens, int):
        return None
    kv_bytes = context_tokens * spec.kv_bytes_per_token
    free_bytes = max(constant["value"] - spec.dense_bytes - kv_bytes, 0)
    slots = int(free_bytes // (spec.num_moe_layers * spec.expert_bytes))
    return Room(
        memory_bytes=constant["value"],
        dense_bytes=spec.dense_bytes,
        kv_bytes=kv_bytes,
        context_tokens=context_tokens,
        slots=min(slots, spec.num_experts),
        num_experts=spec.num_experts,
    )


def _spec(model: Mapping[str, Any]) -> ModelSpec | None:
    """The card of the run's model, None where a field is missing or no such thing."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(ModelSpec):
        # A run older than a field lacks it; those that came later have a default.
        default = None if field.default is dataclasses.MISSING else field.default
        fields[field.name] = model.get(field.name, default)
        if not isinstance(fields[field.name], cast(type, field.type)):
            return None
    spec = ModelSpec(**fields)
    is_real = spec.dtype in DTYPE_BYTES and min(spec.num_moe_layers, spec.expert_bytes) > 0
    return spec if is_real else None
