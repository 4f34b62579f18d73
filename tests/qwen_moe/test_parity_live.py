"""The port beside the reference itself, and checkpoints from either to the other.

Needs the extra `parity`. It also tells whether the stored numbers of `test_parity` are still
those of the installed reference.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from moejax.qwen_moe import QwenMoe, params

from ._parity import Arrays, assert_parity, generate, load_script, read_golden, read_prompt
from ._reference_models import CONFIGS, LAYOUTS, NUM_NEW_TOKENS, write_reference_model

# Both libraries warn of what is to change in themselves.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers", minversion="5.8")


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    """One of the six models as a checkpoint, experts one by one."""
    return write_reference_model(tmp_path / "original", name, "hub")


def test_port_computes_what_the_reference_computes(name: str, folder: Path):
    stored, _ = read_golden(name)
    token_ids = stored["token_ids"]
    live = load_script("make_parity_golden").run_reference(folder, token_ids)
    model = params.load(folder)
    assert_parity(read_prompt(model, token_ids), live)
    assert_parity(generate(model, token_ids, NUM_NEW_TOKENS), live)
    assert_parity({key: stored[key] for key in stored if key != "token_ids"}, live)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_loads_what_the_port_saves(layout: str, name: str, folder: Path, tmp_path: Path):
    params.save(params.load(folder), tmp_path / "ours", layout=layout, max_shard_bytes=40_000)
    original, ours = open_reference(folder), open_reference(tmp_path / "ours")
    token_ids = torch.tensor(read_golden(name)[0]["token_ids"].astype(np.int64))
    with torch.no_grad():
        assert torch.equal(original(token_ids).logits, ours(token_ids).logits)
    for key, value in original.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key


@pytest.mark.parametrize("is_hub_layout", [True, False])
def test_port_loads_what_the_reference_saves(is_hub_layout: bool, folder: Path, tmp_path: Path):
    open_reference(folder).save_pretrained(
        tmp_path / "theirs", save_original_format=is_hub_layout, max_shard_size="40KB"
    )
    original, theirs = params.load(folder), params.load(tmp_path / "theirs")
    assert theirs.config.rope_theta == original.config.rope_theta
    assert theirs.config.moe_layers == original.config.moe_layers
    ours, expected = arrays_of(theirs), arrays_of(original)
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_known_answer_comes_from_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    script = load_script("check_known_answer")
    monkeypatch.setattr(script, "ANSWERS", tmp_path)
    folder = write_reference_model(tmp_path / "Gqa", "gqa", "fused")
    assert script.main(["--model", str(folder), "--write"]) == 0
    assert "38 of 38 numbers agree" in capsys.readouterr().out
    assert "transformers" in (tmp_path / "gqa.json").read_text(encoding="utf-8")


def open_reference(folder: Path) -> Any:
    """The reference with the weights of a folder, every one of which it must know.

    They lie in the mapped file, in another place in every layout, and torch adds in an order that
    depends on it: copied, equal weights give equal logits to the last bit.
    """
    model, faults = transformers.Qwen2MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(faults.values()), faults
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def arrays_of(model: QwenMoe) -> Arrays:
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}
