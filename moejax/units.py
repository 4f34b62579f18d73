"""Sizes, times and ratios as people write and read them.

Inside the package time is seconds and size is bytes; only this module turns them into text.
GB is 1e9 bytes, GiB is 2**30 bytes.
"""

import math
import re

from moejax.errors import UsageError

_SIZE_BYTES = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_TIME_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Reads a size such as `2GB` (2e9), `2GiB` (2**31) or `4000 MiB`.

    Raises:
      UsageError: `text` is not a non-negative number followed by a known unit.
    """
    match = _AMOUNT.fullmatch(text)
    factor = _SIZE_BYTES.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise UsageError(
            f"{text!r} is not a size",
            "Write a number and a unit: 2GB is 2e9 bytes, 2GiB is 2**31 bytes.",
        )
    return round(float(match[1]) * factor)


def parse_seconds(text: str) -> float:
    """Reads a time such as `40ms`, `1.5 s` or `684us`.

    Raises:
      UsageError: `text` is not a non-negative number followed by a known unit.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2] not in _TIME_S:
        raise UsageError(
            f"{text!r} is not a time", f"Write a number and a unit, one of {', '.join(_TIME_S)}."
        )
    return float(match[1]) * _TIME_S[match[2]]


def format_bytes(num_bytes: float) -> str:
    """Three significant digits with a decimal unit: `2.00 GB`, `17.3 MB`, `512 B`."""
    return _scaled(num_bytes, [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")])


def format_seconds(time_s: float) -> str:
    """Three significant digits: `1.20 s`, `23.4 ms`, `684 us`, `4.10 us`, `12.0 ns`."""
    return _scaled(time_s, [(1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")])


def format_ratio(ratio: float) -> str:
    """A share of one as per cent with one decimal: `65.3 %`."""
    return f"{100 * ratio:.1f} %" if math.isfinite(ratio) else str(ratio)


def format_change(ratio: float) -> str:
    """A signed share of one as per cent with one decimal: `+1.3 %`, `-0.4 %`, never `-0.0 %`."""
    return f"{round(100 * ratio, 1) + 0.0:+.1f} %" if math.isfinite(ratio) else str(ratio)


def _scaled(value: float, scales: list[tuple[float, str]]) -> str:
    if not math.isfinite(value):
        return f"{value} {scales[-1][1]}"
    if value == 0:
        return f"0 {next(unit for scale, unit in scales if scale == 1.0)}"
    # 0.9995 keeps 999.6 MB from printing as "1000 MB" instead of "1.00 GB".
    fitting = (pair for pair in scales if abs(value) >= 0.9995 * pair[0])
    scale, unit = next(fitting, scales[-1])
    digits = f"{value / scale:#.3g}"
    return f"{value / scale:.0f} {unit}" if "e" in digits else f"{digits.rstrip('.')} {unit}"
