"""What every test shares: strict numerics and a way to the recorded traces."""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

_RECORDED = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces"


@pytest.fixture
def recorded_trace() -> Callable[[str], Path]:
    """Finds a recorded routing array by file name; the test is skipped where it is absent.

    The recordings are other people's and are not shipped; `MOEJAX_RECORDED_TRACES` names their
    folder.
    """
    folder = Path(os.environ.get("MOEJAX_RECORDED_TRACES", _RECORDED))

    def find(name: str) -> Path:
        path = folder / name
        if not path.is_file():
            pytest.skip(f"recorded trace {name} is not here")
        return path

    return find
