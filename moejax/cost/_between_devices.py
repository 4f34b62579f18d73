"""What joins the devices of one host: adding up their answers, and links side by side."""

import math
from typing import NamedTuple

from moejax._types import Scalar
from moejax.cards import Hardware, ModelSpec

# Answers are added up in float32, whatever the weights are stored in.
_NUMBER_BYTES = 4


class BetweenDevices(NamedTuple):
    """Constants of several devices; by default those of devices that never wait for each other.

    Attributes:
      all_reduce_latency_s: Adding up a vector of no bytes over the devices.
      all_reduce_bytes_per_s: Bytes of the vector over what they take more than that.
      links_beside_ratio: Share of a link's bandwidth that is left while all devices' links copy.
    """

    all_reduce_latency_s: float = 0.0
    all_reduce_bytes_per_s: float = math.inf
    links_beside_ratio: float = 1.0


def between_devices(hardware: Hardware) -> BetweenDevices:
    """What a profile states of several devices; the rest takes no time."""
    stated = {
        name: hardware.value(name) for name in BetweenDevices._fields if name in hardware.constants
    }
    return BetweenDevices(**stated)


def all_reduce_s(between: BetweenDevices, model: ModelSpec, batch_size: Scalar) -> Scalar:
    """Time to add up [batch, hidden] over the devices: latency + bytes / bandwidth.

    Args:
      between: Constants of the devices.
      model: Gives the hidden size.
      batch_size: Requests that decode in lockstep.
    """
    num_bytes = float(_NUMBER_BYTES * model.hidden_size) * batch_size
    return between.all_reduce_latency_s + num_bytes / between.all_reduce_bytes_per_s
