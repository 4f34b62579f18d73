"""How much of the processor other programs took meanwhile: what disturbs times on a CPU."""

import os
import time
from pathlib import Path
from typing import NamedTuple

_STAT = Path("/proc/stat")
# user, nice, system, irq, softirq, steal: all that is no waiting.
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)


class Moment(NamedTuple):
    """Seconds so far: of a clock, of all processors at work, and of this process at work."""

    clock_s: float
    busy_s: float
    own_s: float


def moment() -> Moment | None:
    """Now; None where the system does not tell."""
    try:
        words = _STAT.read_text(encoding="ascii").split(maxsplit=9)[1:9]
    except OSError:
        return None
    ticks_s = [int(word) / os.sysconf("SC_CLK_TCK") for word in words]
    own = os.times()
    busy_s = sum(ticks_s[field] for field in _BUSY_FIELDS)
    return Moment(time.perf_counter(), busy_s, own.user + own.system)


def others_ratio(start: Moment | None, end: Moment | None) -> float | None:
    """Share of all processors that other programs had between two moments; None if not told."""
    if start is None or end is None or end.clock_s <= start.clock_s:
        return None
    others_s = (end.busy_s - start.busy_s) - (end.own_s - start.own_s)
    return max(0.0, others_s / ((os.cpu_count() or 1) * (end.clock_s - start.clock_s)))
