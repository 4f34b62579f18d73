"""A quantity measured several times, with every sample kept."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Samples of one quantity; summaries are derived, never stored.

    Args:
      name: What was measured, e.g. `h2d copy, 1 MiB`.
      unit: Unit of every sample, e.g. `s`.
      samples: At least one finite value, in the order in which they were taken.

    Raises:
      ValueError: There is no sample, or one is not finite.
    """

    name: str
    unit: str
    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        samples = tuple(float(sample) for sample in self.samples)
        if not samples or not np.isfinite(samples).all():
            raise ValueError(f"{self.name}: samples must be finite, and at least one: {samples}")
        object.__setattr__(self, "samples", samples)

    @property
    def num_samples(self) -> int:
        """How often it was measured."""
        return len(self.samples)

    @property
    def median(self) -> float:
        """The middle sample: robust against the odd interrupted one."""
        return float(np.median(self.samples))

    @property
    def p05(self) -> float:
        """5th percentile, interpolated between samples."""
        return float(np.percentile(self.samples, 5))

    @property
    def p95(self) -> float:
        """95th percentile, interpolated between samples."""
        return float(np.percentile(self.samples, 95))
