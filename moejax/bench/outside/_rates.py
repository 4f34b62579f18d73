"""Rates that others measured and no profile was made from, beside what the profiles say."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from moejax.cards import load_hardware, models_dir
from moejax.cost import CostParameters, copy_s, from_hardware, read_csv, smooth_maximum
from moejax.units import format_bytes

_FOLDER = models_dir() / "hardware" / "measurements"
_CHECK = "check"
_BF16_BYTES = 2


class RateRow(NamedTuple):
    """One published rate and the profile's.

    Attributes:
      profile: Hardware profile of the card.
      quantity: `copies`, `memory` or `compute`.
      gpu: Card, as the source spells it.
      size: Of a copy, or m x n x k of a product; empty where the source gives none.
      published_per_s: Bytes or FLOP a second.
      predicted_per_s: What the cost model says with the profile's constants.
      error_ratio: Predicted over published, minus 1.
      source: Where it was published.
      note: Conditions of the measurement.
    """

    profile: str
    quantity: str
    gpu: str
    size: str
    published_per_s: float
    predicted_per_s: float
    error_ratio: float
    source: str
    note: str


def predict_rates(profile: str) -> list[RateRow]:
    """Predicts the rows of transfer.csv and compute.csv that are marked as checks of a profile.

    Copies to the device, device memory and bf16 or fp16 products; host memory and drives belong to
    the machine around a card, not to its profile.

    Raises:
      UsageError: There is no such profile.
      BadFileError: A table is unreadable, or the profile lacks a constant.
    """
    parameters = from_hardware(load_hardware(profile))
    rows = [
        *(_transfer(parameters, fields) for fields in _checks("transfer.csv", profile)),
        *(_product(parameters, fields) for fields in _checks("compute.csv", profile)),
    ]
    return [row for row in rows if row is not None]


def summarise_rates(rows: Iterable[RateRow]) -> list[dict[str, Any]]:
    """Median and worst error for each profile and quantity."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row.profile, row.quantity), []).append(abs(row.error_ratio))
    return [
        {
            "profile": profile,
            "quantity": quantity,
            "num_rows": len(errors),
            "median_error_ratio": statistics.median(errors),
            "worst_error_ratio": max(errors),
        }
        for (profile, quantity), errors in groups.items()
    ]


def _checks(file: str, profile: str) -> Sequence[dict[str, str]]:
    rows = read_csv(_FOLDER / file, ("profile", "used_for", "source"))
    return [f for _, f in rows if f["profile"] == profile and f["used_for"] == _CHECK]


def _transfer(parameters: CostParameters, fields: dict[str, str]) -> RateRow | None:
    """A copy over the link or within the device; None for what is neither."""
    num_bytes = float(fields["bytes"]) if fields["bytes"] else None
    if num_bytes is not None and fields["num_copies"]:
        num_bytes /= float(fields["num_copies"])
    published = _published_bytes_per_s(fields)
    memory = {"pinned": "pinned", "unstated": "pinned", "pageable": "pageable"}
    if fields["direction"] == "d2d":
        quantity, predicted = "memory", float(parameters.vram_bytes_per_s)
    elif fields["direction"] == "h2d" and fields["host_memory"] in memory:
        place = memory[fields["host_memory"]]
        # Without a size the source means large copies: the slope of the law.
        whole = num_bytes if num_bytes is not None else 2.0**30
        quantity = "copies"
        predicted = whole / float(copy_s(parameters, whole, place))
    else:
        return None
    size = "" if num_bytes is None else format_bytes(num_bytes)
    return _row(fields, quantity, size, published, predicted)


def _published_bytes_per_s(fields: dict[str, str]) -> float:
    if fields["gb_per_s"]:
        return 1e9 * float(fields["gb_per_s"])
    return float(fields["bytes"]) / float(fields["seconds"])


def _product(parameters: CostParameters, fields: dict[str, str]) -> RateRow:
    published = 1e12 * float(fields["tflops"])
    if not fields["m"]:
        return _row(fields, "compute", "", published, float(parameters.matmul_flops))
    m, n, k = (float(fields[name]) for name in ("m", "n", "k"))
    num_flops = 2 * m * n * k
    read_s = _BF16_BYTES * (m * n + m * k + n * k) / parameters.vram_bytes_per_s
    time_s = float(smooth_maximum(read_s, num_flops / parameters.matmul_flops))
    size = f"{m:.0f} x {n:.0f} x {k:.0f}"
    return _row(fields, "compute", size, published, num_flops / time_s)


def _row(
    fields: dict[str, str], quantity: str, size: str, published: float, predicted: float
) -> RateRow:
    return RateRow(
        profile=fields["profile"],
        quantity=quantity,
        gpu=fields["gpu"],
        size=size,
        published_per_s=published,
        predicted_per_s=predicted,
        error_ratio=predicted / published - 1,
        source=fields["source"],
        note=fields["note"],
    )
