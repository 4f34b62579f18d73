"""Results as the plain values that JSON knows."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np


def to_plain(value: Any) -> Any:
    """Turns records, arrays and paths into dicts, lists, strings and numbers.

    Dataclasses and named tuples become dicts by field; a number that is not finite becomes
    None, since JSON has no word for it.

    Raises:
      TypeError: `value` holds something that has no plain form.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
        return {name: to_plain(item) for name, item in zip(names, value, strict=True)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if hasattr(value, "__array__"):
        return to_plain(np.asarray(value).tolist())
    raise TypeError(f"{type(value).__name__} has no plain form: {value!r}")
