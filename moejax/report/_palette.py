"""One look per strategy in every figure: colour, marker and line together."""

import zlib
from types import MappingProxyType
from typing import NamedTuple


class Look(NamedTuple):
    """How a strategy is drawn; no two strategies share marker and line, so grey print works."""

    colour: str
    marker: str
    line: str | tuple[int, tuple[float, ...]]


# Found by hill climbing on the smallest CIELAB distance between any two colours as seen with
# normal, protan, deutan and tritan vision (Machado et al., 2009), with at least 3:1 contrast on
# white (WCAG 2.2, 1.4.11). Smallest distance 23, and 17 to the four caches of the web, which came
# later; tests/report/test_palette.py computes it again.
LOOKS = MappingProxyType(
    {
        "on_demand": Look("#8C1C13", "X", (0, (1, 1))),
        "oracle": Look("#000000", "*", (0, (6, 2))),
        "multi_look": Look("#EA5A0C", "s", "-"),
        "top_k": Look("#9184C2", "^", (0, (4, 1, 1, 1))),
        "intelligent": Look("#5A1FE0", "o", "-"),
        "lru": Look("#BE8068", "D", (0, (3, 1))),
        "lfu": Look("#5E2A80", "v", (0, (4, 1, 1, 1, 1, 1))),
        "fifo": Look("#1F5A5A", "P", (0, (2, 2))),
        "gate_look": Look("#2486EA", "h", (0, (8, 1, 1, 1))),
        "sieve": Look("#AB86A5", "<", (0, (5, 1))),
        "s3fifo": Look("#7B5643", ">", (0, (2, 1, 5, 1))),
        "arc": Look("#4B179A", "p", (0, (1, 3))),
        "least_stale": Look("#0A2A3A", "d", (0, (7, 3))),
    }
)

STRATEGY_ORDER = tuple(LOOKS)

INK = "#222222"
"""Text and axes."""

FAINT = "#767676"
"""Helping lines and remarks: 4.5:1 on white, so that they can be read."""

GRID = "#E2E2E2"
"""Lines behind the data."""

TIER_COLOURS = ("#1B4F72", "#5B9BC8", "#B9D6EA", "#F0F0F0")
"""Fastest tier darkest, so that grey print keeps the order; the last is what no tier holds."""

_OTHER_MARKERS = ("8", "H", "1", "2", "3", "4")


def look(strategy: str) -> Look:
    """The look of a strategy; one outside the registry is grey with a marker made of its name."""
    if strategy in LOOKS:
        return LOOKS[strategy]
    marker = _OTHER_MARKERS[zlib.crc32(strategy.encode()) % len(_OTHER_MARKERS)]
    return Look(FAINT, marker, (0, (1, 2)))


def text_colour(strategy: str) -> str:
    """The strategy's colour, darkened where letters in it would be below 4.5:1 on white."""
    colour = look(strategy).colour
    while contrast_ratio(colour) < 4.5:
        colour = "#" + "".join(f"{int(0.95 * part):02X}" for part in _parts(colour))
    return colour


def contrast_ratio(colour: str) -> float:
    """Contrast of a colour `#RRGGBB` with white paper, 1 to 21.

    Reference:
      WCAG 2.2, relative luminance.
    """
    shares = [part / 255 for part in _parts(colour)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in shares]
    luminance = sum(w * one for w, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 1.05 / (luminance + 0.05)


def _parts(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))
