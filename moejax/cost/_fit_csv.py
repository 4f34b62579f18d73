"""Refits the copy law of a profile from a CSV file of copies.

Rows of different rigs are not one population, nor are time domains. The rig and domain with the
most sizes from pinned memory to the device are fitted; everything else that crosses the link of
the same card in that direction becomes an outside check, predicted but not pooled.
"""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.cards import HARDWARE, Constant, Hardware, load_hardware
from moejax.errors import BadFileError

from ._fit_copy import CopyFit, fit_copy
from ._measurements import TransferRow, read_transfers
from ._rebase import rebase

_DEFAULT_BASE = "rtx-3090"


class CopyCheck(NamedTuple):
    """A quoted copy outside the fitted sweep, and what the fitted law says about it.

    Attributes:
      row: The measurement.
      predicted_bytes_per_s: Payload rate of the law at the row's size, or for a large copy where
        the source gives no size.
    """

    row: TransferRow
    predicted_bytes_per_s: float

    @property
    def error_ratio(self) -> float:
        """Predicted over quoted rate, minus 1."""
        return self.predicted_bytes_per_s / self.row.bytes_per_s - 1


class CsvFit(NamedTuple):
    """A fitted copy law, the profile that contains it and the evidence.

    Attributes:
      hardware: The base profile with the fitted constants in place.
      copy: Law and table of the fitted sweep.
      gpu: Card that was fitted.
      rig: Machine of the fitted rows.
      time_domain: Clock of the fitted rows.
      checks: Rows of the same card outside the sweep.
    """

    hardware: Hardware
    copy: CopyFit
    gpu: str
    rig: str
    time_domain: str
    checks: tuple[CopyCheck, ...]


def fit_csv(
    path: str | Path,
    *,
    gpu: str | None = None,
    base: Hardware | None = None,
    name: str | None = None,
) -> CsvFit:
    """Fits latency and bandwidth of pinned host-to-device copies in a CSV file.

    Args:
      path: File with the columns of `models/hardware/measurements/transfer.csv`.
      gpu: Card to fit, as the file spells it; None takes the one with the most sizes.
      base: Profile that supplies what copies do not tell; None takes the profile of the card, or
        that of the RTX 3090 for a card without one.
      name: Name of the new profile; None takes that of the card.

    Returns:
      The fit with its table and outside checks.

    Raises:
      BadFileError: The file is unusable, or no rig has three sizes of pinned copies.
    """
    rows = [row for row in read_transfers(path) if gpu is None or row.gpu == gpu]
    sweep = _largest_sweep(rows)
    if not sweep:
        raise BadFileError(
            f"{path} has no copy from pinned memory to {gpu or 'a device'} with a size",
            "Rows need direction h2d, host_memory pinned, bytes and seconds or gb_per_s.",
        )
    first = sweep[0]
    fit = fit_copy(
        np.array([row.num_bytes for row in sweep]), np.array([row.time_s for row in sweep])
    )
    fitted = set(map(id, sweep))
    checks = tuple(
        CopyCheck(row, _predicted_bytes_per_s(fit, row))
        for row in rows
        if id(row) not in fitted and row.gpu == first.gpu and _is_check(row)
    )
    profile_name = first.gpu.lower().replace(" ", "-")
    if base is None:
        base = load_hardware(profile_name if profile_name in HARDWARE else _DEFAULT_BASE)
    constants = copy_constants(fit, f"fitted to {len(fit.rows)} sizes of {first.source}")
    hardware = rebase(
        base,
        constants,
        name=name or profile_name or "measured",
        title=f"{first.gpu or 'measured machine'}: copies fitted to {Path(path).name}",
        is_same_machine=profile_name == base.name,
    )
    return CsvFit(hardware, fit, first.gpu, first.rig, first.time_domain, checks)


def copy_constants(fit: CopyFit, source: str) -> dict[str, Constant]:
    """The profile constants of a fitted copy law from pinned memory."""
    return {
        "copy_latency_s": Constant(
            fit.latency_s, "s", "fitted", fit.latency_standard_error_s, source
        ),
        "pinned_h2d_bytes_per_s": Constant(
            fit.bytes_per_s, "B/s", "fitted", fit.bytes_per_s_standard_error, source
        ),
    }


def _largest_sweep(rows: list[TransferRow]) -> list[TransferRow]:
    pinned = [row for row in rows if row.memory == "pinned" and row.num_bytes is not None]
    labelled = [row for row in pinned if row.used_for == "copy law"]
    groups = defaultdict(list)
    for row in labelled or pinned:
        if row.direction in ("h2d", "h2d|d2h") and row.time_domain in ("device", "end_to_end"):
            groups[row.gpu, row.rig, row.time_domain].append(row)
    return max(groups.values(), key=lambda group: len({row.num_bytes for row in group}), default=[])


def _is_check(row: TransferRow) -> bool:
    return (
        row.direction == "h2d"
        and row.memory in ("pinned", "unstated")
        and row.time_domain != "host_call"
    )


def _predicted_bytes_per_s(fit: CopyFit, row: TransferRow) -> float:
    if row.num_bytes is None:
        return fit.bytes_per_s
    return row.num_bytes / fit.predict_s(row.num_bytes)
