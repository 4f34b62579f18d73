"""What adding up the answers of several devices takes, once a layer."""

from moejax._types import Scalar
from moejax.cards import ModelSpec

from ._parameters import CostParameters

# Answers are added up in float32, whatever the weights are stored in.
_NUMBER_BYTES = 4


def all_reduce_s(parameters: CostParameters, model: ModelSpec, batch_size: Scalar) -> Scalar:
    """Time to add up [batch, hidden] over the devices: latency + bytes / bandwidth.

    Args:
      parameters: Constants of the machine; 0 of one that does not state them.
      model: Gives the hidden size.
      batch_size: Requests that decode in lockstep.
    """
    num_bytes = all_reduce_bytes(model, batch_size)
    return parameters.all_reduce_latency_s + num_bytes / parameters.all_reduce_bytes_per_s


def all_reduce_bytes(model: ModelSpec, batch_size: Scalar) -> Scalar:
    """Bytes of what is added up."""
    return float(_NUMBER_BYTES * model.hidden_size) * batch_size
