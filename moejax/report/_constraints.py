"""Constraints that a user puts on the choice of a strategy."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from moejax.errors import UsageError
from moejax.units import format_bytes, format_ratio, format_seconds, parse_bytes, parse_seconds

from ._numbers import format_count

FUTURE = "future"


class Candidate(NamedTuple):
    """What can be chosen: a strategy with so many slots at one batch size.

    Attributes:
      strategy: Its name.
      batch_size: Requests in lockstep.
      slots: Of a layer.
      latency_s: Mean step latency of every draw, by the draw's number.
      p99_s: 99th percentile over the steps of a draw, mean over draws.
      hit_ratio: Mean over draws.
      memory_bytes: Most device memory for experts over draws.
      complexity: The reference study's score; None where it gave none.
      knows_future: Whether it cannot be built.
      place: Where its records stand in `results.json`.
    """

    strategy: str
    batch_size: int
    slots: float
    latency_s: Mapping[int, float]
    p99_s: float
    hit_ratio: float
    memory_bytes: float
    complexity: float | None
    knows_future: bool
    place: str

    @property
    def mean_s(self) -> float:
        """Mean step latency."""
        return float(np.mean(list(self.latency_s.values())))

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all requests together."""
        return self.batch_size / self.mean_s


class Kind(NamedTuple):
    """Something that a constraint may limit.

    Attributes:
      parse: Reads the limit.
      write: Writes a value.
      value: Of a candidate; None where it has none, which meets no limit.
      is_least: Whether the limit is the least allowed instead of the most.
      example: A limit as a user writes it.
    """

    parse: Callable[[str], float]
    write: Callable[[float], str]
    value: Callable[[Candidate], float | None]
    is_least: bool
    example: str


class Constraint(NamedTuple):
    """`name` at most, or at least, `limit`."""

    name: str
    limit: float

    def is_met(self, candidate: Candidate) -> bool:
        """Whether a candidate keeps to it."""
        kind = KINDS[self.name]
        value = kind.value(candidate)
        if value is None:
            return False
        return value >= self.limit if kind.is_least else value <= self.limit

    def __str__(self) -> str:
        kind = KINDS[self.name]
        if self.name == FUTURE:
            return "future allowed" if self.limit else "no future"
        return f"{self.name} at {'least' if kind.is_least else 'most'} {kind.write(self.limit)}"


def parse_constraints(texts: Sequence[str]) -> tuple[Constraint, ...]:
    """Reads constraints such as `memory=500MB`; several may stand in one text, with commas.

    Raises:
      UsageError: A name is unknown or given twice, or a limit is none.
    """
    found: dict[str, Constraint] = {}
    for text in (part.strip() for several in texts for part in several.split(",")):
        name, equals, limit = (part.strip() for part in text.partition("="))
        if name not in KINDS or not equals:
            known = ", ".join(f"{one}={kind.example}" for one, kind in KINDS.items())
            raise UsageError(f"--constraint {text!r} is not known", f"Write one of {known}.")
        if name in found:
            raise UsageError(f"--constraint: {name} is limited twice", "Give one limit.")
        try:
            found[name] = Constraint(name, KINDS[name].parse(limit))
        except UsageError as error:
            raise UsageError(f"--constraint {name}: {error.cause}", error.hint) from None
    return tuple(found.values())


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"{text!r} is not a number", "Write a number such as 4.")
    return value


def _share(text: str) -> float:
    is_percent = text.endswith("%")
    value = _number(text.removesuffix("%").strip()) / (100 if is_percent else 1)
    if value > 1:
        raise UsageError(f"{text!r} is more than all", "Write a share such as 0.5 or 50%.")
    return value


def _yes(text: str) -> float:
    if text not in ("yes", "no"):
        raise UsageError(f"{text!r} is neither yes nor no", "Write future=yes or future=no.")
    return float(text == "yes")


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "memory": Kind(parse_bytes, format_bytes, lambda one: one.memory_bytes, False, "500MB"),
        "complexity": Kind(_number, format_count, lambda one: one.complexity, False, "4"),
        "latency": Kind(parse_seconds, format_seconds, lambda one: one.mean_s, False, "40ms"),
        "p99": Kind(parse_seconds, format_seconds, lambda one: one.p99_s, False, "60ms"),
        "hit": Kind(_share, format_ratio, lambda one: one.hit_ratio, True, "0.5"),
        "throughput": Kind(_number, format_count, lambda one: one.tokens_per_s, True, "30"),
        FUTURE: Kind(_yes, format_count, lambda one: float(one.knows_future), False, "no"),
    }
)
"""What a constraint may be about, by the name that a user writes before the equals sign."""
