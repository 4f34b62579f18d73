from dataclasses import replace

import numpy as np
import pytest

from moejax.cli._routing import recorded_trace
from moejax.errors import UsageError
from moejax.trace import load_trace, save_trace


@pytest.fixture
def sized(tmp_path) -> str:
    """A shipped recording with sizes of its own."""
    trace = load_trace("tiny-moe")
    sizes = np.full(trace.num_layers, 7, np.int64)
    save_trace(replace(trace, expert_bytes=sizes), tmp_path / "sized.safetensors")
    return str(tmp_path / "sized.safetensors")


@pytest.mark.parametrize("model", [None, "tiny-moe"])
def test_sizes_of_the_recorded_model_count(sized, model):
    assert (recorded_trace(sized, None, model).expert_bytes == 7).all()


def test_sizes_of_another_model_replace_those_recorded(sized, capsys):
    assert recorded_trace(sized, None, "small-moe").expert_bytes is None
    assert "experts have the sizes of small-moe" in capsys.readouterr().err


def test_a_trace_goes_by_its_name_and_excludes_a_workload():
    assert recorded_trace("small-moe", None, None).model == "small-moe"
    assert recorded_trace(None, "uniform", None) is None
    with pytest.raises(UsageError):
        recorded_trace("small-moe", "uniform", None)
