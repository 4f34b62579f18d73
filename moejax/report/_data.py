"""What figures and text are made from: a run, its summary and the reference study's claims."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.claims import load_claims

from ._constraints import Constraint
from ._run import BenchRun, read_run
from ._summary import Cell, Summary, summarise


class NotDrawnError(Exception):
    """A figure or table whose data this run does not have; the text is the reason."""


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Read once, then only looked at.

    Attributes:
      run: What `moejax bench` wrote.
      summary: Its grid by cell.
      claims: Of the reference study.
      constraints: What the user wants of a choice.
      prices_usd: What the user says that cards cost, by profile.
    """

    run: BenchRun
    summary: Summary
    claims: Mapping[str, Any]
    constraints: tuple[Constraint, ...] = ()
    prices_usd: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def dispatch(self) -> str:
        """The dispatch of figures that show one: batched, where the run has it."""
        return self.run.dispatches[0]

    @property
    def baseline(self) -> str:
        """What speedups are measured against: `on_demand`, or `lru` in a run without it.

        Raises:
          NotDrawnError: The run has neither.
        """
        for strategy in ("on_demand", "lru"):
            if strategy in self.run.strategies:
                return strategy
        raise NotDrawnError("the run has neither on_demand nor lru to compare with")

    def cells(self, batch_size: int, dispatch: str | None = None) -> tuple[Cell, ...]:
        """Cells of every strategy at this batch size, in display order."""
        names = self.run.strategies
        found = (self.summary.cell(name, batch_size, dispatch or self.dispatch) for name in names)
        return tuple(cell for cell in found if cell is not None)

    def series(self, strategy: str, dispatch: str | None = None) -> tuple[Cell, ...]:
        """Cells of one strategy by ascending batch size."""
        sizes = self.run.batch_sizes
        found = (self.summary.cell(strategy, size, dispatch or self.dispatch) for size in sizes)
        return tuple(cell for cell in found if cell is not None)


def load_data(folder: Path) -> ReportData:
    """Reads a run folder.

    Raises:
      BadFileError: `results.json` or `plan.json` is missing, damaged or inconsistent.
    """
    run = read_run(folder)
    return ReportData(run, summarise(run), load_claims())
