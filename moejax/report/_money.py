"""What speed costs: the memory that a strategy takes, and the card that it runs on."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.errors import UsageError
from moejax.units import format_bytes, format_seconds

from ._data import NotDrawnError, ReportData
from ._further import FurtherCell
from ._numbers import NOTHING, format_count, format_factor, format_with_interval, markdown_table
from ._places import link, pointer
from ._summary import speedup

_KNOWS_THE_FUTURE = ("oracle",)


def parse_prices(texts: Sequence[str]) -> dict[str, float]:
    """Reads prices such as `h100=25000` in USD; several may stand in one text, with commas.

    Raises:
      UsageError: A price is none, or a card is named twice.
    """
    found: dict[str, float] = {}
    for text in (part.strip() for several in texts for part in several.split(",")):
        card, _, price = (part.strip() for part in text.partition("="))
        try:
            value = float(price)
        except ValueError:
            value = 0.0
        if not card or card in found or not 0 < value < float("inf"):
            raise UsageError(
                f"--price {text!r} is not the price of a card, or not its only one",
                "Write --price NAME=USD, such as --price rtx-3090=700.",
            )
        found[card] = value
    return found


def check_prices(data: ReportData) -> None:
    """Refuses the price of a card that the run knows nothing of.

    Raises:
      UsageError: It names one.
    """
    known = [str(data.run.hardware["name"])]
    if "gpus" in data.run.further:
        known += [card["name"] for card in data.run.further["gpus"].facts["cards"]]
    for card in data.prices_usd:
        if card not in known:
            raise UsageError(
                f"--price: this run has no card {card!r}",
                f"It has {', '.join(dict.fromkeys(known))}; `moejax bench --full` adds more.",
            )


def price_of(data: ReportData, card: str, stated_usd: float | None) -> float | None:
    """The user's price of a card, else its profile's; None where neither is known."""
    return data.prices_usd.get(card, stated_usd)


def memory_cost_table(data: ReportData) -> str:
    """What the device memory of every strategy is worth at the price of the run's card.

    Raises:
      NotDrawnError: The card has no price, or the run nothing to compare with.
    """
    constants = data.run.constants
    stated = constants["price_usd"]["value"] if "price_usd" in constants else None
    card = str(data.run.hardware["name"])
    price_usd = price_of(data, card, stated)
    if price_usd is None or "vram_bytes" not in constants:
        raise NotDrawnError(f"no price of {card} is known; give one with --price {card}=USD")
    usd_per_byte = price_usd / constants["vram_bytes"]["value"]
    size, base = data.run.batch_sizes[0], data.baseline
    rows = []
    for cell in data.cells(size):
        cost_usd = usd_per_byte * cell.memory_bytes.mean
        gain = speedup(data.summary, cell.key.strategy, base, size, data.dispatch)
        prices = [] if card in data.prices_usd else [pointer("hardware", "constants", "price_usd")]
        rows.append(
            (
                link(f"`{cell.key.strategy}`", cell.place, *prices),
                format_bytes(cell.memory_bytes.mean),
                f"{format_count(cost_usd)} USD",
                format_with_interval(gain, format_factor),
                NOTHING
                if gain is None or cell.key.strategy == base
                else f"{format_count(cost_usd / gain.mean)} USD",
                NOTHING
                if gain is None or cell.key.strategy == base
                else format_factor(1e3 * gain.mean / cost_usd),
            )
        )
    header = (
        "strategy", "device memory", "its share of the card's price", f"speedup over `{base}`",
        "money per unit of speedup", "speedup per 1,000 USD",
    )  # fmt: skip
    source = (
        "as given with --price"
        if card in data.prices_usd
        else f"{constants['price_usd'].get('kind')}: {constants['price_usd'].get('source', '')}"
    )
    return (
        f"{markdown_table(header, rows)}\n\nBatch {size}; the card at {format_count(price_usd)} "
        f"USD ({source}), its memory valued by the byte, as the study reckons. The last column is "
        "its return on investment."
    )


def card_cost_table(data: ReportData) -> str:
    """What a token a second costs on every card whose price is known.

    Raises:
      NotDrawnError: The run has no cells of cards.
    """
    experiment = data.run.further.get("gpus")
    if experiment is None:
        raise NotDrawnError("cards come with `moejax bench --full`")
    sizes = experiment.batch_sizes()
    rows, unpriced = [], []
    for index, card in enumerate(experiment.facts["cards"]):
        price_usd = price_of(data, card["name"], card.get("price_usd"))
        if price_usd is None:
            unpriced.append(card["name"])
            continue
        shown, read = [], []
        for size in sizes:
            best = best_on_card(data, card["name"], size)
            shown += _rate(best, price_usd)
            read += [] if best is None else [best.pointer]
        named = link(f"`{card['name']}`", pointer("gpus", "cards", index), *read)
        rows.append((named, f"{format_count(price_usd)} USD", *shown, _source(data, card)))
    unknown = ""
    if unpriced:
        unknown = (
            f"No source at hand gives a price of {', '.join(f'`{name}`' for name in unpriced)}: "
            f"`moejax report DIR --price {unpriced[0]}=USD` adds it."
        )
    if not rows:
        return unknown
    header = ["card", "price"]
    for size in sizes:
        header += [
            f"fastest, batch {size}",
            f"tokens/s, batch {size}",
            f"USD per token/s, batch {size}",
        ]
    words = ("price", *(f"fastest, batch {size}" for size in sizes), "source")
    table = markdown_table((*header, "source"), rows, words=words)
    note = (
        "With as many experts on the card as fit. Cards only: host, its memory and power are not "
        "counted."
    )
    return "\n\n".join(part for part in (table, note, unknown) if part)


def best_on_card(data: ReportData, card: str, batch_size: int) -> FurtherCell | None:
    """The fastest that can be built, with all slots that fit on the card."""
    cells = data.run.further["gpus"].where(
        hardware=card, batch_size=batch_size, cache="all that fit"
    )
    known = [cell for cell in cells if cell.strategy not in _KNOWS_THE_FUTURE]
    return min(known, key=lambda cell: cell.mean("latency_s"), default=None)


def _rate(best: FurtherCell | None, price_usd: float) -> tuple[str, str, str]:
    if best is None:
        return ("does not fit", NOTHING, NOTHING)
    latency_s = best.mean("latency_s")
    rate = best.batch_size / latency_s
    return (
        f"`{best.strategy}`, {format_seconds(latency_s)}",
        format_count(rate),
        f"{format_count(price_usd / rate)} USD",
    )


def _source(data: ReportData, card: Mapping[str, Any]) -> str:
    return "--price" if card["name"] in data.prices_usd else str(card.get("price_source", ""))
