"""Looking at simulated cells under one set of assumptions, with intervals over runs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int

CONFIDENCE_PERCENT = 95
FACTS_PLACE = "/study/facts"
_NUM_RESAMPLES = 1_000
_SEED = 0

Runs: TypeAlias = Float[np.ndarray, "*resamples runs"]
Key: TypeAlias = tuple[str, int, str, float]
"""Strategy, batch size, dispatch and slots of a layer."""


class MissingError(Exception):
    """A view lacks what a quantity needs; nothing stands in for it."""


@dataclasses.dataclass(frozen=True)
class View:
    """Cells as one reader of the claims would choose them.

    Attributes:
      cells: By key, each with its place in `results.json`.
      dispatch: How the requests of a batch share a step.
      slots: Slots of a layer.
      facts: What arithmetic on cards and profiles says, by name.
      draws: Runs to look at, such as a bootstrap's; None for each once.
      reads: Places of the cells and facts that were looked at, in order.
    """

    cells: Mapping[Key, tuple[str, Mapping[str, Any]]]
    dispatch: str
    slots: float
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    draws: Int[np.ndarray, "resamples runs"] | None = None
    reads: list[str] = dataclasses.field(default_factory=list)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes that this view has."""
        keys = [key for key in self.cells if key[2:] == (self.dispatch, self.slots)]
        return tuple(sorted({batch_size for _, batch_size, _, _ in keys}))

    def runs(self, strategy: str, field: str, batch_size: int = 1) -> Runs:
        """One field of one cell, a value a run.

        Raises:
          MissingError: The view has no such cell.
        """
        key = (strategy, batch_size, self.dispatch, self.slots)
        if key not in self.cells:
            raise MissingError(f"no cell {key}")
        place, cell = self.cells[key]
        if place not in self.reads:
            self.reads.append(place)
        values = np.asarray(cell[field], np.float64)
        return values if self.draws is None else values[self.draws]

    def mean(self, strategy: str, field: str, batch_size: int = 1) -> Float[np.ndarray, "..."]:
        """Mean over runs."""
        return self.runs(strategy, field, batch_size).mean(-1)

    def std(self, strategy: str, field: str, batch_size: int = 1) -> Float[np.ndarray, "..."]:
        """Standard deviation over runs.

        Raises:
          MissingError: One run has no spread.
        """
        values = self.runs(strategy, field, batch_size)
        if values.shape[-1] < 2:
            raise MissingError("one run has no spread")
        return values.std(-1, ddof=1)

    def fact(self, name: str) -> Any:
        """What arithmetic says.

        Raises:
          MissingError: Not under this name, or not in this view.
        """
        if name not in self.facts:
            raise MissingError(f"no fact {name!r}")
        self.reads.append(f"{FACTS_PLACE}/{name}")
        return self.facts[name]


Value: TypeAlias = Callable[[View], Any]
"""A quantity: a number or a name, from a view; it raises `MissingError` where it cannot be had."""


class Found(NamedTuple):
    """What a quantity is under one view.

    Attributes:
      value: A number, or a name.
      interval: Ends of the bootstrap interval over runs; None where no run was looked at, or one.
      reads: Places of the cells and facts behind it.
    """

    value: float | str
    interval: tuple[float, float] | None
    reads: tuple[str, ...]


def find(value: Value, view: View) -> Found | None:
    """Evaluates a quantity, None where the view lacks what it needs.

    Reference:
      Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13: percentile
      intervals; runs are resampled, the same ones for every strategy, since all meet the same
      requests.
    """
    reads: list[str] = []
    try:
        found = value(dataclasses.replace(view, reads=reads))
    except MissingError:
        return None
    if isinstance(found, str):
        return Found(found, None, tuple(reads))
    return Found(float(found), _interval(value, view, reads), tuple(reads))


def cells_by_key(
    cells: Sequence[Mapping[str, Any]], place: str
) -> dict[Key, tuple[str, Mapping[str, Any]]]:
    """Cells of a list that stands at `place` in `results.json`."""
    return {
        (cell["strategy"], cell["batch_size"], cell["dispatch"], cell["slots"]): (
            f"{place}/{index}",
            cell,
        )
        for index, cell in enumerate(cells)
    }


def _interval(value: Value, view: View, reads: Sequence[str]) -> tuple[float, float] | None:
    counts = {len(cell["latency_s"]) for place, cell in view.cells.values() if place in set(reads)}
    if not counts or min(counts) < 2:
        return None
    num_runs = min(counts)
    # One fixed draw for all, so that the same results give the same rows.
    generator = np.random.default_rng(_SEED)
    draws = generator.integers(num_runs, size=(_NUM_RESAMPLES, num_runs))
    resampled = value(dataclasses.replace(view, draws=draws, reads=[]))
    tail = (100 - CONFIDENCE_PERCENT) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)
