"""Everything that a profile can be compared with, as plain records."""

from typing import Any

from ._decode import predict_decode, summarise_decode
from ._own import predict_own, summarise_own
from ._published import read_decode
from ._rates import predict_rates, summarise_rates


def compare_profile(profile: str) -> dict[str, Any]:
    """Published decode steps and rates and our own runs, each beside the profile's prediction.

    Returns:
      `profile`; `decode`, `rates` and `own`, a record a measurement; `decode_sources`,
      `rate_quantities` and `own_runs`, a summary of each group. Empty where nothing was measured.

    Raises:
      UsageError: There is no such profile.
      BadFileError: A table of measurements is unreadable, or the profile lacks a constant.
    """
    rates, own = predict_rates(profile), predict_own(profile)
    steps = [step for step in read_decode() if step.rig.profile == profile]
    decode = predict_decode(steps)
    return {
        "profile": profile,
        "decode": [row._asdict() for row in decode],
        "decode_sources": [found._asdict() for found in summarise_decode(steps, decode)],
        "rates": [row._asdict() for row in rates],
        "rate_quantities": summarise_rates(rates),
        "own": own,
        "own_runs": summarise_own(own),
    }
