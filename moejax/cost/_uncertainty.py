"""How sure a prediction is: constants drawn from their errors, and what cases differ by beside.

The logarithms of fitted constants are normal, with the standard errors and correlations of their
profile. A case differs from the law by a factor exp(s t), where s is the profile's spread and t has
Student's distribution with the degrees of freedom that s was estimated with.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax._types import PRNGKey, Scalar
from moejax.cards import Constant, Hardware

from ._parameters import CostParameters, from_hardware

INTERVAL_RATIO = 0.9
"""Share of measurements that an interval is to hold."""

_NUM_SAMPLES = 1000
_STRATEGY = "layer_s."


class Samples(NamedTuple):
    """Draws of everything a prediction depends on and nobody knows exactly.

    Attributes:
      parameters: Constants of the machine, each an array of samples.
      strategy_layer_s: What a strategy adds to every layer, by strategy.
      case_ratio: What a case's measurement is multiplied by beside its prediction.
    """

    parameters: CostParameters
    strategy_layer_s: dict[str, Float[Array, " samples"]]
    case_ratio: Float[Array, " samples"]


def sample_parameters(
    hardware: Hardware, key: PRNGKey, num_samples: int = _NUM_SAMPLES
) -> Samples | None:
    """Draws the constants of a profile; None of one that does not say how sure it is.

    Constants without a standard error stay as they are.

    Args:
      hardware: Profile of the machine.
      key: Consumed.
      num_samples: How many draws.

    Raises:
      BadFileError: The profile lacks a constant.
    """
    uncertainty = hardware.uncertainty
    if uncertainty is None:
        return None
    normal_key, case_key = jax.random.split(key)
    errors = _log_errors(hardware)
    names = list(errors)
    normal = jax.random.normal(normal_key, (num_samples, len(names)))
    logs = normal @ jnp.asarray(_root(names, uncertainty.names, uncertainty.correlations))
    factors = {name: jnp.exp(errors[name] * logs[:, column]) for column, name in enumerate(names)}
    one = jnp.ones(num_samples)

    def drawn(name: str, value: Scalar) -> Float[Array, " samples"]:
        # A ratio may pass 1: cut there, it would no longer go with what was fitted beside it.
        return value * factors.get(name, one)

    parameters = from_hardware(hardware)._asdict()
    student = jax.random.t(case_key, float(uncertainty.num_degrees), (num_samples,))
    return Samples(
        parameters=CostParameters(**{n: drawn(n, value) for n, value in parameters.items()}),
        strategy_layer_s={
            name: drawn(_STRATEGY + name, constant.value)
            for name, constant in hardware.strategy_layer_s.items()
        },
        case_ratio=jnp.exp(uncertainty.spread_ratio * student),
    )


def prediction_interval(
    hardware: Hardware,
    predict_s: Callable[[CostParameters], Scalar],
    *,
    seed: int = 0,
) -> tuple[float, float] | None:
    """What 90 % of measurements of a predicted time lie in; None if the profile does not say.

    Args:
      hardware: Profile of the machine.
      predict_s: The prediction as a pure function of its constants.
      seed: Seed of the draws.
    """
    samples = sample_parameters(hardware, jax.random.key(seed))
    if samples is None:
        return None
    return interval(jax.vmap(predict_s)(samples.parameters) * samples.case_ratio)


def interval(samples: Float[Array, " samples"]) -> tuple[float, float]:
    """The central interval that holds `INTERVAL_RATIO` of the samples."""
    tail = (1.0 - INTERVAL_RATIO) / 2
    low, high = np.quantile(np.asarray(samples, np.float64), [tail, 1.0 - tail])
    return float(low), float(high)


def _log_errors(hardware: Hardware) -> dict[str, float]:
    constants: dict[str, Constant] = dict(hardware.constants)
    constants |= {_STRATEGY + name: c for name, c in hardware.strategy_layer_s.items()}
    return {
        name: constant.standard_error / constant.value
        for name, constant in constants.items()
        if constant.standard_error is not None and constant.value > 0
    }


def _root(
    names: list[str], related: tuple[str, ...], correlations: tuple[tuple[float, ...], ...]
) -> Float[np.ndarray, "constants constants"]:
    """A matrix that gives independent normal numbers these correlations."""
    matrix = np.eye(len(names))
    for first, row in zip(related, correlations, strict=True):
        for second, value in zip(related, row, strict=True):
            if first in names and second in names and first != second:
                matrix[names.index(first), names.index(second)] = value
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    # As written, rounded correlations may be a little less than positive.
    return (vectors * np.sqrt(np.maximum(values, 0.0))).T
