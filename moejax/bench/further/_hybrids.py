"""Hybrid strategies: the study's open question, answered with the wrappers."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from moejax.cards import Hardware
from moejax.strategies import (
    Profile,
    Strategy,
    calibrated,
    host_compute,
    intelligent,
    lru,
    on_demand,
    pinned,
    transitions,
    with_prefetch,
)


class Hybrid(NamedTuple):
    """A strategy made of others.

    Attributes:
      parts: Strategies of the registry that it is made of and must beat to be worth its while.
      make: Builds it from a profile and the share of a layer's experts to pin.
    """

    parts: tuple[str, ...]
    make: Callable[[Profile, float], Strategy]


def _looking_ahead(strategy: Strategy, profile: Profile) -> Strategy:
    return with_prefetch(strategy, calibrated(transitions(profile, online=True)))


HYBRIDS: Mapping[str, Hybrid] = MappingProxyType(
    {
        "pinned(lru)": Hybrid(
            ("lru", "top_k"), lambda profile, share: pinned(lru(), profile, share)
        ),
        "pinned(intelligent)": Hybrid(
            ("intelligent", "top_k"),
            lambda profile, share: pinned(intelligent(profile), profile, share),
        ),
        "with_prefetch(lru)": Hybrid(
            ("lru",), lambda profile, share: _looking_ahead(lru(), profile)
        ),
        "with_prefetch(pinned(lru))": Hybrid(
            ("lru", "top_k"),
            lambda profile, share: _looking_ahead(pinned(lru(), profile, share), profile),
        ),
        "host_compute(on_demand)": Hybrid(
            ("on_demand",), lambda profile, share: host_compute(on_demand())
        ),
        "host_compute(lru)": Hybrid(("lru",), lambda profile, share: host_compute(lru())),
        "host_compute(intelligent)": Hybrid(
            ("intelligent",), lambda profile, share: host_compute(intelligent(profile))
        ),
        "host_compute(pinned(intelligent))": Hybrid(
            ("intelligent", "top_k"),
            lambda profile, share: host_compute(pinned(intelligent(profile), profile, share)),
        ),
    }
)
"""By the name in reports; pins are the profile's hottest, prefetches come from layer-to-layer
transitions."""


def cautious(hardware: Hardware) -> Hardware:
    """The machine as slow as its own constants allow while the host computes experts.

    The timeline copies at the idle link's rate even then, and takes the rate at which the host
    reads experts as stated. Here every copy is as slow as beside a reading host, and the host
    reads no faster than one thread of it copies.
    """
    link, read = "pinned_h2d_bytes_per_s", "host_read_bytes_per_s"
    slowest = {
        link: hardware.value(link) * hardware.value("contention_ratio"),
        read: min(hardware.value(read), hardware.value("host_copy_bytes_per_s")),
    }
    changed = {
        name: dataclasses.replace(hardware.constants[name], value=value)
        for name, value in slowest.items()
    }
    return dataclasses.replace(hardware, constants={**hardware.constants, **changed})
